"""Compare predicted and measured memory peaks, with a fresh process for each line.

    python benchmarks/memory.py --model random --dtype float32 64x64 128x128 320x180 480x270
    python benchmarks/memory.py --model nano --plan banded 960x540

Sizes are those of the LQ frame, width x height. `random` is the released architecture with random weights.
Two frames are upscaled, the second one guided, in one denoising step, since more steps need no more memory.
Peaks exclude the memory in use after imports: resident memory on a CPU, the allocator's on CUDA.

On a CPU, glibc is configured to return large blocks to the system as soon as they are freed, so that the peak
shows only memory in use, and is the same in every run. `--kept` measures a process without this setting:
freed memory remains in gaps, up to as much again, and the amount varies from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MEGABYTE = 2**20

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Environment in which glibc returns freed blocks of at least 64 KiB to the system."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sizes", nargs="+", metavar="WxH")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--flow", default="auto")
    parser.add_argument("--plan", default="whole", help="whole, banded, tiled or auto")
    parser.add_argument("--flow-scale", type=float, default=1.0)
    parser.add_argument("--kept", action="store_true", help="let glibc keep what was freed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return 0
    print("| LQ | output | plan | flow | estimated MB | measured MB | error | s per guided frame |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        command = [
            sys.executable,
            __file__,
            *(a for a in sys.argv[1:] if a not in args.sizes),
            size,
            "--child",
        ]
        environment = {**os.environ, **({} if args.kept else GIVEN_BACK)}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if result.returncode:
            print(f"| {size} | ended with {result.returncode} |", flush=True)
            continue
        print(row(size, json.loads(result.stdout.splitlines()[-1])), flush=True)
    return 0


def row(size: str, found: dict[str, Any]) -> str:
    width, height = (int(side) for side in size.split("x"))
    estimated, measured = found["estimated"] / MEGABYTE, found["measured"] / MEGABYTE
    cells = [size, f"{4 * width}x{4 * height}", found["plan"], found["flow"], f"{estimated:.0f}"]
    cells += [f"{measured:.0f}", f"{estimated / measured - 1:+.0%}", f"{found['seconds']:.1f}"]
    return f"| {' | '.join(cells)} |"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Upscale two frames of one size; return memory, time, plan and flow."""
    import diffusers  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    from stream_diffvsr import UpscaleOptions
    from stream_diffvsr.bench.networks import open_measured
    from stream_diffvsr.families.diffvsr.plan import Plan

    width, height = (int(side) for side in args.sizes[0].split("x"))
    options = UpscaleOptions(num_inference_steps=1, memory_plan=args.plan, flow_scale=args.flow_scale)
    # A smooth picture that moves, as flow estimators expect.
    picture = torch.nn.functional.interpolate(
        torch.rand(1, 3, height // 8 + 3, width // 8 + 3), size=(height, width + 2), mode="bicubic"
    )
    with peak_memory(args.device) as found:
        pipe = open_measured(args.model, args.device, args.dtype, args.flow)
        state = pipe.process_frame(picture[..., :width].contiguous(), None, options).state
        begin = time.perf_counter()
        state = pipe.process_frame(picture[..., 2:].contiguous(), state, options).state
        seconds = time.perf_counter() - begin
    plan = Plan.from_json(state.metadata["plan"])
    predicted = pipe.needs((height, width), options, plan)
    return {
        **found,
        "seconds": seconds,
        "estimated": predicted["peak"],
        "plan": str(plan),
        "flow": pipe.flow.name,
    }


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, int]]:
    """Yield a dict that receives the block's peak as 'measured', in bytes above the usage at its start."""
    import torch

    found: dict[str, int] = {}
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield found
        found["measured"] = torch.cuda.max_memory_allocated() - start
        return
    import psutil

    process, stop = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.003):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    stop.set()
    watcher.join()
    found["measured"] = peak - start


if __name__ == "__main__":
    sys.exit(main())
