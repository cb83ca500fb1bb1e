"""Scene cuts, at which the previous frame must not guide the next one.

The metric is the one that PySceneDetect documents for its content detector: the mean difference of hue,
saturation and value between two frames, in 8-bit units. It depends only on the two LQ frames, so splitting or
resuming a video does not move any cut. As in the detector, only every n-th row and column of large
frames is compared, so that finding scenes takes only slightly longer than decoding.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import VideoError
from ..files import atomic
from ..media.seek import Place
from ..tensors import to_pixels

T = TypeVar("T")

THRESHOLD = 27.0
"""PySceneDetect's default, on a scale from 0 to 255."""
LOOKED_AT = 256
"""Minimum number of pixels to compare along the longer side, if the frame has that many."""


def thinning(height: int, width: int) -> int:
    """Return n such that every n-th row and column is compared in frames of this size."""
    return max(1, max(height, width) // LOOKED_AT)


@dataclass(frozen=True)
class SceneCut:
    """How to find cuts: with a threshold, from a list, or not at all."""

    threshold: float | None = THRESHOLD
    listed: frozenset[int] | None = None
    """Indices of the frames that begin a scene; if given, the threshold is ignored."""

    def summary(self, lq: Tensor) -> Tensor | None:
        """Summarise a frame, (1, 3, h, w) in model range, for comparison; None if frames are not compared."""
        if not self.compares:
            return None
        step = thinning(*lq.shape[2:])
        return hsv(lq[:, :, ::step, ::step])

    @property
    def compares(self) -> bool:
        """Whether cuts are found by comparing frames."""
        return self.threshold is not None and self.listed is None

    def between(self, index: int, before: Tensor | None, now: Tensor | None) -> bool:
        """Whether frame `index` begins a new scene, given its `summary` and that of the previous frame."""
        if self.listed is not None:
            return index in self.listed
        if self.threshold is None or before is None or now is None:
            return False
        return difference(before.to(now.device), now) >= self.threshold


@dataclass(frozen=True)
class Scene:
    """Describes consecutive frames for one worker to render; the pictures themselves are not included."""

    first: int
    """Index of its first frame in the source."""
    end: int | None = None
    """Index one past its last frame; None if it lasts until the end of the job."""
    place: Place | None = None
    """Where to find the frame before the first one; None means to read the source from its beginning."""
    warm_up: int = 0
    """Number of frames before `first` to render and discard; above 0 only for parts of a longer scene."""
    offset: int = 0
    """A state's frame number minus the source's."""
    state: str = ""
    """Name of the file in the work folder that contains the state to continue from; '' if there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return the scene as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Scene:
        """Recreate a scene from the output of `to_json`."""
        place = content["place"]
        values: dict[str, Any] = {**content, "place": None if place is None else Place(**place)}
        return cls(**values)


def in_scenes(
    frames: Iterator[T], cut_before: Callable[[T | None, T], bool]
) -> Iterator[tuple[bool, Iterator[T]]]:
    """Group frames into scenes in a single pass; yield pairs: whether a cut begins the scene, and its frames.

    `cut_before` is called once for each frame, with the previous frame (None at the start) and the frame
    itself. Read a scene to its end before requesting the next scene; a frame is read only after the previous
    frame has been used.
    """
    following = next(frames, None)
    cut = following is not None and cut_before(None, following)

    def scene() -> Iterator[T]:
        nonlocal following, cut
        while following is not None:
            now = following
            yield now
            following = next(frames, None)
            cut = following is not None and cut_before(now, following)
            if cut:
                return

    while following is not None:
        yield cut, scene()


def parse(text: str) -> SceneCut:
    """Parse `auto`, `off`, a threshold from 0 to 255, or the path of a CSV file. Raises `VideoError`."""
    if text == "auto":
        return SceneCut()
    if text == "off":
        return SceneCut(threshold=None)
    try:
        threshold = float(text)
    except ValueError:
        return SceneCut(listed=read_list(Path(text)))
    if not 0 <= threshold <= 255:
        raise VideoError(f"the threshold for scene cuts must be from 0 to 255, not {text}.")
    return SceneCut(threshold)


STRIP = 64
"""Number of rows to process together, few enough to keep intermediate values in a processor's cache."""


def difference(before: Tensor, now: Tensor) -> float:
    """Return the mean difference in hue (0 to 179), saturation and value (0 to 255) of two `hsv` frames.

    Sums of integers are exact, so the result is the same for any number of threads.
    """
    strips = zip(before.split(STRIP, 2), now.split(STRIP, 2), strict=True)
    return sum(int((a.short() - b.short()).abs().sum()) for a, b in strips) / now.numel()


def hsv(lq: Tensor) -> Tensor:
    """Convert a frame in model range to hue (degrees / 2), saturation and value: (1, 3, h, w) uint8."""
    return torch.cat([_hsv(to_pixels(strip)) for strip in lq.split(STRIP, 2)], dim=2)


def _hsv(rgb: Tensor) -> Tensor:
    red, green, blue = (rgb * 255).round_().squeeze(0).unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    from_red, from_green = value == red, value == green
    apart = torch.where(from_red, green - blue, torch.where(from_green, blue - red, red - green))
    sixths = torch.where(from_red, 0.0, torch.where(from_green, 2.0, 4.0)) + apart / span.clamp(min=1)
    hue = (sixths * 30).remainder_(180).round_().remainder_(180)
    saturation = (255 * span / value.clamp(min=1)).round_()
    return torch.stack([hue.byte(), saturation.byte(), value.byte()])[None]


def read_list(path: Path) -> frozenset[int]:
    """Read the index of each scene's first frame from a CSV file: PySceneDetect's list or one index per line.

    PySceneDetect's "Start Frame" column counts frames from 1; plain indices count from 0.
    """
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError) as error:
        raise VideoError(f"the list of cuts {path} cannot be read ({error}).") from error
    header = next((number for number, row in enumerate(rows) if "Start Frame" in row), None)
    try:
        if header is None:
            return frozenset(int(row[0]) for row in rows if row)
        column = rows[header].index("Start Frame")
        return frozenset(int(row[column]) - 1 for row in rows[header + 1 :] if row)
    except (ValueError, IndexError) as error:
        raise VideoError(
            f"{path} is not a list of cuts ({error}): write one frame number per line, or use "
            "PySceneDetect's CSV format."
        ) from error


def write_list(path: Path, first: int, last: int, cuts: Sequence[int]) -> None:
    """Write the scenes in PySceneDetect's format: frames are counted from 1, and `last` is inclusive."""
    starts = sorted({first, *cuts})
    ends = [*(start - 1 for start in starts[1:]), last]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["Scene Number", "Start Frame", "End Frame", "Length (frames)"])
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
        writer.writerow([number, start + 1, end + 1, end - start + 1])
    with atomic(path) as file:
        file.write(table.getvalue().encode())
