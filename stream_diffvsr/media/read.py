"""Sources of frames: video files, animated pictures and folders of pictures, read one frame at a time.

Each source has `info` and `frames(span)`, which yields every frame of the span with its timestamp and its
index in the whole source. `notes` maps each kind of fault to the number of times it was found.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import VideoError
from . import pictures
from .av_types import Container, Frame, Stream
from .colour import Planes, planes_of
from .containers import check_readable, is_joined, open_container
from .seek import DoubtError, Place, check_counted, count_to, frames_from
from .span import Span
from .streams import (
    DEFAULT_RATE,
    SourceInfo,
    choose_stream,
    describe,
    display_matrix,
    named_frames,
    side_data,
    turned_size,
    upright,
)
from .timeline import MAY_JUMP, UNTIMED, ShownTimes, Timeline

log = logging.getLogger(__name__)

MOST_DELAYED = 40
"""More packets than a decoder buffers before it returns a frame (16 for reordering, plus one per thread)."""


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """One frame of a source, turned upright."""

    index: int
    """Index in the whole source, starting from 0."""
    time: int
    """Presentation timestamp, in ticks of the source's time base."""
    duration: int | None
    pixels: Pixels
    size: tuple[int, int]
    """(height, width)"""
    bits: int = 8
    profile: dict[str, Any] = field(default_factory=dict)
    """Metadata of a picture file, such as its ICC profile and resolution."""
    device: torch.device | str = "cpu"
    """Device on which `rgb` and `alpha` are computed, by the first thread that accesses them."""

    @cached_property
    def _shown(self) -> tuple[Tensor, Tensor | None]:
        return self.pixels.to_rgb(self.device)

    @property
    def rgb(self) -> Tensor:
        """(1, 3, h, w) float32 in [0, 1]."""
        return self._shown[0]

    def thinned(self, step: int) -> Tensor:
        """Return every step-th row and column of `rgb`, which takes only a fraction of the time."""
        return self.pixels.to_rgb(self.device, step)[0]

    @property
    def alpha(self) -> Tensor | None:
        """(1, 1, h, w) float32 in [0, 1]."""
        return self._shown[1]


class Pixels(Protocol):
    """The values from which a frame's RGB and alpha are computed."""

    def to_rgb(self, device: torch.device | str, step: int = 1) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, eq=False)
