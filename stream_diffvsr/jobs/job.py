"""The settings of a job, and the progress that it reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import VideoError
from ..fidelity import COLOUR_FIXES, apply_fidelity
from ..media.codecs import CODECS
from ..media.sizes import Sizes, enlarge, resize
from ..media.span import Span, parse_position
from ..options import check_options, option
from ..tensors import SCALE, to_pixels
from ..upscaler import Info, Provenance, State

SIZE = "size of the output"
"""Title of the group of flags that set the output's size."""
SLOWEST, FASTEST = Fraction(1, 1000), 1000
"""Limits of a picture folder's frame rate, in frames per second."""
MOST = 65535
"""Maximum number of pixels per side that picture formats can store."""


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size such as `1920x1080` into width and height."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and max(int(width), int(height)) <= MOST):
        raise VideoError(
            f"the size must look like 1920x1080, with sides of at most {MOST} pixels, not {text!r}."
        )
    return int(width), int(height)


def parse_rate(text: str) -> Fraction:
    """Parse a frame rate such as `25`, `29.97` or `30000/1001`; raises `ValueError` or `ArithmeticError`."""
    # Parse exponents as floats: a Fraction would expand a large one into a huge whole number.
    rate = Fraction(float(text) if "e" in text.lower() else text).limit_denominator(100_000)
    if not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"the frame rate must be between {SLOWEST} and {FASTEST}, not {text}")
    return rate


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """What to upscale, where to write the result, and how. Immutable; paths are checked when the job runs."""

    source: Path
    """A video, an animated GIF, WebP or PNG, a picture, or a folder of pictures."""
    output: Path
    """A file (.mp4, .mov, .mkv or .webm, or a picture if the source is one), or a folder of pictures."""
    options: Any = None
    """Options of the model's family; None for its defaults."""
    model_scale: float = SCALE
    """Factor by which the model enlarges a frame; set by `settle_job`."""
    state: State | None = None
    """State to continue from; None starts a new sequence, whose frames are numbered like the source's."""
    state_out: Path | None = option(
        None, "Save the state after the last frame to this file.", parse=Path, metavar="FILE"
    )
    start: int | Fraction | str = option(
        0,
        "First frame to upscale: a frame number, counted from 0, or a time such as 12.5s or hh:mm:ss.",
        parse=parse_position,
        group="input",
        metavar="POSITION",
    )
    """A frame index, or seconds as a Fraction; text is parsed as on the command line."""
    end: int | Fraction | str | None = option(
        None,
        "Last frame to upscale, inclusive.",
        parse=parse_position,
        group="input",
        metavar="POSITION",
        unset_help="the last frame",
    )
    stream: int | None = option(
        None,
        "Index of the video stream in the file.",
        kind=int,
        low=0,
        group="input",
        metavar="N",
        unset_help="the largest",
    )
    rate: Fraction | None = option(
        None,
        "Frame rate of a folder of pictures, from 1/1000 to 1000 frames per second.",
        parse=parse_rate,
        flag="fps",
        group="input",
        metavar="FRAMES_PER_SECOND",
        unset_help="25",
    )
    pre_scale: float = option(
        1.0,
        "Shrink the input to this fraction of its size before upscaling.",
        low=0.01,
        high=1.0,
        group=SIZE,
        metavar="FRACTION",
    )
    target: tuple[int, int] | None = option(
        None,
        "Exact width and height of the output.",
        parse=parse_size,
        group=SIZE,
        metavar="WxH",
        unset_help="4x",
    )
    """Width and height of the output; at most one of target, short_edge and scale may be set."""
    short_edge: int | None = option(
        None,
        "Length of the output's shorter side, in pixels.",
        kind=int,
        low=2,
        high=MOST,
        group=SIZE,
        metavar="N",
    )
    scale: float | None = option(
        None,
        "Size of the output as a multiple of the input's size.",
        kind=float,
        low=0.01,
        high=100,
        group=SIZE,
        metavar="FACTOR",
    )
    colour_fix: str = option(
        "model",
        "How to treat colours. model: as the model produces them. none: like model, but without the "
        "correction built into FlashVSR. lab: broad hue and saturation from the source, brightness from the "
        "model. wavelet: broad colours from the source, details from the model. adain: mean and contrast of "
        "each channel from the source, which adds some flicker in panning shots.",
        choices=COLOUR_FIXES,
        group="output",
        expert=True,
    )
    strength: float = option(
        1.0,
        "How much of the model's detail to use: 0 is plain bicubic, 1 is the model's own result, and higher "
        "values exaggerate the detail. The next frame is always guided by the model's own result.",
        low=0.0,
        high=1.5,
        step=0.05,
        group="output",
        expert=True,
        metavar="PART",
    )
    codec: str | None = option(
        None,
        "Codec of the video file. ffv1 and png are lossless.",
        kind=str,
        choices=CODECS,
        group="output",
        unset_help="h264, or av1 for WebM",
    )
    crf: int | None = option(
        None,
        "Quality of the video file: lower numbers mean better quality and larger files. The range is 0 to 51 "
        "for h264 and h265, and 0 to 63 for av1; prores, ffv1 and png have no such setting.",
        kind=int,
        group="output",
        metavar="N",
        unset_help="18, or 24 for av1",
    )
    pix_fmt: str | None = option(
        None,
        "Pixel format of the video file, such as yuv420p10le.",
        kind=str,
        unset="auto",
        group="output",
        metavar="NAME",
        unset_help="the bit depth of the source, with 4:2:0 if the codec supports it",
    )
    scene_cut: str = option(
        "auto",
        "How to detect scenes (the model starts each of them afresh): auto, off, a threshold "
        "from 0 to 255 (auto uses 27), or a CSV file that lists the first frame of each scene.",
        group="input",
        metavar="HOW",
    )
    cuts_out: Path | None = option(
        None, "Write a list of the scenes to this CSV file.", parse=Path, group="input", metavar="FILE"
    )
    segment_frames: int | None = option(
        None,
        "Frames per segment; at most this many are lost in a crash.",
        kind=int,
        low=1,
        flag="segment",
        group="output",
        expert=True,
        metavar="N",
        unset_help="as many as can be upscaled in about a minute, at most 120",
    )
    read_ahead: int = option(
        4,
        "Number of frames to decode in advance. This does not affect the result.",
        low=1,
        group="input",
        expert=True,
        metavar="N",
    )
    audio: bool = option(True, "Copy audio and subtitles.", group="output")
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata to write to the output in addition to the source's."""
    overwrite: bool = option(False, "Replace existing output files.")
    restart: bool = option(False, "Discard the unfinished work of an earlier run.")
    compare: Path | None = option(
        None,
        "Also write a split-screen video: bicubic on the left, the result on the right.",
        parse=Path,
        group="output",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("source", "output", "state_out", "cuts_out", "compare"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_position(value))

    @property
    def sizes(self) -> Sizes:
        """The requested sizes."""
        return Sizes(self.pre_scale, self.target, self.short_edge, self.scale, self.model_scale)

    def finished(self, hq: Tensor, lq: Tensor, source: tuple[int, int]) -> Tensor:
        """Apply the colour fix, strength and size to the model's result; return (1, 3, H, W) in [0, 1].

        `lq`, (1, 3, h, w) in [0, 1], is the model's input; `source` is the (height, width) before resizing.
        """
        hq = to_pixels(hq)
        if self.colour_fix not in ("model", "none") or self.strength != 1:
            lq_up = enlarge(lq.to(hq.device), (hq.shape[-2], hq.shape[-1]))
            hq = apply_fidelity(hq, lq_up, self.colour_fix, self.strength)
        return resize(hq, self.sizes.output(*source))

    @property
    def span(self) -> Span:
        """The frames to upscale."""
        return Span(self.start, self.end)  # type: ignore[arg-type]


def settle_job(job: VideoJob, info: Info, options: type, height: int, width: int) -> VideoJob:
    """Return a copy of the job, filling in the values that depend on the model and the source's size.

    A family that supports any scale produces the requested size itself, so nothing is resampled afterwards.
    """
    own = options() if job.options is None else job.options
    if job.colour_fix != "model" and hasattr(own, "colour_fix"):
        own = replace(own, colour_fix="none")
    if info.scales is not None:
        return replace(job, options=own, model_scale=info.scales[0])
    asked = (job.target, job.short_edge, job.scale) != (None, None, None)
    scale, stretch = job.sizes.model_scale_for(height, width) if asked else (own.scale, own.stretch)
    return replace(job, options=replace(own, scale=scale, stretch=stretch), model_scale=scale)


@dataclass(frozen=True, eq=False)
class JobProgress:
    """Progress of a job, reported after every frame."""

    done: int
    """Number of frames done, including those from earlier runs."""
    total: int | None
    """Number of frames in the job; None if unknown."""
    fps: float
    """Frames per second, over the last few frames of this run."""
    segment: int
    """Number of the segment, counted from 0."""
    index: int
    """The frame's index in the source."""
    lq: Tensor
    """The model's input, (1, 3, h, w) in [0, 1]."""
    hq: Tensor
    """The result at its final size, (1, 3, H, W) in [0, 1]."""
    cut: bool
    """Whether the frame begins a new scene."""
    how: Provenance | None = None
    """How the frame was made; None between borders if the model reports it only at borders."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the current speed; None if the length or the speed is unknown."""
        if self.total is None or self.fps <= 0:
            return None
        return max(0, self.total - self.done) / self.fps


class Speed:
    """Frames per second over the last few frames."""

    def __init__(self) -> None:
        self.times = deque([time.monotonic()], maxlen=20)

    def tick(self) -> None:
        """Record that a frame is done."""
        self.times.append(time.monotonic())

    @property
    def count(self) -> int:
        """Number of frames over which the speed is measured."""
        return len(self.times) - 1

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / max(1e-9, self.times[-1] - self.times[0])


@dataclass(frozen=True)
class FrameTime:
    """Index and times of a frame, kept until its segment is finished; times are in the source's ticks."""

    index: int
    start: int
    end: int
