"""Ways to write a sound or subtitle stream: copying it, converting its text or re-encoding its sound."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Protocol

from .av_types import Frame, Output, Packet, Stream
from .texts import KNOWN, translate

SOUND_CODECS = {"mp4": "aac", "mov": "aac", "matroska": "flac", "webm": "libopus"}
TEXT_CODECS = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
"""The codecs to which sound and text are converted, by container."""
NO_TEXT = b"\0\0"
"""The packet that stands for a gap between subtitles in MP4; the muxer adds such packets itself."""
EMPTY_SRT = b"1\n00:00:00,000 --> 00:00:01,000\n \n"
UNENDED = 5
"""Seconds for which a cue without an end is shown, unless the next cue starts sooner."""
STARTS = {
    "aac": (0xFFF6, 0xFFF0),
    "mp2": (0xFFE6, 0xFFE4),
    "mp3": (0xFFE6, 0xFFE2),
    "ac3": (0xFFFF, 0x0B77),
    "eac3": (0xFFFF, 0x0B77),
}
"""Codec -> the mask for the first two bytes of each packet in a transport stream, and the expected result."""
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")
"""FFmpeg's default channel layouts for 1 to 8 channels."""
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Disk errors, which do not depend on the data being written."""


class RefusedError(Exception):
    """Raised if a container or codec does not accept a stream."""


class av_refusals:  # noqa: N801
    """A context manager that turns PyAV's errors, other than disk errors, into `RefusedError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import av

        if isinstance(error, (av.FFmpegError, ValueError, RuntimeError, OverflowError)):
            if getattr(error, "errno", None) in DISK_ERRORS:
                return
            raise RefusedError(getattr(error, "strerror", None) or str(error)) from error


class Way(Protocol):
    """A way to write the packets of a stream."""

    name: str
    first: Fraction | None
    """When the stream is first heard, in seconds, if the output packets do not reveal this; else None."""
    damaged: int
    """Number of packets that could not be decoded."""

    def feed(self, packet: Packet) -> Iterable[Any]:
        """Return the output packets for one source packet."""
        ...

    def drain(self) -> Iterable[Any]:
        """Return the remaining output packets at the end of the source."""
        ...


class Copied:
    """Copies packets unchanged."""

    name, first, damaged = "", None, 0

    def __init__(self, out: Output, stream: Stream) -> None:
        self.stream = add_copy(out, stream)
        self.texts = stream.type == "subtitle"
        in_ts = stream.container.format.name == "mpegts"
        self.start = STARTS.get(stream.codec_context.codec.canonical_name) if in_ts else None

    def feed(self, packet: Packet) -> Iterable[Any]:
        if self.texts and bytes(packet) == NO_TEXT:
            return ()
        if self.start and int.from_bytes(bytes(packet)[:2], "big") & self.start[0] != self.start[1]:
            # The packet belongs to another codec with the same stream number; players would try to play it.
            self.damaged += 1
            return ()
        packet.stream = self.stream
        return (packet,)

    def drain(self) -> Iterable[Any]:
        return ()


class Translated:
    """Converts text subtitles for another container.

    A cue without an end time gets one, because MP4 players would otherwise not show it.
    """

    first, damaged = None, 0

    def __init__(self, out: Output, stream: Stream) -> None:
        import av

        self.unended: Any = None
        self.before, self.name = stream.codec_context.name, TEXT_CODECS[out.format.name.split(",")[0]]
        if self.before not in KNOWN:
            raise RefusedError("it does not contain text that can be converted")
        if hasattr(out, "add_mux_stream"):
            self.stream = out.add_mux_stream(self.name, time_base=stream.time_base)
            return
        if self.name != "subrip":
            # Older PyAV versions open an encoder for every new stream, but have no encoders for subtitles.
            raise RefusedError("this version of PyAV cannot convert it: update the av package")
        with av.open(io.BytesIO(EMPTY_SRT), format="srt") as text:
            self.stream = out.add_stream_from_template(text.streams[0], opaque=True)

    def feed(self, packet: Packet) -> Iterable[Any]:
        import av

        yield from self._end(packet.pts)
        if not (text := translate(bytes(packet), self.before, self.name)):
            return
        converted = av.Packet(text)
        converted.pts = converted.dts = packet.pts
        converted.duration, converted.time_base = packet.duration, packet.time_base
        converted.stream = self.stream
        if converted.duration:
            yield converted
        else:
            self.unended = converted

    def drain(self) -> Iterable[Any]:
        return self._end(None)

    def _end(self, time: int | None) -> Iterator[Any]:
        """Yield the pending cue, if any; `time` is when the next cue begins, or None if there is none."""
        if (text := self.unended) is not None:
            self.unended = None
            text.duration = round(UNENDED / text.time_base)
            if time is not None:
                text.duration = max(1, min(text.duration, time - text.pts))
            yield text


