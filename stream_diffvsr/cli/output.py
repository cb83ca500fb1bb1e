"""Output of the commands: errors, progress, and comparison pictures."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..jobs.job import JobProgress
from ..media import pictures
from ..media.pictures import Picture
from ..media.sizes import enlarge
from ..weights.fetch import OnProgress

PROGRESS = ("bar", "json", "none")


def fail(args: argparse.Namespace, message: str, code: int) -> int:
    """Print an error on one line, after its traceback if --debug is set; return the exit code."""
    if args.debug:
        logging.exception(message)
    print(f"stream-diffvsr: {' '.join(message.split())}", file=sys.stderr)
    return code


def run_to_end(
    steps: Iterable[JobProgress], progress: str = "bar", preview: Path | None = None, every: int = 0
) -> JobProgress | None:
    """Run a job to its end; return the last report, or None if everything was already done.

    `progress` is one of PROGRESS: a bar on standard error, a line of JSON per frame on standard output, or
    nothing. If `preview` is given, a side-by-side picture of the bicubic upscale and the result is written
    to that path every `every` frames, but at most once a second.
    """
    step, shown_at = None, -math.inf
    shown = {"bar": _bar, "json": _json_lines, "none": iter}[progress]
    for step in shown(steps):
        if preview is not None and step.done % every == 0 and time.monotonic() - shown_at >= 1:
            shown_at = time.monotonic()
            size = (step.hq.shape[-2], step.hq.shape[-1])
            pictures.write(preview, Picture(side_by_side(enlarge(step.lq, size), step.hq)))
    return step


def _bar(steps: Iterable[JobProgress]) -> Iterator[JobProgress]:
    from tqdm import tqdm

    with tqdm(unit="frame", dynamic_ncols=True) as bar:
        for number, step in enumerate(steps):
            if number == 0:
                bar.reset(step.total)
                bar.initial = bar.n = step.done - 1
            bar.set_postfix_str(f"segment {step.segment + 1}", refresh=False)
            bar.update()
            yield step


def _json_lines(steps: Iterable[JobProgress]) -> Iterator[JobProgress]:
    """Print the figures of each frame as JSON, for a program that runs the command."""
    for step in steps:
        left = step.seconds_left
        numbers = {
            "done": step.done,
            "total": step.total,
            "fps": round(step.fps, 3),
            "seconds_left": None if left is None else round(left, 1),
            "frame": step.index,
        }
        print(json.dumps(numbers), flush=True)
        yield step


@contextmanager
def download_bar(progress: str = "bar") -> Generator[OnProgress, None, None]:
    """Show the bytes downloaded, including those of earlier runs; the bar appears once the size is known."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bars: list[tqdm[NoReturn]] = []

    def show(done: int, total: int) -> None:
        if progress == "json":
            print(json.dumps({"downloaded": done, "bytes": total}), flush=True)
        if progress != "bar":
            return
        if total > 1 and not bars:
            bars.append(tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="download"))
        if bars:
            bars[0].update(done - bars[0].n)

    try:
        with logging_redirect_tqdm():
            yield show
    finally:
        for each in bars:
            each.close()


def side_by_side(*shown: Tensor, gap: int = 0) -> Tensor:
    """Return pictures (1, 3, H, W) in [0, 1] side by side, with white gaps of `gap` pixels."""
    white = shown[0].new_ones(1, 3, shown[0].shape[-2], gap)
    pieces = [piece for picture in shown for piece in (white, picture)]
    return torch.cat(pieces[1:], dim=-1)
