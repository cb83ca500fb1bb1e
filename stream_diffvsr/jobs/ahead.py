"""The scenes of a job by reading its frames once, without rendering any."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..media.read import FolderSource, SourceFrame
from ..tensors import from_pixels
from .overlap import prefetch
from .prepare import Prepared
from .scenes import Scene


def find_scenes(prepared: Prepared) -> Iterator[Scene]:
    """Each scene as soon as its end is known; they are those that a run finds on its way."""
    job, source = prepared.job, prepared.source
    scene: Scene | None = None
    last: SourceFrame | None = None
    previous: Tensor | None = None
    for frame in prefetch(source.frames(job.span), job.read_ahead):
        lq = from_pixels(job.sizes.to_model(frame.rgb))
        if scene is None or _cut(prepared, frame, previous, lq):
            if scene is not None:
                yield Scene(scene.first, frame.index, scene.place)
            scene = Scene(frame.index, place=source.place(last) if last is not None else None)
        previous, last = lq, frame
    if scene is not None and last is not None:
        yield Scene(scene.first, last.index + 1, scene.place)


def _cut(prepared: Prepared, frame: SourceFrame, previous: Tensor | None, lq: Tensor) -> bool:
    if previous is None:
        return False
    if previous.shape != lq.shape:
        return isinstance(prepared.source, FolderSource)
    return prepared.cut_rule.between(frame.index, previous, lq)
