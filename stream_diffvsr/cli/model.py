"""The options shared by the subcommands: which model to use and how to run it."""

from __future__ import annotations

import argparse

from ..devices import DTYPES
from ..families.wan.attention import ATTENTIONS
from ..flow import FLOW_MODELS
from ..load import load_pipeline
from ..runtimes.choose import PROVIDERS, RUNTIMES
from ..runtimes.torch.quantized import QUANTIZATIONS
from ..upscaler import Upscaler
from ..weights.released import RELEASES
from .output import PROGRESS, download_bar


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --lora, --device, and the other options that determine how a model is loaded and run."""
    parser.add_argument(
        "--model",
        default="nano",
        help=f"nano (small, bundled), a released model ({', '.join(RELEASES)}; downloaded when first "
        "used), a checkpoint folder, or the file of a single-image model. Default: nano.",
    )
    parser.add_argument(
        "--lora",
        dest="loras",
        type=lora_argument,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="A LoRA for Stream-DiffVSR, made by 'stream-diffvsr train', with an optional strength from "
        "-2 to 2 (1 if not given). May be repeated to combine several.",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (the fastest), cpu, cuda, cuda:1 or mps. Default: auto."
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="Number format of the networks. auto: float16 on GPUs where it is fast, otherwise "
        "float32. Default: auto.",
    )
    parser.add_argument(
        "--quantize",
        default="none",
        choices=QUANTIZATIONS,
        help="Run linear layers in 8-bit precision, an approximation that needs torchao. Default: none.",
    )
    parser.add_argument(
        "--runtime",
        default="torch",
        choices=RUNTIMES,
        help="The library that runs Stream-DiffVSR's networks: PyTorch, OpenVINO (faster on a CPU), ONNX "
        "Runtime, or auto for the fastest exact runtime that is installed, as measured on first use. With "
        "any runtime other than torch, the first run converts the model, which takes minutes. "
        "Default: torch.",
    )
    parser.add_argument(
        "--provider",
        default="auto",
        choices=PROVIDERS,
        help="Device for the runtime: cpu, gpu or npu with openvino; cpu, cuda or tensorrt with onnx. "
        "Only cpu has been tested so far. Default: auto.",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTIONS,
        help="Self-attention implementation for SwiftVR: PyTorch's (auto, sdpa) or, on CUDA, FlashAttention "
        "(flash) or the approximate SageAttention (sage). FlashVSR supports auto and sdpa. Default: auto.",
    )
    parser.add_argument(
        "--flow",
        default="auto",
        choices=["auto", *FLOW_MODELS],
        help="How to estimate motion between frames. auto: the method used in the model's training. "
        "Default: auto.",
    )
    parser.add_argument(
        "--progress",
        default="bar",
        choices=PROGRESS,
        help="How to report progress: as a bar, as one line of JSON per frame on standard output, or not at "
        "all. Default: bar.",
    )


def lora_argument(text: str) -> tuple[str, float]:
    """Split text at the last colon into a path and a strength, which is 1 by default."""
    path, colon, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def open_model(args: argparse.Namespace) -> Upscaler:
    """Open the model that these options select."""
    with download_bar(args.progress) as on_progress:
        return load_pipeline(
            args.model,
            device=args.device,
            dtype=args.dtype,
            flow=args.flow,
            quantize=args.quantize,
            attention=args.attention,
            runtime=args.runtime,
            provider=args.provider,
            loras=args.loras,
            on_progress=on_progress,
        )
