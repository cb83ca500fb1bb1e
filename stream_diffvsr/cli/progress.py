"""A progress bar on stderr for a running job."""

from __future__ import annotations

from collections.abc import Iterable

from ..video.job import JobProgress


def follow(steps: Iterable[JobProgress]) -> JobProgress | None:
    """Run a job to its end with a progress bar; returns the last frame's report, None where all was done."""
    from tqdm import tqdm

    bar, step = None, None
    for step in steps:
        if bar is None:
            bar = tqdm(total=step.total, initial=step.done - 1, unit="frame", dynamic_ncols=True)
        bar.set_postfix_str(f"segment {step.segment + 1}", refresh=False)
        bar.update()
    if bar is not None:
        bar.close()
    return step
