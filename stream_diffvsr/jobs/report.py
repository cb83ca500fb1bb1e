"""What a run would take, told before it begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..devices import synchronize
from ..families.diffvsr.options import UpscaleOptions
from ..families.diffvsr.plan import GIGABYTE, Plan, Planner, plan_details
from ..families.diffvsr.state import StreamDiffVSRState
from ..memory import free_memory
from ..tensors import SCALE

if TYPE_CHECKING:
    from ..families.diffvsr.pipeline import StreamDiffVSRPipeline

BYTES_PER_PIXEL = {"h264": 0.15, "h265": 0.1, "av1": 0.1, "prores": 0.7, "ffv1": 1.5, "png": 2.0}
"""What output pixels commonly take in a file; noise takes more, flat pictures less."""


def report(
    planner: Planner,
    plan: Plan,
    size: Sequence[int],
    options: UpscaleOptions,
    *,
    frames: int | None,
    folder: Path,
    codec: str = "h264",
) -> Iterator[str]:
    """Lines about plan, memory and disk space.

    `size` is the LQ frames' (height, width), `frames` their number if it is known, `folder` where the
    output goes.
    """
    height, width = size
    count = f"{frames} frames" if frames else "an unknown number of frames"
    yield f"size: {width}x{height} to {SCALE * width}x{SCALE * height}, {count}"
    yield f"plan: {plan}"
    needs = planner.needs(size, options, plan)
    stages = ", ".join(f"{name} {_gigabytes(needs[name])}" for name in needs if name != "peak")
    free = free_memory(planner.device)
    yield f"memory: about {_gigabytes(needs['peak'])} ({stages}); {_gigabytes(free)} free"
    room = (frames or 1) * height * width * SCALE**2 * BYTES_PER_PIXEL.get(codec, BYTES_PER_PIXEL["png"])
    share = "" if frames else " per frame"
    yield f"disk: about {_gigabytes(room)}{share} as {codec}; {_gigabytes(_disk_free(folder))} free"


def report_time(
    pipe: StreamDiffVSRPipeline, plan: Plan, lq: Tensor, options: UpscaleOptions, frames: int | None
) -> str:
    """The line about time, after two frames made for it; `lq` is a frame of the video."""
    state = StreamDiffVSRState(metadata=plan_details(plan, lq.shape[-2:]))
    seconds = seconds_per_frame(pipe, lq, state, options)
    return f"time: {seconds:.2f} s per frame" + (f", {_duration(seconds * frames)} in all" if frames else "")


def seconds_per_frame(
    pipe: StreamDiffVSRPipeline, lq: Tensor, state: StreamDiffVSRState, options: UpscaleOptions
) -> float:
    """Time of one guided frame, after one that warms up."""
    state = pipe.process_frame(lq, state, options).state
    synchronize(pipe.device)
    begin = time.perf_counter()
    pipe.process_frame(lq, state, options)
    synchronize(pipe.device)
    return time.perf_counter() - begin


def _gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.2f} GB"


def _disk_free(folder: Path) -> int:
    """Of the disk on which a folder is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} h"