class Decoded:
    """A video frame's code values and its display matrix."""

    planes: Planes
    matrix: tuple[int, int, int, int] | None

    def to_rgb(self, device: torch.device | str, step: int = 1) -> tuple[Tensor, Tensor | None]:
        if self.matrix is None:
            return self.planes.to_rgb(device, step)
        rgb, alpha = self.planes.to_rgb(device)
        rgb = upright(rgb, self.matrix)[:, :, ::step, ::step]
        return rgb, None if alpha is None else upright(alpha, self.matrix)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A picture that has been read as RGB."""

    rgb: Tensor
    alpha: Tensor | None

    def to_rgb(self, device: torch.device | str, step: int = 1) -> tuple[Tensor, Tensor | None]:
        rgb = self.rgb[:, :, ::step, ::step].to(device)
        return rgb, None if self.alpha is None else self.alpha.to(device)


class Source(Protocol):
    """A source of frames for a job."""

    path: Path
    info: SourceInfo
    notes: Counter[str]

    def frames(self, span: Span, place: Place | None = None) -> Iterator[SourceFrame]:
        """Yield the frames of a span in order; passing the `place` of an earlier frame makes this faster."""
        ...

    def place(self, frame: SourceFrame) -> Place | None:
        """Return the place from which to continue after a frame, or None if seeking would save no time."""
        ...


def open_source(path: Path, stream: int | None = None, rate: Fraction | None = None) -> Source:
    """Open the source at a path: a folder, an animated picture or a video. Raises `VideoError`."""
    check_readable(path)
    if path.is_dir():
        return FolderSource(path, rate or DEFAULT_RATE)
    if stream is None and pictures.is_animated(path):
        return AnimationSource(path)
    return VideoSource(path, stream)


class VideoSource:
    """A video stream of a file, read with PyAV."""

    def __init__(self, path: Path, stream: int | None = None) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        self.packets = 0
        """Packets decoded so far."""
        self._steady, self._captioned, self._reshaped, self._doubted = True, False, False, False
        with open_container(path) as container:
            chosen = choose_stream(container, path, stream)
            self.stream_index, self._named = chosen.index, named_frames(chosen)
            first = next(self._decode(container, chosen), None)
            if first is None:
                raise VideoError(f"{path} has a video stream, but none of its frames can be decoded.")
            self.info = describe(chosen, first)
            self._first = first.pts or 0
            # AVI may count the fields of H.264, in which case a tick is half a frame.
            self._has_durations = container.format.name != "avi"
            if is_joined(path, container.format.name):
                log.warning(
                    "%s consists of several joined files, but only the first is read: upscale the "
                    "others separately",
                    path,
                )
        self.notes.clear()
        if self.info.interlaced:
            log.warning(
                "%s is interlaced: deinterlace it first, or its comb artefacts will be upscaled too", path
            )

    def frames(self, span: Span, place: Place | None = None) -> Iterator[SourceFrame]:
        """Yield the frames of the span; damaged packets are skipped and counted. Raises `VideoError`.

        `place` is the last frame of an earlier run; reading starts there if possible, or else at frame 0.
        """
        index = -1
        for index, time, frame in self._numbered(span, place):
            seconds = (time - self._first) * self.info.time_base
            if span.after(index, seconds):
                return
            if not span.before(index, seconds):
                yield self._convert(frame, index, time)
        # The demuxer skips some damage silently; only this difference reveals it.
        self.notes["frames missing: it has fewer than its index lists"] += max(0, self._named - index - 1)

    def look_at(self, span: Span) -> None:
        """Set the size to that of the span's first frame, because some broadcasts change size midway."""
        for index, time, frame in self._numbered(span, None):
            if not span.before(index, (time - self._first) * self.info.time_base):
                size = turned_size(frame)
                if size != (self.info.width, self.info.height):
                    self.info = replace(self.info, width=size[0], height=size[1])
                break
        self.notes.clear()

    def place(self, frame: SourceFrame) -> Place | None:
        """Return the place from which to continue after a frame; a faulty source's place has no checksum."""
        assert isinstance(frame.pixels, Decoded)
        checksum = frame.pixels.planes.checksum() if self._in_order() else None
        return Place(frame.index, frame.time, checksum)

    def _in_order(self) -> bool:
        return self._steady and not self.notes.total()

    def _numbered(self, span: Span, place: Place | None) -> Iterator[tuple[int, int, Frame]]:
        """Yield index, time and decoded frame, starting mid-file if that does not change the result."""
        index, time = (-1, None) if place is None else (place.index, place.time)
        if span.start if place is None else place.digest is not None:
            try:
                for index, time, frame in self._from_middle(span, place):
                    yield index, time, frame
                return
            except DoubtError as doubt:
                if not self._doubted:
                    log.info("reading %s from the beginning: %s", self.path, doubt)
                self._doubted = True
                self.notes.clear()
        with open_container(self.path) as container:
            clock = Clock(self.info, self.notes)
            for frame in self._decode(container, container.streams[self.stream_index]):
                now = clock.tick(frame.pts)
                if time is None or now > time:
                    index += 1
                    yield index, now, frame

    def _from_middle(self, span: Span, place: Place | None) -> Iterator[tuple[int, int, Frame]]:
        """Yield index, time and frame, from `place` or else from the span's start. Raises `DoubtError`."""
        with open_container(self.path) as container:
            stream = container.streams[self.stream_index]
            times = None
            if place is None:
                place, times = count_to(container, stream, span, self._first, self.info.interlaced)
            frames = frames_from(container, stream, place, self._decode, self._looks)
            clock = Clock(self.info, self.notes, place.time - 1)
            for index, frame in enumerate(frames, place.index):
                if index == place.index:
                    # Ignore damage in frames that follow a key frame but are shown before it, because the
                    # frames to which they refer were not read.
                    self.notes.clear()
                time = clock.tick(frame.pts)
                check_counted(times, index, frame)
                if not self._in_order():
                    raise DoubtError("its data or its timestamps are damaged")
                yield index, time, frame
            if not self._in_order():
                raise DoubtError("it is damaged at the end")

    def _looks(self, frame: Frame) -> int:
        return planes_of(frame, self.info.colour).checksum()

    def _convert(self, frame: Frame, index: int, time: int) -> SourceFrame:
        matrix = display_matrix(frame)
        turned = matrix is not None and matrix[0] == 0
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        if (height, width) != (self.info.height, self.info.width):
            raise VideoError(
                f"frame {index} of {self.path} is {width}x{height}, but the earlier frames are "
                f"{self.info.width}x{self.info.height}: upscale the rest separately, with --start {index} "
                "and another output."
            )
        if not self._captioned and "A53_CC" in side_data(frame):
            self._captioned = True
            log.warning("the output will not contain the closed captions from the video of %s", self.path)
        duration = getattr(frame, "duration", None) or None if self._has_durations else None
        pixels = Decoded(planes_of(frame, self.info.colour), matrix)
        return SourceFrame(index, time, duration, pixels, (height, width), self.info.bits)

    def _packets(self, container: Container, stream: Stream) -> Iterator[Any]:
        """Yield the stream's packets on one continuous timeline, for as long as the file can be read."""
        import av

        line = Timeline(container)
        packets = container.demux(line.streams(container, stream))
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                self.notes["unreadable parts of the file"] += 1
                log.warning("%s cannot be read to the end (%s)", self.path, error)
                return
            if packet is None:
                return
            self.notes["jumps in its timestamps removed"] += line.straighten(packet)
            if packet.stream.index == stream.index:
                self.packets += 1
                # If a frame has no timestamp, its time is estimated from the frames before it.
                self._steady &= not packet.size or packet.pts is not None
                yield packet

    def _decode(self, container: Container, stream: Stream) -> Iterator[Any]:
        """Yield every frame that can be decoded."""
        import av

        untimed, counted = bool(container.format.flags & UNTIMED), container.format.name in ("avi", "asf")
        shown = ShownTimes(by_order=counted)
        decode = alpha_decoder(stream) or (lambda packet: packet.decode())
        # Only in `MAY_JUMP` formats can a stream's codec change; in others, many packets show no picture.
        may_change, shape, idle = bool(container.format.flags & MAY_JUMP), None, 0
        for packet in self._packets(container, stream):
            # AVI and WMV files store one time per packet, in decoding order.
            time = packet.dts if counted or packet.pts is None else packet.pts
            if packet.size and not packet.is_discard:
                shown.read(time)
            try:
                frames = decode(packet)
            except av.FFmpegError:
                self.notes["damaged packets skipped"] += 1
                shown.lose(time)
                continue
            if frames or not packet.size:
                lost, idle = idle if packet.size else idle - len(frames), 0
                if lost > MOST_DELAYED:
                    self.notes["packets without a picture skipped: the codec may change midway"] += lost
            else:
                # A decoder accepts another codec's packets without an error.
                idle += may_change and not packet.is_discard
            self.notes["damaged frames used"] += sum(frame.is_corrupt for frame in frames)
            if frames and shape != (now := stream.codec_context.sample_aspect_ratio):
                if shape is not None and not self._reshaped:
                    self._reshaped = True
                    log.warning(
                        "the pixel aspect ratio of %s changes from %s to %s; the output keeps that of the "
                        "first frame",
                        *(self.path, shape, now),
                    )
                shape = now
            for frame in frames:
                frame.pts = None if untimed else shown.show(frame.pts)
                self._steady &= counted or not shown.by_order
                yield frame


