"""Finding the scenes of a job by reading its frames once, without rendering any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import IncompatibleInputError
from ..media.read import FolderSource, SourceFrame
from ..media.seek import Place
from ..tensors import from_pixels
from .overlap import prefetch
from .prepare import Prepared
from .scenes import Scene, SceneCut, hsv, thinning

NO_CUTS = SceneCut(threshold=None)


@dataclass(frozen=True)
class Split:
    """How to split long scenes among several workers; 0 frames means no splitting."""

    frames: int = 0
    warm_up: int = 8

    def __post_init__(self) -> None:
        if self.frames < 0 or not 0 <= self.warm_up <= max(self.frames, 8):
            raise IncompatibleInputError(
                f"the warm-up must be between 0 and the part length ({self.frames}), not {self.warm_up}"
            )


def find_scenes(
    prepared: Prepared, split: Split | None = None, state: str = "", told: bool = False
) -> Iterator[Scene]:
    """Yield each scene as soon as its end is known; the scenes are the same as in a single-process run.

    `state` names the saved state from which the first scene continues. If `told` is set, a job
    without cut detection yields its single scene without reading any frames; its end may then be None.
    """
    job, source, split = prepared.job, prepared.source, split or Split()
    if told and not split.frames and _is_one_scene(prepared) and isinstance(job.start, int):
        end = job.end + 1 if isinstance(job.end, int) else None
        yield Scene(job.start, end, offset=prepared.offset(job.start), state=state)
        return
    scene: Scene | None = None
    last: SourceFrame | None = None
    previous_lq = None if job.state is None else job.state.tensors.get("previous_lq")
    before: Seen | None = None
    if previous_lq is not None:
        before = previous_lq.shape[2:], prepared.cut_rule.summary(previous_lq)
    places: dict[int, Place | None] = {}
    for frame in prefetch(source.frames(job.span), job.read_ahead):
        now = _seen(prepared, frame)
        cut = before is not None and _cut(prepared, frame.index, before, now)
        if scene is None:
            scene = Scene(frame.index, offset=prepared.offset(frame.index), state="" if cut else state)
        elif cut:
            yield from _split_scene(replace(scene, end=frame.index), split, places)
            scene = replace(scene, first=frame.index, state="")
            places.clear()
        if frame.index == scene.first:
            places[frame.index] = source.place(last) if last is not None else None
        if split.frames and (frame.index + 1 + split.warm_up - scene.first) % split.frames == 0:
            places[frame.index + 1] = source.place(frame)
        before, last = now, frame
    if scene is not None and last is not None:
        yield from _split_scene(replace(scene, end=last.index + 1), split, places)


Seen = tuple[tuple[int, ...], Tensor | None]
"""The (height, width) of the model's input for a frame, and the frame's `SceneCut.summary`."""


def _seen(prepared: Prepared, frame: SourceFrame) -> Seen:
    """Return exactly the values that a run compares for this frame, without converting all of its pixels."""
    rule, sizes = prepared.cut_rule, prepared.job.sizes
    size = sizes.model(*frame.size)
    if not rule.compares:
        return size, None
    if size != frame.size:
        return size, rule.summary(from_pixels(sizes.to_model(frame.rgb)))
    return size, hsv(from_pixels(frame.thinned(thinning(*size))))


def _cut(prepared: Prepared, index: int, before: Seen, now: Seen) -> bool:
    if before[0] != now[0]:
        return isinstance(prepared.source, FolderSource)
    return prepared.cut_rule.between(index, before[1], now[1])


def _is_one_scene(prepared: Prepared) -> bool:
    """Whether the job is one scene, whatever its frames show; in a folder, each new size begins a scene."""
    return prepared.cut_rule == NO_CUTS and not isinstance(prepared.source, FolderSource)


def _split_scene(scene: Scene, split: Split, places: Mapping[int, Place | None]) -> Iterator[Scene]:
    """Yield a scene whose end is known, either whole or split into parts.

    `places` maps the index of the first frame that each part reads to the place from which to read it.
    """
    end = scene.end or scene.first
    for first in range(scene.first, end, split.frames or end - scene.first):
        warm_up = min(split.warm_up, first - scene.first)
        yield replace(
            scene,
            first=first,
            end=min(end, first + split.frames) if split.frames else end,
            warm_up=warm_up,
            place=places.get(first - warm_up),
            state=scene.state if first == scene.first else "",
        )
