"""What a job is asked for, and what it reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ..errors import VideoError
from ..families.diffvsr.options import UpscaleOptions
from ..media.sizes import Sizes
from ..media.span import Span, parse_position
from ..upscaler import State


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """What to upscale, where to, and how. Frozen; paths are checked when the job runs."""

    source: Path
    """A video, an animated GIF, WebP or PNG, a picture, or a folder of pictures."""
    output: Path
    """A file (.mp4 .mov .mkv .webm, or a picture's suffix for one picture), else a folder of pictures."""
    options: UpscaleOptions = field(default_factory=UpscaleOptions)
    state: State | None = None
    """To continue from; None starts a sequence, at the source's own frame index."""
    state_out: Path | None = None
    """Where to save the state after the last frame."""
    start: int | Fraction | str = 0
    """First frame: an index, seconds as a Fraction, or text as the command line takes."""
    end: int | Fraction | str | None = None
    """Last frame, included; None: to the end."""
    stream: int | None = None
    """Index of the video stream in the file; None: the largest."""
    rate: Fraction | None = None
    """Frames per second of a folder of pictures; None: 25."""
    pre_scale: float = 1.0
    """The source is scaled by this before the model."""
    target: tuple[int, int] | None = None
    """Width and height of the output; at most one of target, short_edge and scale."""
    short_edge: int | None = None
    scale: float | None = None
    """Size of the output as a multiple of the source."""
    codec: str | None = None
    """A key of `codecs.CODECS`; None: h264, in WebM av1."""
    crf: int | None = None
    pix_fmt: str | None = None
    scene_cut: str = "auto"
    """auto, off, a threshold of 255, or a CSV file of first frames."""
    cuts_out: Path | None = None
    """Where to write the scenes that were found, as CSV."""
    segment_frames: int = 120
    """Frames of a segment: what a crash costs at most."""
    read_ahead: int = 4
    """Frames decoded ahead; never changes pixels."""
    """Whether the next frame's flow is estimated beside the current frame; never changes pixels."""
    audio: bool = True
    """Whether sound and subtitles are copied."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Written into the output beside the source's own."""
    overwrite: bool = False
    """Whether a finished output may be replaced."""
    restart: bool = False
    """Whether to throw away the unfinished work of an earlier run."""
    compare: Path | None = None
    """A split-screen video to write: bicubic on the left, the result on the right."""

    def __post_init__(self) -> None:
        if self.segment_frames < 1:
            raise VideoError(f"a segment has at least 1 frame, got {self.segment_frames}.")
        for name in ("source", "output", "state_out", "cuts_out", "compare"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_position(value))

    @property
    def sizes(self) -> Sizes:
        """The sizes that were asked for."""
        return Sizes(self.pre_scale, self.target, self.short_edge, self.scale)

    @property
    def span(self) -> Span:
        """The frames that are wanted."""
        return Span(self.start, self.end)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class JobProgress:
    """Given after every frame."""

    done: int
    """Frames done, with those of earlier runs."""
    total: int | None
    """Frames of the job, as far as the file says."""
    fps: float
    """Frames per second of this run, the last few of them."""
    segment: int
    """Number of the segment, from 0."""
    index: int
    """The frame's index in the source."""
    lq: Tensor
    """(1, 3, h, w) in [0, 1]: what the model saw."""
    hq: Tensor
    """(1, 3, H, W) in [0, 1]: the result, at its final size."""
    cut: bool
    """Whether a new scene begins here."""

    @property
    def seconds_left(self) -> float | None:
        """By the present speed; None where the length or the speed is not known."""
        if self.total is None or self.fps <= 0:
            return None
        return max(0, self.total - self.done) / self.fps


class Speed:
    """Frames per second over the last few frames."""

    def __init__(self) -> None:
        self.times = deque([time.monotonic()], maxlen=20)

    def tick(self) -> None:
        """A frame is done."""
        self.times.append(time.monotonic())

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / max(1e-9, self.times[-1] - self.times[0])


@dataclass(frozen=True)
class FrameTime:
    """What is remembered of a frame until its segment is finished; times in ticks of the source."""

    index: int
    start: int
    end: int
