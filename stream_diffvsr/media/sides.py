"""Sound and subtitles of a source, made ready before the first frame is upscaled: each in a file of its own.

A stream is copied where the output's container takes it, else converted, else left out, each of which is
logged. It is written whole, to the container's trailer, since some containers refuse only there. Putting
the output together later takes packets that have been through it once already.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from .read import open_container
from .streams import is_cover
from .texts import KNOWN, translate
from .timeline import Timeline
from .tracks import Window, kept_words

log = logging.getLogger(__name__)

SOUND_CODECS = {"mp4": "aac", "mov": "aac", "matroska": "flac", "webm": "libopus"}
TEXT_CODECS = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
"""What sound and text are converted to, by container."""
NO_TEXT = b"\0\0"
"""A gap between subtitles in MP4, which the muxer fills by itself."""
EMPTY_SRT = b"1\n00:00:00,000 --> 00:00:01,000\n \n"
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")
"""FFmpeg's default channel layout, by the number of channels less one."""
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors that have nothing to do with what is written."""


class RefusedError(Exception):
    """A container or codec does not take a stream."""


@dataclass(frozen=True)
class Side:
    """One stream beside the picture, whole, in a file of the output's container."""

    path: Path
    index: int
    """Of the stream in the source."""
    origin: int
    """Seconds that were taken off its times, so that none is negative."""
    first: Fraction
    """When it is first heard or seen, in seconds of the source."""


class refusals:  # noqa: N801
    """A `with` block in which PyAV's errors become `RefusedError`, but for those of the disk."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import av

        if isinstance(error, (av.FFmpegError, ValueError, RuntimeError, OverflowError)):
            if getattr(error, "errno", None) in DISK_ERRORS:
                return
            raise RefusedError(getattr(error, "strerror", None) or str(error)) from error


class Way(Protocol):
    """How the packets of a stream are written."""

    name: str
    first: Fraction | None
    """When the first of it is heard, where only this way of writing knows."""

    def feed(self, packet: Any) -> Iterable[Any]:
        """The packets that one of the source becomes."""
        ...

    def drain(self) -> Iterable[Any]:
        """What is left at the end."""
        ...


class Copied:
    """Packets as they are."""

    name, first = "", None

    def __init__(self, out: Any, stream: Any) -> None:
        self.stream = add_copy(out, stream)
        self.texts = stream.type == "subtitle"

    def feed(self, packet: Any) -> Iterable[Any]:
        if self.texts and bytes(packet) == NO_TEXT:
            return ()
        packet.stream = self.stream
        return (packet,)

    def drain(self) -> Iterable[Any]:
        return ()


class Translated:
    """Text subtitles in another container's form."""

    first = None

    def __init__(self, out: Any, stream: Any) -> None:
        import av

        self.before, self.name = stream.codec_context.name, TEXT_CODECS[out.format.name.split(",")[0]]
        if self.before not in KNOWN:
            raise RefusedError("it is no text that can be translated")
        if hasattr(out, "add_mux_stream"):
            self.stream = out.add_mux_stream(self.name, time_base=stream.time_base)
            return
        if self.name != "subrip":
            # Older PyAV opens an encoder for every new stream, which subtitles do not have there.
            raise RefusedError("this PyAV cannot translate it: update the package av")
        with av.open(io.BytesIO(EMPTY_SRT), format="srt") as text:
            self.stream = out.add_stream_from_template(text.streams[0], opaque=True)

    def feed(self, packet: Any) -> Iterable[Any]:
        import av

        if not (text := translate(bytes(packet), self.before, self.name)):
            return ()
        converted = av.Packet(text)
        converted.pts = converted.dts = packet.pts
        converted.duration, converted.time_base = packet.duration, packet.time_base
        converted.stream = self.stream
        return (converted,)

    def drain(self) -> Iterable[Any]:
        return ()


