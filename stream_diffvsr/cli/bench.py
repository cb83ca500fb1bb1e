"""Measure milliseconds per frame, stage by stage."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import IncompatibleInputError
from ..families.diffvsr.options import PRESET_HELP, PRESETS, UpscaleOptions
from ..families.diffvsr.pipeline import StreamDiffVSRPipeline
from ..load import FAMILIES
from ..options import add_flag, given_options, with_preset
from ..upscaler import Upscaler
from .allocator import keep_freed_memory
from .model import add_model_arguments

if TYPE_CHECKING:
    from ..bench.measure import Result

LARGEST = "denoise", "transformer"
"""Possible names of the stage that does most of the work; which of them exists depends on the family."""

SIZE = "160x90"
SIZES = ("320x180", "480x270", "640x360", "960x540")
"""LQ sizes that are upscaled to 720p, 1080p, 1440p and 2160p."""

TOLD = ("model", "preset", "compile_mode", "device", "dtype", "runtime", "threads", "torch")
"""The settings shown in the line above the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--size",
        action="append",
        help=f"Input size as WIDTHxHEIGHT, or all for {', '.join(SIZES)}; may be repeated. Default: {SIZE}.",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=8,
        help="Number of frames to measure (or of chunks, for models that work in chunks). Default: 8.",
    )
    for name in ("num_inference_steps", "compile_mode"):
        add_flag(parser, UpscaleOptions, name)
    parser.add_argument("--preset", choices=PRESETS, default="exact", help=f"{PRESET_HELP} Default: exact.")
    parser.add_argument("--threads", type=int, help="Number of CPU threads. Default: torch's own choice.")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="Also run the model as the reference implementation does, and compare the times.",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=30,
        help="Number of transformer blocks in random-flashvsr and random-swiftvr; use fewer for a quick "
        "trial. Default: 30.",
    )
    parser.add_argument("--json", type=Path, help="Write the figures to this JSON file.")
    parser.add_argument("--chart", type=Path, help="Write a chart to this PNG file; this needs matplotlib.")


def run(args: argparse.Namespace) -> int:
    from ..bench.chart import write_chart
    from ..bench.measure import best_rates
    from ..bench.networks import open_measured

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    asked = args.size or [SIZE]
    sizes = [parse_size(text) for text in (SIZES if "all" in asked else asked)]
    model = open_measured(args.model, args.device, args.dtype, args.flow, args.attention, args.blocks)
    if isinstance(model, StreamDiffVSRPipeline):
        model, settings, measured = _of_diffvsr(model, args)
    else:
        settings, measured = _of_any_family(model, args)
    results = []
    for width, height in sizes:
        print(f"measuring {width}x{height} ...", file=sys.stderr)
        results.append(measured(height, width).to_json())
    report = {"model": args.model, **environment(model), **settings}
    report |= {"limits": best_rates(model.device, model.dtype), "results": results}
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.chart:
        write_chart(args.chart, report)
    return 0


Measure = Callable[[int, int], "Result"]
"""Measures the model at an LQ height and width."""


def _of_diffvsr(
    pipe: StreamDiffVSRPipeline, args: argparse.Namespace
) -> tuple[StreamDiffVSRPipeline, dict[str, Any], Measure]:
    """Return the pipeline with its runtime, the settings to report, and the function that measures it."""
    from ..bench.measure import measure
    from ..bench.networks import reference_way
    from ..families.diffvsr.fastest import with_runtime

    other = reference_way(pipe) if args.plain else None
    pipe = pipe.with_loras(*args.loras) if args.loras else pipe
    pipe.quantize(args.quantize)
    pipe = with_runtime(pipe, args.runtime, args.provider, args.dtype, args.quantize)
    options = UpscaleOptions(**with_preset(PRESETS, args.preset, given_options(args, UpscaleOptions)))
    steps = options.num_inference_steps or pipe.traits.steps
    settings = {"compile_mode": options.compile_mode, "steps": steps, "flow": pipe.flow.name}
    return (
        pipe,
        {"preset": args.preset, **settings},
        lambda height, width: measure(pipe, height, width, args.frames, options, other),
    )


def _of_any_family(model: Upscaler, args: argparse.Namespace) -> tuple[dict[str, Any], Measure]:
    """Return the settings to report and the function that measures a model with only one runtime."""
    from ..bench.measure import measure_sequence

    family = FAMILIES[model.info.family]
    own = given_options(args, UpscaleOptions)
    usual = {"plain": False, "loras": [], "quantize": "none", "runtime": "torch"}
    if own or any(getattr(args, name) != value for name, value in usual.items()):
        names = ", ".join(
            f"--{name.replace('_', '-').replace('loras', 'lora')}"
            for name in (*usual, "steps", "compile_mode")
        )
        raise IncompatibleInputError(f"{args.model} ({family.title}) does not support {names}")
    options = family.options(**with_preset(family.presets, args.preset, {}))
    return (
        {"preset": args.preset, "compile_mode": "off"},
        lambda height, width: measure_sequence(model, height, width, args.frames, options),
    )


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise IncompatibleInputError(f"--size must be WIDTHxHEIGHT, such as 320x180, not {text!r}")
    return int(width), int(height)


def environment(model: Upscaler) -> dict[str, str | int]:
    """Return the conditions behind the figures: device, number format, runtime, threads and versions."""
    cuda = model.device.type == "cuda"
    details = getattr(model, "runtime_details", "")
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else processor(),
        "dtype": model.info.number_format,
        "runtime": f"{model.info.runtime} {details}".strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name, if the system reports it, and the instruction set that torch uses."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table of milliseconds per frame."""
    stages = list(report["results"][0]["stages"])
    head = ["LQ size", "ms per frame", "fps", "first result", *stages, "peak MB", "largest network", "frame"]
    rows = [_row(result, stages, report["limits"]) for result in report["results"]]
    rates = " and ".join(
        f"a {name} layer runs at {_rate_text(rate)}" for name, rate in report["limits"].items()
    )
    told = ", ".join(f"{key} {report[key]}" for key in TOLD) + f"; at best, {rates}"
    return "\n".join(
        [told, "", _line([*head, "plain / ours"]), _line(["---"] * (len(head) + 1)), *map(_line, rows)]
    )


def _row(result: dict[str, Any], stages: Sequence[str], limits: Mapping[str, float]) -> list[str]:
    times = [result["milliseconds"], result["fps"], result["first_frame"], *map(result["stages"].get, stages)]
    rates, best, ratio = result["rates"], max(limits.values()), result["plain_ratio"]
    largest = next((rates[name] for name in LARGEST if name in rates), None)
    return [
        f"{result['width']}x{result['height']}",
        *(f"{value:.1f}" for value in times),
        f"{result['peak_mb']:.0f}",
        *(f"{_rate_text(rate)}, {rate / best:.0%}" if rate else "" for rate in (largest, rates["frame"])),
        f"{ratio:.3f}" if ratio else "",
    ]


def _rate_text(rate: float) -> str:
    return f"{rate / 1000:.2f} TFLOP/s" if rate >= 1000 else f"{rate:.0f} GFLOP/s"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