class Encoded:
    """Re-encodes sound. The encoder is opened at the first frame, which determines the rate and layout."""

    def __init__(self, out: Output, stream: Stream, layout: str | None = None) -> None:
        self.out, self.layout, self.stream = out, layout, None
        self.name = SOUND_CODECS[out.format.name.split(",")[0]]
        self.first: Fraction | None = None
        self.resampler: Any = None
        self.kind: tuple[Any, ...] = ()
        self.damaged = 0
        self.due = Fraction(0)

    def _open(self, frame: Frame, layout: str) -> None:
        rates = self.out.add_stream(self.name, rate=frame.sample_rate or 48000)
        self.stream, context = rates, rates.codec_context
        known = context.codec.audio_rates or [frame.sample_rate]
        rate = frame.sample_rate if frame.sample_rate in known else 48000
        context.rate, context.layout, context.time_base = rate, self.layout or layout, Fraction(1, rate)
        formats = [f.name for f in context.codec.audio_formats or []]
        context.format = frame.format.name if frame.format.name in formats else (formats or ["s16"])[0]
        # Keep 24 bits or more if the codec supports them.
        if "s32" in formats and frame.format.name.startswith(("s32", "flt", "dbl")):
            context.format = "s32"

    def feed(self, packet: Packet) -> Iterable[Any]:
        import av

        try:
            frames = packet.decode()
        except av.FFmpegError:
            self.damaged += 1
            return
        for frame in frames:
            # If a packet contains several frames, only the first has a time.
            begin = self.due if frame.pts is None else frame.pts * frame.time_base
            frame.pts = round(begin / frame.time_base)
            self.due = begin + Fraction(frame.samples, frame.sample_rate or 48000)
            layout = named_layout(frame.layout)
            if frame.layout.name != layout:
                frame = with_layout(frame, layout)
            if self.stream is None:
                self._open(frame, layout)
                self.first = begin
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
        elif self.damaged:
            raise RefusedError("none of it can be decoded")


def named_layout(layout: Any) -> str:
    """Return a layout's name, or the default for its number of channels if the file specifies none."""
    count = getattr(layout, "nb_channels", 0) or len(layout.channels)
    return LAYOUTS[count - 1] if layout.name == f"{count} channels" and count <= len(LAYOUTS) else layout.name


def with_layout(frame: Frame, layout: str) -> Any:
    """Return a frame with the same samples, but labelled with another layout."""
    import av

    named = av.AudioFrame(frame.format.name, layout, frame.samples)
    named.sample_rate, named.pts, named.time_base = frame.sample_rate, frame.pts, frame.time_base
    for ours, theirs in zip(named.planes, frame.planes, strict=True):
        ours.update(bytes(theirs)[: ours.buffer_size].ljust(ours.buffer_size, b"\0"))
    return named


def add_copy(out: Output, stream: Stream) -> Any:
    """Add an output stream for copies of a stream's packets, with a default layout if its sound has none."""
    copy = out.add_stream_from_template(stream, opaque=True)
    if stream.type == "audio" and (layout := named_layout(stream.layout)) != stream.layout.name:
        copy.codec_context.layout = layout
    return copy


def ways_of(stream: Stream) -> list[Any]:
    """Return the ways to write a stream, best first."""
    if stream.type == "subtitle":
        return [Copied, Translated]
    return [Copied, Encoded, lambda out, stream: Encoded(out, stream, "stereo")]
