"""Run the tests and measurements that need a GPU, in nine minutes at most.

    uv run python benchmarks/gpu.py -o gpu.json
    uv run python benchmarks/gpu.py -o trial.json --device cpu --size tiny

It runs the tests marked cuda, then measures every family at 720p, 1080p and 1440p with random weights of the
real sizes, the most important cases first. Cases that fail or for which no time is left are listed with the
reason, without affecting others. `benchmarks/table.py` makes the table of docs/speed.md from the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table import table

from stream_diffvsr import StreamDiffVSRPipeline, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.measure import best_rates, measure, measure_sequence
from stream_diffvsr.bench.networks import open_measured, reference_way
from stream_diffvsr.cli.bench import environment
from stream_diffvsr.families.diffvsr.fastest import with_runtime
from stream_diffvsr.memory import release_caches

log = logging.getLogger("gpu")

ROOT = Path(__file__).parents[1]
WHEELS = (
    "torch", "torchvision", "triton", "diffusers", "transformers", "torchao", "onnxruntime-gpu",
    "onnxruntime", "onnx", "onnxscript", "tensorrt-cu12", "tensorrt-cu13", "sageattention", "flash-attn",
)  # fmt: skip
"""Packages that affect the figures; cases that need a missing one are left out."""

ANSWER = "answer: "
"""Prefix of the lines in which the measuring process reports its results."""

SIZES = {"720p": (180, 320), "1080p": (270, 480), "1440p": (360, 640)}
"""LQ sizes (height, width) by output size."""
REAL = {"diffvsr": "random", "flashvsr": "random-flashvsr", "swiftvr": "random-swiftvr"}
TINY = {
    "diffvsr": ROOT / "tests" / "golden" / "checkpoint",
    "flashvsr": ROOT / "tests" / "golden_flashvsr" / "checkpoint",
    "swiftvr": ROOT / "tests" / "golden_swiftvr" / "checkpoint",
}
TINY_SIZE = (16, 16)


@dataclass(frozen=True)
class Case:
    """A model and the settings with which to measure it."""

    family: str
    sizes: tuple[str, ...] = tuple(SIZES)
    dtype: str = "float16"
    compiled: str = "off"
    """'off', 'auto' and 'max' are our `compile_mode`; 'repeated' is diffusers' `compile_repeated_blocks`."""
    quantize: str = "none"
    runtime: str = "torch"
    provider: str = "auto"
    attention: str = "auto"
    against_plain: bool = False

    def __str__(self) -> str:
        names = ("dtype", "compiled", "quantize", "runtime", "provider", "attention")
        told = [getattr(self, name) for name in names if getattr(self, name) != getattr(Case, name)]
        return " ".join([self.family, *self.sizes, *told])


CASES = (
    Case("diffvsr", ("720p",), against_plain=True),
    Case("diffvsr", ("1080p", "1440p")),
    Case("swiftvr", dtype="bfloat16"),
    Case("flashvsr", dtype="bfloat16"),
    Case("diffvsr", ("720p", "1080p"), compiled="auto"),
    Case("diffvsr", ("720p",), compiled="repeated"),
    Case("diffvsr", ("720p",), quantize="fp8"),
    Case("diffvsr", ("720p",), compiled="auto", quantize="fp8"),
    Case("diffvsr", ("720p",), runtime="onnx", provider="cuda"),
    Case("swiftvr", ("1080p",), "bfloat16", compiled="repeated"),
    Case("swiftvr", ("1080p",), "bfloat16", attention="flash"),
    Case("swiftvr", ("1080p",), "bfloat16", attention="sage"),
    Case("flashvsr", ("1080p",), "bfloat16", compiled="repeated"),
    Case("diffvsr", ("720p",), "float32"),
    Case("diffvsr", ("720p",), compiled="max"),
    Case("diffvsr", ("720p",), runtime="onnx", provider="tensorrt"),  # takes minutes to build engines
)
"""All cases, the most important first."""


def opened(case: Case, args: argparse.Namespace) -> Any:
    """Open the model of a case, not yet quantised, compiled or moved to another runtime."""
    if args.size == "real":
        return open_measured(REAL[case.family], args.device, case.dtype, "auto", case.attention)
    own = {"diffvsr": {"flow": "none"}, "flashvsr": {"version": "v1.1"}, "swiftvr": {}}[case.family]
    settings = {"device": args.device, "dtype": case.dtype, "attention": case.attention}
    return load_pipeline(TINY[case.family], **settings, **own)


