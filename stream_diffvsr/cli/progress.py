"""A progress bar on stderr for a running job, and a picture to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..jobs.run import JobProgress
from ..media import pictures
from ..media.pictures import Picture
from ..media.sizes import enlarge


def follow(steps: Iterable[JobProgress], preview: Path | None = None, every: int = 0) -> JobProgress | None:
    """Run a job to its end with a progress bar; returns the last report, None where all was done.

    With `preview`, every so many frames that picture is written anew: bicubic and ours, side by side.
    """
    from tqdm import tqdm

    step = None
    with tqdm(unit="frame", dynamic_ncols=True) as bar:
        for step in steps:
            if bar.total is None:
                bar.reset(step.total)
                bar.initial = bar.n = step.done - 1
            bar.set_postfix_str(f"segment {step.segment + 1}", refresh=False)
            bar.update()
            if preview is not None and step.done % every == 0:
                pictures.write(preview, Picture(side_by_side(step.lq, step.hq)))
    return step


def side_by_side(lq: Tensor, hq: Tensor) -> Tensor:
    """Bicubic and the result beside each other; (1, 3, h, w) and (1, 3, H, W) in [0, 1]."""
    return torch.cat([enlarge(lq, (hq.shape[-2], hq.shape[-1])), hq], dim=-1)