class Encoded:
    """Sound in another codec. The encoder opens with the first frame, which knows its rate and layout."""

    def __init__(self, out: Any, stream: Any, layout: str | None = None) -> None:
        self.out, self.layout, self.stream = out, layout, None
        self.name = SOUND_CODECS[out.format.name.split(",")[0]]
        self.first: Fraction | None = None
        self.resampler: Any = None
        self.kind: tuple[Any, ...] = ()

    def _open(self, frame: Any, layout: str) -> None:
        rates = self.out.add_stream(self.name, rate=frame.sample_rate or 48000)
        self.stream, context = rates, rates.codec_context
        known = context.codec.audio_rates or [frame.sample_rate]
        rate = frame.sample_rate if frame.sample_rate in known else 48000
        context.rate, context.layout, context.time_base = rate, self.layout or layout, Fraction(1, rate)
        formats = [f.name for f in context.codec.audio_formats or []]
        context.format = frame.format.name if frame.format.name in formats else (formats or ["s16"])[0]
        # 24 bits and more stay so where the codec has them.
        if "s32" in formats and frame.format.name.startswith(("s32", "flt", "dbl")):
            context.format = "s32"

    def feed(self, packet: Any) -> Iterable[Any]:
        import av

        try:
            frames = packet.decode()
        except av.FFmpegError:
            return
        for frame in frames:
            layout = named_layout(frame.layout)
            if frame.layout.name != layout:
                frame = with_layout(frame, layout)
            if self.stream is None:
                self._open(frame, layout)
                self.first = None if frame.pts is None else frame.pts * frame.time_base
            kind = (frame.format.name, layout, frame.sample_rate)
            if kind != self.kind:
                yield from self._rest()
                context = self.stream.codec_context  # type: ignore[attr-defined]
                self.resampler = av.AudioResampler(context.format, context.layout, context.rate)
                self.kind = kind
            for even in self.resampler.resample(frame):
                yield from self.stream.encode(even)  # type: ignore[attr-defined]

    def _rest(self) -> Iterator[Any]:
        for even in self.resampler.resample(None) if self.resampler else ():
            yield from self.stream.encode(even)  # type: ignore[attr-defined]

    def drain(self) -> Iterable[Any]:
        if self.stream is not None:
            yield from self._rest()
            yield from self.stream.encode(None)


def named_layout(layout: Any) -> str:
    """A layout's name; the default for the count of channels where the file does not say."""
    count = getattr(layout, "nb_channels", 0) or len(layout.channels)
    return LAYOUTS[count - 1] if layout.name == f"{count} channels" and count <= len(LAYOUTS) else layout.name


def with_layout(frame: Any, layout: str) -> Any:
    """The same samples under another layout."""
    import av

    named = av.AudioFrame(frame.format.name, layout, frame.samples)
    named.sample_rate, named.pts, named.time_base = frame.sample_rate, frame.pts, frame.time_base
    for ours, theirs in zip(named.planes, frame.planes, strict=True):
        ours.update(bytes(theirs)[: ours.buffer_size].ljust(ours.buffer_size, b"\0"))
    return named


def add_copy(out: Any, stream: Any) -> Any:
    """A stream of the output for another's packets; sound gets the layout that its file left out."""
    copy = out.add_stream_from_template(stream, opaque=True)
    if stream.type == "audio" and (layout := named_layout(stream.layout)) != stream.layout.name:
        copy.codec_context.layout = layout
    return copy


