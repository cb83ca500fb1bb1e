"""Estimates of what a run will need, made before it begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import synchronize
from ..memory import free_memory
from ..upscaler import State, Upscaler
from .job import VideoJob

GIGABYTE = 2**30

BYTES_PER_PIXEL = {"h264": 0.15, "h265": 0.1, "av1": 0.1, "prores": 0.7, "ffv1": 1.5, "png": 2.0}
"""Typical bytes per output pixel in a file, by codec; noisy pictures need more, and flat pictures less."""


def cost_lines(
    job: VideoJob,
    size: Sequence[int],
    frames: int | None,
    *,
    plan: str,
    needs: Mapping[str, int],
    device: torch.device,
) -> Iterator[str]:
    """Yield lines about the size, the plan, memory and disk space.

    `size` is the source's (height, width), and `frames` is the number of frames if known. `needs` maps each
    stage to the bytes that it needs, and 'peak' to the overall maximum.
    """
    (height, width), (out_height, out_width) = job.sizes.model(*size), job.sizes.output(*size)
    count = f"{frames} frames" if frames else "unknown number of frames"
    yield f"size: {width}x{height} to {out_width}x{out_height}, {count}"
    if plan:
        yield f"plan: {plan}"
    stages = ", ".join(f"{name} {_gigabytes(needs[name])}" for name in needs if name != "peak")
    told = f" ({stages})" if stages else " besides the weights"
    yield f"memory: about {_gigabytes(needs['peak'])}{told}; {_gigabytes(free_memory(device))} free"
    codec, folder = job.codec or "h264", job.output.absolute().parent
    room = (frames or 1) * output_bytes(codec, out_width, out_height)
    share = "" if frames else " per frame"
    yield f"disk: about {_gigabytes(room)}{share} as {codec}; {_gigabytes(_disk_free(folder))} free"


def output_bytes(codec: str, width: int, height: int) -> float:
    """Return the number of bytes that a frame typically occupies in an output file."""
    return width * height * BYTES_PER_PIXEL.get(codec, BYTES_PER_PIXEL["png"])


def report_time(pipe: Upscaler, lq: Tensor, options: Any, state: State, frames: int | None) -> str:
    """Return a line with the time needed, estimated from a few frames; `lq` is a frame of the video."""
    seconds = seconds_per_frame(pipe, lq, options, state)
    return f"time: {seconds:.2f} s per frame" + (f", {_duration(seconds * frames)} in all" if frames else "")


def seconds_per_frame(pipe: Upscaler, lq: Tensor, options: Any, state: State | None = None) -> float:
    """Measure the seconds per frame in the middle of a sequence, after a warm-up."""
    session = pipe.session(options, state)
    for _ in range(pipe.info.first):
        session.push(lq)
    synchronize(pipe.device)
    begin, made = time.perf_counter(), 0
    for _ in range(pipe.info.chunk):
        made += len(session.push(lq))
    synchronize(pipe.device)
    return (time.perf_counter() - begin) / max(1, made)


def _gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.2f} GB"


def _disk_free(folder: Path) -> int:
    """Return the number of free bytes on the disk where a folder exists or will be created."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} h"
