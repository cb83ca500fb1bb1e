"""The range of frames to read from a source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import VideoError


@dataclass(frozen=True)
class Span:
    """A range of frames; an int is an index, and a Fraction is a time in seconds after the first frame."""

    start: int | Fraction = 0
    end: int | Fraction | None = None
    """The last frame (inclusive), or None for the end of the source."""

    def before(self, index: int, seconds: Fraction) -> bool:
        """Whether a frame is before the span."""
        return (index if isinstance(self.start, int) else seconds) < self.start

    def after(self, index: int, seconds: Fraction) -> bool:
        """Whether a frame is after the span."""
        return self.end is not None and (index if isinstance(self.end, int) else seconds) > self.end

    def count(self, frames: int | None, rate: Fraction) -> int | None:
        """Return an estimate of the span's frame count, or None if its end and `frames` are both None."""
        first = self.start if isinstance(self.start, int) else round(self.start * rate)
        if self.end is None:
            return None if frames is None else max(0, frames - first)
        last = self.end if isinstance(self.end, int) else int(self.end * rate)
        return max(0, min(last + 1, last + 1 if frames is None else frames) - first)


def parse_position(text: str) -> int | Fraction:
    """Parse `120` as a frame index, and `12.5s` or `hh:mm:ss.fff` as seconds; raises `VideoError`."""
    if text.isdecimal():
        return int(text)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)s", text):
        return Fraction(match[1])
    if match := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text):
        return Fraction(match[3]) + 60 * int(match[2]) + 3600 * int(match[1] or 0)
    raise VideoError(
        f"{text!r} is not a position in a video: use a frame number such as 120, or a time such as 12.5s "
        "or 0:01:02.5."
    )
