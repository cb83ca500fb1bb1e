"""Where frames come from: video files, animated pictures, folders of pictures; one frame at a time.

Each source has `info` and `frames(span)`, which yields every frame of the span with its place in the
whole source and its timestamp. What was repaired on the way is counted in `notes`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import VideoError
from . import pictures
from .colour import BT709, FULL_RANGE, LIMITED_RANGE, RGB, UNSPECIFIED, Colour, frame_to_rgb
from .span import Span

log = logging.getLogger(__name__)

DEFAULT_RATE = Fraction(25)
"""Frames per second where nothing says otherwise: folders of pictures."""


@dataclass(frozen=True)
class SourceInfo:
    """What is known before the first frame is upscaled; sizes are those of the upright picture."""

    width: int
    height: int
    bits: int
    time_base: Fraction
    """Seconds per tick of the timestamps."""
    rate: Fraction
    """Nominal frames per second."""
    frames: int | None
    """Number of frames, as far as the file says."""
    colour: Colour = Colour(RGB, True, BT709, BT709)  # noqa: RUF009
    aspect: Fraction | None = None
    """Width of a sample by its height, where it is said and is not 1."""
    has_alpha: bool = False
    interlaced: bool = False
    side_data: dict[str, bytes] = field(default_factory=dict)
    """HDR10 data of the first frame, by name, as FFmpeg lays it out."""


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """One upright frame of a source."""

    index: int
    """Place in the whole source, from 0."""
    time: int
    """Presentation timestamp, in ticks of the source's time base."""
    duration: int | None
    rgb: Tensor
    """(1, 3, h, w) float32 in [0, 1]."""
    alpha: Tensor | None = None
    """(1, 1, h, w) float32 in [0, 1]."""
    bits: int = 8
    profile: dict[str, Any] = field(default_factory=dict)
    """What a picture file takes along: its ICC profile, its resolution."""


class Source(Protocol):
    """What the job reads from."""

    path: Path
    info: SourceInfo
    notes: Counter[str]

    def frames(self, span: Span) -> Iterator[SourceFrame]:
        """The frames of a span, in order."""
        ...


def open_source(path: Path, stream: int | None = None, rate: Fraction | None = None) -> Source:
    """The source at a path: a folder, an animated picture, or a video. Raises `VideoError`."""
    check_readable(path)
    if path.is_dir():
        return FolderSource(path, rate or DEFAULT_RATE)
    if stream is None and pictures.is_animated(path):
        return AnimationSource(path)
    return VideoSource(path, stream)


def check_readable(path: Path) -> None:
    """Say plainly why a path cannot be read."""
    if not path.exists():
        raise VideoError(f"{path} does not exist: check the path.")
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if empty:
        raise VideoError(f"{path} is empty: copy or download it again.")


class VideoSource:
    """A video stream of a file, through PyAV."""

    def __init__(self, path: Path, stream: int | None = None) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        with open_container(path) as container:
            chosen = choose_stream(container, path, stream)
            self.stream_index = chosen.index
            first = next(self._decode(container, chosen), None)
            if first is None:
                raise VideoError(f"{path} has a video stream, but no frame of it can be decoded.")
            self.info = describe(chosen, first)
        self.notes.clear()
        if self.info.interlaced:
            log.warning("%s is interlaced: deinterlace it first, combed lines are upscaled as they are", path)

    def frames(self, span: Span) -> Iterator[SourceFrame]:
        """The frames of the span; damaged packets are skipped and counted. Raises `VideoError`."""
        with open_container(self.path) as container:
            stream = container.streams[self.stream_index]
            clock = Clock(self.info, self.notes)
            index = -1
            for index, frame in enumerate(self._decode(container, stream)):
                time = clock.tick(frame.pts)
                seconds = (time - clock.first) * self.info.time_base
                if span.after(index, seconds):
                    return
                if not span.before(index, seconds):
                    yield self._convert(frame, index, time)
            # Damage that the demuxer steps over by itself shows only here.
            self.notes["frames fewer than its index names"] += max(0, stream.frames - index - 1)

    def _convert(self, frame: Any, index: int, time: int) -> SourceFrame:
        rgb, alpha = frame_to_rgb(frame, self.info.colour)
        matrix = display_matrix(frame)
        rgb, alpha = upright(rgb, matrix), None if alpha is None else upright(alpha, matrix)
        if rgb.shape[-2:] != (self.info.height, self.info.width):
            raise VideoError(
                f"frame {index} of {self.path} is {rgb.shape[-1]}x{rgb.shape[-2]}, the video began with "
                f"{self.info.width}x{self.info.height}: split it there, with --end {index - 1}."
            )
        duration = getattr(frame, "duration", None) or None
        return SourceFrame(index, time, duration, rgb, alpha, self.info.bits)

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        """Every frame that can be decoded."""
        import av

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                self.notes["places where the file cannot be read"] += 1
                log.warning("%s cannot be read to its end (%s)", self.path, error)
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.notes["damaged packets skipped"] += 1
                continue
            self.notes["damaged frames used"] += sum(frame.is_corrupt for frame in frames)
            yield from frames


class Clock:
    """Timestamps that rise with every frame, as encoders need them."""

    def __init__(self, info: SourceInfo, notes: Counter[str]) -> None:
        self.step = max(1, round(1 / (info.rate * info.time_base)))
        self.notes = notes
        self.first = 0
        self.last: int | None = None

    def tick(self, pts: int | None) -> int:
        """The next frame's time: its own where it has one that rises."""
        if self.last is None:
            self.first = self.last = pts or 0
            return self.last
        if pts is None or pts <= self.last:
            self.notes["timestamps missing or not rising"] += 1
            pts = self.last + (self.step if pts is None else 1)
        self.last = pts
        return pts


