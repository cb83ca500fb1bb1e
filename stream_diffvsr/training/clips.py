"""The training footage: videos and folders of pictures, divided into scenes, some of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import IncompatibleInputError, StreamDiffVSRError
from ..jobs.scenes import SceneCut
from ..media import pictures
from ..media.read import Span, open_source
from ..tensors import SCALE, from_pixels

KEPT = 2 * 2**30
"""Bytes of frames to keep in memory; frames of later scenes are read again whenever they are needed."""

LOOKED_AT = 320
"""The approximate width at which frames are compared to find scenes."""

Window = tuple[Tensor, Tensor]
"""LQ frames, (T, 3, h, w), and true frames, (T, 3, 4h, 4w), in model range."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Frames `first` to `end` (exclusive) of a clip, without a cut between them."""

    path: Path
    first: int
    end: int
    size: tuple[int, int]
    """(height, width)"""
    kept: Tensor | None = None
    """The scene's frames, (T, 3, H, W) uint8, or None if they are not kept in memory."""

    def __len__(self) -> int:
        return self.end - self.first

    def read(self, start: int, count: int, rows: slice, columns: slice) -> Tensor:
        """Return `count` cropped frames, starting at `start`: (count, 3, ., .) in [0, 1]."""
        if self.kept is not None:
            return self.kept[start : start + count, :, rows, columns].float() / 255
        first = self.first + start
        frames = open_source(self.path).frames(Span(first, first + count - 1))
        return torch.cat([frame.rgb[..., rows, columns] for frame in frames])

    def part(self, start: int, end: int) -> Scene:
        """Return frames `start` to `end` (exclusive) as a separate scene."""
        kept = None if self.kept is None else self.kept[start:end]
        return replace(self, first=self.first + start, end=self.first + end, kept=kept)


@dataclass(frozen=True)
class Footage:
    """Scenes to train on, scenes held out for evaluation, and a line of information about each clip."""

    train: Sequence[Scene]
    held: Sequence[Scene]
    told: Sequence[str]

    @property
    def identity(self) -> str:
        """A hash that identifies the clips and frames."""
        facts = [(scene.path.name, scene.first, scene.end, scene.size) for scene in (*self.train, *self.held)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def read_clips(paths: Iterable[Path], side: int, frames: int) -> Footage:
    """Read every clip once; use scenes with at least `frames` frames and sides of at least `side` pixels.

    Raise `IncompatibleInputError` if no scene qualifies.
    """
    found: list[Scene] = []
    told: list[str] = []
    room = KEPT
    for path in _files(paths):
        try:
            scenes = list(_scenes(path, room))
        except (StreamDiffVSRError, OSError) as error:
            told.append(f"{path.name}: skipped, {error}")
            continue
        height, width = scenes[0].size if scenes else (0, 0)
        used = [scene for scene in scenes if len(scene) >= frames and min(scene.size) >= side]
        room -= sum(scene.kept.nbytes for scene in used if scene.kept is not None)
        total, count = sum(map(len, scenes)), sum(map(len, used))
        why = f"smaller than {side}x{side}" if min(height, width) < side else f"shorter than {frames} frames"
        left_out = f", {len(scenes) - len(used)} skipped: {why}" if len(used) < len(scenes) else ""
        told.append(f"{path.name}: {width}x{height}, {count} of {total} frames, {len(used)} scenes{left_out}")
        found += used
    if not found:
        raise IncompatibleInputError(
            f"no clip has scenes of at least {frames} frames and at least {side}x{side} pixels "
            f"({'; '.join(told) or 'no clips'})",
        )
    train, held = _hold_out(found, frames)
    return Footage(train, held, told)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield videos and folders of pictures; for any other folder, yield its contents."""
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        if any(each.suffix.lower() in pictures.SUFFIXES for each in inside) or not inside:
            yield path
        else:
            yield from (each for each in inside if not each.name.startswith("."))


def _scenes(path: Path, room: int) -> Iterator[Scene]:
    """Yield the scenes of a clip, found by the same rule as in jobs, but in reduced copies of the frames."""
    before, kept, first, size, index, rule = None, list[Tensor](), 0, (0, 0), -1, SceneCut()

    def scene(end: int) -> Scene:
        whole = len(kept) == end - first
        return Scene(path, first, end, size, torch.cat(kept) if whole else None)

    for index, frame in enumerate(open_source(path).frames(Span())):
        rgb, size = frame.rgb, frame.size
        small = F.interpolate(rgb, scale_factor=min(1.0, LOOKED_AT / size[1]), mode="area")
        now = rule.summary(from_pixels(small))
        if rule.between(index, before, now):
            yield scene(index)
            first, kept = index, []
        before = now
        room -= rgb.numel()
        if room > 0:
            kept.append((rgb * 255).round().byte())
    if index >= first and before is not None:
        yield scene(index + 1)


def _hold_out(scenes: Sequence[Scene], frames: int) -> tuple[list[Scene], list[Scene]]:
    """Hold out every sixth scene; with fewer than four, the last fifth of each that is long enough."""
    if len(scenes) >= 4:
        held = [scene for index, scene in enumerate(scenes) if index % 6 == 3]
        return [scene for scene in scenes if scene not in held], held
    ends = [max(len(scene) * 4 // 5, frames) if len(scene) >= 2 * frames else len(scene) for scene in scenes]
    train = [scene.part(0, end) for scene, end in zip(scenes, ends, strict=True)]
    held = [scene.part(end, len(scene)) for scene, end in zip(scenes, ends, strict=True) if end < len(scene)]
    return train, held or train


def crop(scene: Scene, rng: np.random.Generator, side: int, frames: int) -> Tensor:
    """Return a random crop of a scene, (frames, 3, side, side) in [0, 1]; smaller if the scene is smaller."""
    sides = [min(side, length // SCALE * SCALE) for length in scene.size]
    places = [int(rng.integers(length - own + 1)) for length, own in zip(scene.size, sides, strict=True)]
    rows, columns = (slice(at, at + own) for at, own in zip(places, sides, strict=True))
    return scene.read(int(rng.integers(len(scene) - frames + 1)), frames, rows, columns)
