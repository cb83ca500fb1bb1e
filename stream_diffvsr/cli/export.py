"""Convert a model for OpenVINO or ONNX Runtime in advance, so that later runs start immediately."""

from __future__ import annotations

import argparse
import sys

import torch

from ..errors import IncompatibleInputError
from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..weights.folders import user_cache
from .bench import SIZE, parse_size
from .model import add_model_arguments, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.set_defaults(runtime="openvino")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[SIZE],
        metavar="WxH",
        help=f"Input sizes for which to convert the model. Default: {SIZE}.",
    )


def run(args: argparse.Namespace) -> int:
    sizes = [parse_size(text) for text in args.sizes]
    pipe = open_model(args)
    if not isinstance(pipe, StreamDiffVSRPipeline) or pipe.built is None:
        raise IncompatibleInputError(f"export needs --runtime openvino or onnx, not {args.runtime}")
    for width, height in sizes:
        print(f"building for {width}x{height} ...", file=sys.stderr)
        # The first frame and a guided one together use all graphs.
        pipe(torch.zeros(2, 3, height, width), UpscaleOptions(num_inference_steps=1))
    print(user_cache() / args.runtime)
    return 0