class AnimationSource:
    """An animated GIF, WebP or PNG, through Pillow; times in milliseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        count, (width, height), milliseconds, has_alpha = pictures.describe_animation(path)
        rate = Fraction(1000 * count, max(1, milliseconds))
        self.info = SourceInfo(width, height, 8, Fraction(1, 1000), rate, count, has_alpha=has_alpha)

    def frames(self, span: Span) -> Iterator[SourceFrame]:
        """The frames of the span."""
        time = 0
        for index, (picture, milliseconds) in enumerate(pictures.read_animation(self.path)):
            seconds = Fraction(time, 1000)
            if span.after(index, seconds):
                return
            if not span.before(index, seconds):
                yield SourceFrame(index, time, milliseconds, picture.rgb, picture.alpha)
            time += milliseconds


class FolderSource:
    """A folder of pictures in natural order, as the frames of a video; or one picture."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        self.files = pictures.list_folder(path) if path.is_dir() else [path]
        first = pictures.read(self.files[0])
        height, width = first.rgb.shape[-2:]
        self.info = SourceInfo(
            width, height, first.bits, 1 / rate, rate, len(self.files), has_alpha=first.alpha is not None
        )

    def frames(self, span: Span) -> Iterator[SourceFrame]:
        """The frames of the span."""
        for index, file in enumerate(self.files):
            seconds = index * self.info.time_base
            if not span.before(index, seconds) and not span.after(index, seconds):
                picture = pictures.read(file)
                yield SourceFrame(index, index, 1, picture.rgb, picture.alpha, picture.bits, picture.profile)


def open_container(path: Path) -> Any:
    """An open `av` container for reading; raises `VideoError` with the reason."""
    import av

    try:
        return av.open(str(path), metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(
            f"{path} cannot be opened as a video or picture ({reason}): it is damaged, incomplete, or "
            "something else."
        ) from error


def choose_stream(container: Any, path: Path, wanted: int | None) -> Any:
    """The video stream to upscale: the one asked for by its index in the file, else the best."""
    videos = [s for s in container.streams.video if s.codec_context is not None and not is_cover(s)]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"{path} has no video stream that can be decoded, it holds {kinds}.")
    if wanted is None:
        return max(videos, key=lambda s: (s.width * s.height, s.frames, -s.index))
    for stream in videos:
        if stream.index == wanted:
            return stream
    known = ", ".join(f"{s.index} ({s.width}x{s.height})" for s in videos)
    raise VideoError(f"{path} has no video stream {wanted}; its video streams are {known}.")


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a cover picture of an audio file."""
    disposition = stream.disposition
    return bool(disposition & type(disposition).attached_pic)


def describe(stream: Any, frame: Any) -> SourceInfo:
    """What a stream and its first frame say about themselves."""
    context = stream.codec_context
    matrix = display_matrix(frame)
    turned = matrix is not None and matrix[0] == 0
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
    length = stream.duration * stream.time_base if stream.duration else None
    if length is None and stream.container.duration:
        length = Fraction(stream.container.duration, 1_000_000)
    aspect = stream.sample_aspect_ratio or None
    return SourceInfo(
        width=width,
        height=height,
        bits=max(c.bits for c in frame.format.components),
        time_base=stream.time_base,
        rate=rate,
        frames=stream.frames or (round(length * rate) if length else None),
        colour=colour_of(frame, context),
        aspect=None if aspect in (None, 1) else (1 / aspect if turned else aspect),
        has_alpha=frame.format.components[-1].is_alpha or frame.format.has_palette,
        interlaced=bool(frame.interlaced_frame),
        side_data=hdr_data(frame),
    )


def colour_of(frame: Any, context: Any) -> Colour:
    """The colour tags of a stream, with what is missing filled in."""
    if frame.format.is_rgb or frame.format.has_palette:
        return Colour(RGB, True, BT709, BT709)
    said = int(frame.color_range)
    # Grey without a word about its range is full range in FFmpeg, which wrote most of it.
    grey = len(frame.format.components) < 3 and said != LIMITED_RANGE
    full = said == FULL_RANGE or grey or frame.format.name.startswith("yuvj")
    tags = [int(value) or UNSPECIFIED for value in (context.color_primaries, context.color_trc)]
    matrix = int(frame.colorspace) or UNSPECIFIED
    return Colour(matrix, full, *tags).resolved(frame.height)


HDR_DATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")


def hdr_data(frame: Any) -> dict[str, bytes]:
    """HDR10 side data of a frame."""
    return {data.type.name: bytes(data) for data in frame.side_data if data.type.name in HDR_DATA}


def display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The signs (a, b, c, d) of the frame's display matrix, None where it is upright.

    A pixel (x, y) is shown at (a x + c y, b x + d y); only quarter turns and mirrors count.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            import numpy as np

            values = np.frombuffer(bytes(data), np.int32)
            a, b, c, d = (int(np.sign(values[i]) if abs(values[i]) > 1 << 15 else 0) for i in (0, 1, 3, 4))
            upright = (a, b, c, d) == (1, 0, 0, 1)
            return None if upright or abs(a * d - b * c) != 1 else (a, b, c, d)
    return None


def upright(x: Tensor, matrix: tuple[int, int, int, int] | None) -> Tensor:
    """Turn and mirror (1, C, h, w) as a display matrix says."""
    if matrix is None:
        return x
    a, b, c, d = matrix
    if a == 0:
        x, (a, d) = x.transpose(-1, -2), (c, b)
    mirrored = [axis for axis, sign in ((-1, a), (-2, d)) if sign < 0]
    return (x.flip(mirrored) if mirrored else x).contiguous()