class Making:
    """One stream being written in one way."""

    def __init__(self, stream: Any, way: Any, path: Path, container_format: str) -> None:
        import av

        self.index, self.path, self.origin = stream.index, path, 0
        self.first: Fraction | None = None
        self.last: int | None = None
        scale = stream.rate or 1000 if stream.type == "audio" else 1000
        options = {"movie_timescale": str(scale)} if container_format in ("mp4", "mov") else {}
        with refusals():
            self.out = av.open(str(path.absolute()), "w", format=container_format, container_options=options)
            self.way: Way = way(self.out, stream)

    def feed(self, packet: Any) -> None:
        """Write what a packet of the source becomes. Raises `RefusedError`."""
        packet.pts = packet.dts if packet.pts is None else packet.pts
        packet.dts = packet.pts if packet.dts is None else packet.dts
        if packet.pts is not None:
            with refusals():
                self._write(self.way.feed(packet))

    def _write(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            base = packet.time_base
            if self.first is None:
                self.origin = math.floor(packet.dts * base)
                heard = packet.pts * base + skipped(packet)
                self.first = heard if self.way.first is None else self.way.first
            shift = round(self.origin / base)
            packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
            self.last = rise(packet, self.last)
            self.out.mux(packet)

    def finish(self) -> Side | None:
        """The finished file, None where there was nothing to write. Raises `RefusedError`."""
        with refusals():
            self._write(self.way.drain())
            if self.first is not None:
                self.out.close()
                return Side(self.path, self.index, self.origin, self.first)
        self.drop()
        return None

    def drop(self) -> None:
        """Leave nothing behind."""
        with suppress(Exception):
            self.out.close()
        self.path.unlink(missing_ok=True)


def rise(packet: Any, last: int | None) -> int:
    """Set decoding times that rise, as muxers need them; returns the packet's."""
    if last is not None and packet.dts <= last:
        packet.dts = last + 1
    packet.pts = max(packet.pts, packet.dts)
    return packet.dts


def skipped(packet: Any) -> Fraction:
    """Seconds at a packet's begin that are not heard: what an encoder put before the sound."""
    context = packet.stream.codec_context if packet.stream is not None else None
    rate = getattr(context, "rate", 0)
    if not rate or not hasattr(packet, "has_sidedata") or not packet.has_sidedata("skip_samples"):
        return Fraction(0)
    return Fraction(int.from_bytes(bytes(packet.get_sidedata("skip_samples"))[:4], "little"), rate)


def ways_of(stream: Any) -> list[Any]:
    """The ways to write a stream, the best first."""
    if stream.type == "subtitle":
        return [Copied, Translated]
    return [Copied, Encoded, lambda out, stream: Encoded(out, stream, "stereo")]


def make_sides(source: Path, container_format: str, folder: Path) -> list[Side]:
    """Files `joined-side<stream>` in a folder with the sound and the subtitles of a source, for a container.

    What is converted or left out is logged. Raises `VideoError` for a source that cannot be opened, and
    `OSError` where the disk fails.
    """
    with open_container(source) as original:
        wanted = [s for s in original.streams if s.type in ("audio", "subtitle") and s.codec_context]
        say_what_is_lost(original, container_format)
        ways = {stream.index: ways_of(stream) for stream in wanted}
        names = {
            stream.index: f"{stream.type} stream {stream.index} ({stream.codec_context.name})"
            for stream in wanted
        }
    done: dict[int, Side | None] = {}
    reasons: dict[int, str] = {}
    while left := {index: rest[0] for index, rest in ways.items() if rest and index not in done}:
        makings = _one_reading(source, container_format, folder, left, reasons)
        for index, making in makings.items():
            name = making.way.name
            try:
                done[index] = making.finish()
            except RefusedError as refused:
                reasons.setdefault(index, str(refused))
                making.drop()
                continue
            if done[index] is None:
                log.warning("%s is left out: it holds nothing that can be decoded", names[index])
            elif name:
                log.warning(
                    "%s is converted to %s: %s cannot hold it (%s); %s",
                    names[index],
                    name,
                    container_format,
                    reasons.get(index),
                    keeps(container_format),
                )
        for index in left:
            ways[index] = ways[index][1:]
    for index in sorted(set(ways) - set(done)):
        log.warning(
            "%s is left out: %s cannot hold it (%s); %s",
            names[index],
            container_format,
            reasons.get(index),
            keeps(container_format),
        )
    return [side for _, side in sorted(done.items()) if side is not None]


def say_what_is_lost(original: Any, container_format: str) -> None:
    """Log the streams that are not copied at all."""
    for stream in original.streams:
        why = None
        if stream.type in ("audio", "subtitle") and not stream.codec_context:
            why = "its codec is not known"
        elif stream.type == "data" and "timecode" not in stream.metadata:
            why = "its packets are not copied"
        elif stream.type == "video" and stream.codec_context and is_cover(stream):
            why = "cover pictures are not copied"
        elif stream.type == "attachment" and container_format != "matroska":
            why = "only .mkv holds attached files"
        if why:
            log.warning("%s stream %d is left out: %s", stream.type, stream.index, why)


def keeps(container_format: str) -> str:
    """What would keep a stream as it is."""
    return "--no-audio leaves it out" if container_format == "matroska" else "an output .mkv keeps it"


def _one_reading(
    source: Path, container_format: str, folder: Path, ways: dict[int, Any], reasons: dict[int, str]
) -> dict[int, Making]:
    """Read the source once, and write these streams; those that are refused are not among the results."""
    import av

    makings: dict[int, Making] = {}
    with open_container(source) as original:
        for index, way in ways.items():
            path = folder / f"joined-side{index}.{container_format}"
            try:
                makings[index] = Making(original.streams[index], way, path, container_format)
            except RefusedError as refused:
                reasons.setdefault(index, str(refused))
        line = Timeline(original)
        packets = original.demux(line.streams(original, *(original.streams[index] for index in makings)))
        while makings:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:
                log.warning("the sound and subtitles of %s cannot be read to their end (%s)", source, error)
                break
            if packet is None:
                break
            line.straighten(packet)
            if not packet.size or (making := makings.get(packet.stream.index)) is None:
                continue
            try:
                making.feed(packet)
            except RefusedError as refused:
                reasons.setdefault(making.index, str(refused))
                making.drop()
                del makings[making.index]
        return makings


def side_packets(out: Any, original: Any, side: Side, window: Window) -> Iterator[tuple[float, Any]] | None:
    """A side stream's packets within the window, with the seconds at which they belong.

    The stream is added to `out`, with the words that it has in the source; None where the window holds
    nothing of it, which some containers refuse.
    """
    packets = _within(side, window)
    if (first := next(packets, None)) is None:
        return None
    with open_container(side.path) as container:
        stream = add_copy(out, container.streams[0])
    source = original.streams[side.index]
    stream.metadata.update(kept_words(source.metadata))
    # Which track is the default, which is forced.
    stream.disposition = source.disposition.value

    def attached() -> Iterator[tuple[float, Any]]:
        last = None
        for packet in itertools.chain([first], packets):
            packet.stream = stream
            last = rise(packet, last)
            yield float(packet.dts * packet.time_base), packet

    return attached()


def _within(side: Side, window: Window) -> Iterator[Any]:
    """Packets at their times in the output; a subtitle that shows when the window opens is kept."""
    with open_container(side.path) as container:
        for packet in container.demux(container.streams[0]):
            if not packet.size or packet.dts is None or bytes(packet) == NO_TEXT:
                continue
            base = packet.time_base
            origin = round(side.origin / base)
            packet.dts, packet.pts = packet.dts + origin, packet.pts + origin
            if container.streams[0].type == "subtitle" and packet.duration:
                low, high = (
                    None if math.isinf(t) else round(t / float(base)) for t in (window.low, window.high)
                )
                start, end = packet.pts, packet.pts + packet.duration
                start, end = (
                    max(start, low) if low is not None else start,
                    min(end, high) if high is not None else end,
                )
                if start >= end:
                    continue
                packet.pts = packet.dts = start
                packet.duration = end - start
            elif not window.holds(float(packet.dts * base)):
                continue
            shift = window.ticks(base)
            packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
            yield packet
