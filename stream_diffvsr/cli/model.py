"""The options that choose a model and how it runs, shared by the subcommands."""

from __future__ import annotations

import argparse

from ..devices import DTYPES
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..flow import FLOW_MODELS
from ..load import load_pipeline
from ..runtimes.torch.quantized import QUANTIZATIONS
from .download import bar


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype, --quantize, --flow."""
    parser.add_argument("--model", default="nano", help="nano (default), v1, or a checkpoint folder")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="number format of the networks"
    )
    parser.add_argument(
        "--quantize", default="none", choices=QUANTIZATIONS, help="linear layers in 8 bits, by torchao (none)"
    )
    parser.add_argument("--flow", default="auto", choices=["auto", *FLOW_MODELS], help="optical flow")


def open_model(args: argparse.Namespace) -> StreamDiffVSRPipeline:
    """The pipeline that these options name."""
    with bar() as on_progress:
        return load_pipeline(
            args.model,
            device=args.device,
            dtype=args.dtype,
            flow=args.flow,
            quantize=args.quantize,
            on_progress=on_progress,
        )