def report(case: Case, args: argparse.Namespace, best: dict[str, float]) -> dict[str, Any]:
    """Measure a case, and return a report like that of `stream-diffvsr bench --json`."""
    tiny, model = args.size == "tiny", opened(case, args)
    other = reference_way(model) if case.against_plain else None
    if case.quantize != "none":
        model.quantize(case.quantize)
    if case.runtime != "torch":
        model = with_runtime(model, case.runtime, case.provider, case.dtype, "none")
    if case.compiled == "repeated":
        _compile_repeated(model)
    results = []
    for name in case.sizes[:1] if tiny else case.sizes:
        size = TINY_SIZE if tiny else SIZES[name]
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if isinstance(model, StreamDiffVSRPipeline):
            options = UpscaleOptions(
                compile_mode=case.compiled if case.compiled in ("auto", "max") else "off"
            )
            results.append(measure(model, *size, args.frames, options, other).to_json())
        else:
            options = model.Options(scale=1.0 if tiny else 4.0)
            chunks = max(args.frames // 4, 1)
            results.append(measure_sequence(model, *size, chunks, options).to_json())
    told = {"compile_mode": case.compiled, "attention": case.attention, "limits": best, "results": results}
    return {"case": str(case), "model": case.family, **environment(model), **told}


def _compile_repeated(model: Any) -> None:
    """Compile a model as diffusers does: each kind of block that it lists as repeated, with dynamic sizes."""
    network = model.networks["unet" if isinstance(model, StreamDiffVSRPipeline) else "transformer"]
    network.compile_repeated_blocks(dynamic=True)


def correctness(seconds: float) -> str:
    """Run the tests marked cuda, and return pytest's summary line."""
    # Run pytest's own command: `python -m pytest` would take this folder for a package.
    command = [Path(sys.executable).parent / "pytest", "-q", "-m", "cuda"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    return (run.stdout.strip().splitlines() or [run.stderr.strip()])[-1]


def wheels() -> dict[str, str]:
    """Return the version of each package in `WHEELS`, or 'missing'."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def measured(args: argparse.Namespace, until: float) -> Iterator[tuple[Case, dict[str, Any] | str]]:
    """Yield each case with its report, or with the reason why there is none.

    The cases run in a child process, which is killed when the time is up. If it dies during a case, a new
    process continues with the next one.
    """
    waiting = list(range(len(CASES)))
    while waiting and time.monotonic() < until:
        command = [sys.executable, __file__, *sys.argv[1:], "--cases", *map(str, waiting)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        end = threading.Timer(until - time.monotonic(), child.kill)
        end.start()
        for line in child.stdout:
            if line.startswith(ANSWER):
                index, made = json.loads(line.removeprefix(ANSWER))
                waiting.remove(index)
                yield CASES[index], made
        end.cancel()
        if child.wait() and waiting and time.monotonic() < until:
            yield CASES[waiting.pop(0)], f"its process ended with {child.returncode}"
    yield from ((CASES[index], "no time was left") for index in waiting)


def answer(args: argparse.Namespace) -> None:
    """Run the cases given by `--cases`, and print a line for each."""
    best: dict[str, dict[str, float]] = {}
    for case in (CASES[index] for index in args.cases):
        log.info("%s ...", case)
        try:
            if case.dtype not in best:
                best[case.dtype] = best_rates(torch.device(args.device), getattr(torch, case.dtype))
            made: dict[str, Any] | str = report(case, args, best[case.dtype])
        except Exception as error:  # one failure must not stop the other cases
            made = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        print(ANSWER + json.dumps([CASES.index(case), made]), flush=True)
        release_caches(torch.device(args.device))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="The JSON file to write.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="tiny: the tests' networks.")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=9.0, help="After which it ends.")
    parser.add_argument("--cases", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if args.cases:
        answer(args)
        return
    began = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device cpu --size tiny tries the script itself")
    found: dict[str, Any] = {"wheels": wheels(), "tests": "", "reports": [], "left_out": {}}
    for name, version in found["wheels"].items():
        log.info("%s %s", name, version)
    found["tests"] = correctness(60 * args.minutes / 3)
    log.info("tests marked cuda: %s", found["tests"])
    for case, made in measured(args, began + 60 * args.minutes):
        if isinstance(made, str):
            found["left_out"][str(case)] = made
            log.info("%s: %s", case, made)
        else:
            found["reports"].append(made)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["reports"]))
    for name, why in found["left_out"].items():
        print(f"left out: {name}: {why}")
    print(f"tests marked cuda: {found['tests']}; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