def alpha_decoder(stream: Stream) -> Any:
    """Return a function that decodes WebM's alpha packets, or None if alpha is absent or unsupported.

    FFmpeg's own decoders ignore alpha.
    """
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) != "1":
        return None
    try:
        decoder: Any = av.CodecContext.create(name, "r")
    except ValueError:
        log.warning(
            "the transparency of stream %d is ignored because this version of PyAV lacks %s",
            stream.index,
            name,
        )
        return None
    return lambda packet: decoder.decode(packet if packet.size else None)


class Clock:
    """Produces timestamps that increase with every frame, as encoders require."""

    def __init__(self, info: SourceInfo, notes: Counter[str], last: int | None = None) -> None:
        self.step = max(1, round(1 / (info.rate * info.time_base)))
        # MP4 stores a frame's duration in 31 bits of ticks, with at least 10,000 ticks per second.
        self.longest = int((2**31 - 1) / max(1, 20_000 * info.time_base))
        self.notes = notes
        self.last = last
        self.timed = info.timed

    def tick(self, pts: int | None) -> int:
        """Return the next frame's time: its own timestamp if the increase is plausible, else an estimate."""
        if self.last is None:
            self.last = pts or 0
            return self.last
        if pts is None or not 0 < pts - self.last <= self.longest:
            self.notes["timestamps missing or out of order"] += self.timed
            pts = self.last + (1 if pts is not None and pts <= self.last else self.step)
        self.last = pts
        return pts


