"""Measure milliseconds per frame, stage by stage."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import IncompatibleInputError
from ..families.diffvsr.options import PRESET_HELP, PRESETS, UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..options import add_flag, given, with_preset
from .allocator import keep_freed_memory
from .model import add_model_arguments

SIZE = "160x90"
SIZES = ("320x180", "480x270", "640x360", "960x540")
"""LQ sizes of 720p, 1080p, 1440p and 2160p."""

TOLD = ("model", "preset", "compile_mode", "device", "dtype", "runtime", "flow", "threads", "torch")
"""The settings that the line above the table names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--size",
        action="append",
        help=f"LQ size as WIDTHxHEIGHT, may be repeated; all: {', '.join(SIZES)}. Default: {SIZE}.",
    )
    parser.add_argument("--frames", type=int, default=8, help="Frames to measure. Default: 8.")
    for name in ("num_inference_steps", "compile_mode"):
        add_flag(parser, UpscaleOptions, name)
    parser.add_argument("--preset", choices=PRESETS, default="exact", help=f"{PRESET_HELP} Default: exact.")
    parser.add_argument(
        "--threads", type=int, help="CPU threads to compute with. Default: torch's own choice."
    )
    parser.add_argument(
        "--plain", action="store_true", help="Compare with the reference's way of computing, too."
    )
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")


def run(args: argparse.Namespace) -> int:
    from ..bench.measure import matrix_rate, measure
    from ..bench.networks import open_model, plain
    from ..families.diffvsr.fastest import with_runtime

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    asked = args.size or [SIZE]
    sizes = [parse_size(text) for text in (SIZES if "all" in asked else asked)]
    pipe = open_model(args.model, args.device, args.dtype, args.flow)
    other = plain(pipe) if args.plain else None
    pipe.quantize(args.quantize)
    pipe = with_runtime(pipe, args.runtime, args.provider, args.dtype, args.quantize)
    options = UpscaleOptions(**with_preset(PRESETS, args.preset, given(args, UpscaleOptions)))
    results = []
    for width, height in sizes:
        print(f"measuring {width}x{height} ...", file=sys.stderr)
        results.append(measure(pipe, height, width, args.frames, options, other).to_json())
    settings = {"model": args.model, "preset": args.preset, "compile_mode": options.compile_mode}
    settings["steps"] = options.num_inference_steps or pipe.traits.steps
    rate = matrix_rate(pipe.device, pipe.dtype)
    report = {**environment(pipe), **settings, "matrix_rate": rate, "results": results}
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise IncompatibleInputError("--size as WIDTHxHEIGHT, such as 320x180", repr(text))
    return int(width), int(height)


def environment(pipe: StreamDiffVSRPipeline) -> dict[str, str | int]:
    """What the figures depend on."""
    cuda = pipe.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(pipe.device)
        if cuda
        else platform.processor() or platform.machine(),
        "dtype": pipe.number_format,
        "runtime": f"{pipe.runtime} {pipe.runtime_details}".strip(),
        "flow": pipe.flow.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(report: dict) -> str:
    """Rows of milliseconds per frame, as Markdown."""
    stages = list(report["results"][0]["stages"])
    head = ["LQ size", "ms per frame", "fps", "first frame", *stages, "peak MB", "U-Net", "plain / ours"]
    rows = [_row(result, stages, report["matrix_rate"]) for result in report["results"]]
    told = ", ".join(f"{key} {report[key]}" for key in TOLD)
    told += f"; a matrix product runs at {report['matrix_rate'] / 1000:.2f} TFLOP/s"
    return "\n".join([told, "", _line(head), _line(["---"] * len(head)), *map(_line, rows)])


def _row(result: dict, stages: Sequence[str], matrix_rate: float) -> list[str]:
    times = [result["milliseconds"], result["fps"], result["first_frame"], *map(result["stages"].get, stages)]
    ratio, rate = result["plain_ratio"], result["rates"].get("denoise")
    return [
        f"{result['width']}x{result['height']}",
        *(f"{value:.1f}" for value in times),
        f"{result['peak_mb']:.0f}",
        f"{rate / 1000:.2f} TFLOP/s, {rate / matrix_rate:.0%}" if rate else "",
        f"{ratio:.3f}" if ratio else "",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