class AnimationSource:
    """An animated GIF, WebP, PNG or AVIF file, read with Pillow; times are in milliseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        count, (width, height), milliseconds, has_alpha = pictures.describe_animation(path)
        rate = Fraction(1000 * count, max(1, milliseconds))
        self.info = SourceInfo(width, height, 8, Fraction(1, 1000), rate, count, has_alpha=has_alpha)

    def place(self, frame: SourceFrame) -> Place | None:
        """Return None, because seeking would save no time."""
        return None

    def frames(self, span: Span, place: Place | None = None) -> Iterator[SourceFrame]:
        """Yield the frames of the span."""
        time = 0
        for index, (picture, milliseconds) in enumerate(pictures.read_animation(self.path)):
            seconds = Fraction(time, 1000)
            if span.after(index, seconds):
                return
            if not span.before(index, seconds):
                size = (picture.rgb.shape[-2], picture.rgb.shape[-1])
                yield SourceFrame(index, time, milliseconds, Loaded(picture.rgb, picture.alpha), size)
            time += milliseconds


class FolderSource:
    """A folder of pictures in natural order, or a single picture, read as the frames of a video."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path = path
        self.notes: Counter[str] = Counter()
        self.files = [path]
        if path.is_dir():
            self.files = pictures.list_folder(path)
            pictures.say_left_out(path)
        first = pictures.read(self.files[0])
        height, width = first.rgb.shape[-2:]
        self.info = SourceInfo(
            width, height, first.bits, 1 / rate, rate, len(self.files), has_alpha=first.alpha is not None
        )

    def place(self, frame: SourceFrame) -> Place | None:
        """Return None, because seeking would save no time."""
        return None

    def frames(self, span: Span, place: Place | None = None) -> Iterator[SourceFrame]:
        """Yield the frames of the span."""
        for index, file in enumerate(self.files):
            seconds = index * self.info.time_base
            if not span.before(index, seconds) and not span.after(index, seconds):
                picture = pictures.read(file)
                size = (picture.rgb.shape[-2], picture.rgb.shape[-1])
                pixels = Loaded(picture.rgb, picture.alpha)
                yield SourceFrame(index, index, 1, pixels, size, picture.bits, picture.profile)
