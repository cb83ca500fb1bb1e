"""What lies beside the picture in a source: sound, subtitles, chapters, words, attached files.

Packets are copied as they are. Only what the output's container cannot hold is converted, or left out,
and then it is logged.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

log = logging.getLogger(__name__)

CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "duration"}
"""Metadata that belongs to the file it stood in."""
TEXT_CODECS = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
"""How text subtitles are stored, by container."""
TEXT_SUBTITLES = ("mov_text", "subrip", "srt", "webvtt", "text")
NO_TEXT = b"\0\0"
"""A gap between subtitles in MP4, which the muxer fills by itself."""
EMPTY_SRT = b"1\n00:00:00,000 --> 00:00:01,000\n \n"


@dataclass(frozen=True)
class Window:
    """The time of the source that goes into the output, in seconds, and what is taken off it."""

    low: float = float("-inf")
    high: float = float("inf")
    shift: Fraction = Fraction(0)

    def holds(self, seconds: float) -> bool:
        return self.low <= seconds < self.high

    def ticks(self, time_base: Fraction) -> int:
        """The shift in ticks."""
        return round(self.shift / time_base)


class Track(Protocol):
    """A stream of the output that is fed with packets of a stream of the source."""

    def feed(self, packet: Any) -> Iterable[Any]:
        """The packets that one packet of the source becomes."""
        ...

    def drain(self) -> Iterable[Any]:
        """What is left at the end."""
        ...


class CopiedTrack:
    """Packets as they are."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.texts = stream.type == "subtitle"

    def feed(self, packet: Any) -> Iterable[Any]:
        if self.texts and bytes(packet) == NO_TEXT:
            return ()
        packet.stream = self.stream
        return (packet,)

    def drain(self) -> Iterable[Any]:
        return ()


class TextTrack:
    """Text subtitles in another container's form."""

    def __init__(self, stream: Any, before: str, after: str) -> None:
        self.stream, self.before, self.after = stream, before, after

    def feed(self, packet: Any) -> Iterable[Any]:
        import av

        text = bytes(packet)
        if self.before == "mov_text":
            text = text[2 : 2 + int.from_bytes(text[:2], "big")]
        if not text:
            return ()
        if self.after == "mov_text":
            text = len(text).to_bytes(2, "big") + text
        converted = av.Packet(text)
        converted.pts = converted.dts = packet.pts
        converted.duration, converted.time_base = packet.duration, packet.time_base
        converted.stream = self.stream
        return (converted,)

    def drain(self) -> Iterable[Any]:
        return ()


class EncodedTrack:
    """Sound in another codec, for a container that cannot hold the source's."""

    def __init__(self, stream: Any, source: Any) -> None:
        import av

        self.stream = stream
        rate = (
            source.rate if source.rate in (stream.codec_context.codec.audio_rates or [source.rate]) else 48000
        )
        context = stream.codec_context
        context.rate, context.layout = rate, source.layout
        context.format = (context.codec.audio_formats or [source.format])[0]
        context.time_base = Fraction(1, rate)
        self.resampler = av.AudioResampler(format=context.format, layout=source.layout, rate=rate)

    def feed(self, packet: Any) -> Iterable[Any]:
        import av

        try:
            frames = packet.decode()
        except av.FFmpegError:
            return
        for frame in frames:
            for even in self.resampler.resample(frame):
                yield from self.stream.encode(even)

    def drain(self) -> Iterable[Any]:
        yield from self.stream.encode(None)


def add_tracks(out: Any, original: Any) -> dict[int, Track]:
    """Streams of the output for the sound and subtitles of the source, by the source's stream index."""
    tracks = {}
    for stream in original.streams:
        if stream.type in ("audio", "subtitle") and (track := add_track(out, stream)) is not None:
            tracks[stream.index] = track
            track.stream.metadata.update(kept_words(stream.metadata))  # type: ignore[attr-defined]
            # Which track is the default, which is forced.
            track.stream.disposition = stream.disposition.value  # type: ignore[attr-defined]
        elif stream.type == "data":
            log.warning("data stream %d is left out: its packets cannot be copied safely", stream.index)
    return tracks


def add_track(out: Any, stream: Any) -> Track | None:
    """The stream as it is where the container holds it, else converted, else None; both are logged."""
    if stream.codec_context is None:
        log.warning("%s stream %d is left out: its codec is not known", stream.type, stream.index)
        return None
    name = stream.codec_context.name
    if holds(out.format.name, stream):
        return CopiedTrack(out.add_stream_from_template(stream, opaque=True))
    converted = convert_audio(out, stream) if stream.type == "audio" else convert_text(out, stream)
    what = "converted" if converted else "left out"
    log.warning(
        "%s stream %d (%s) is %s: %s cannot hold it", stream.type, stream.index, name, what, out.format.name
    )
    return converted


def holds(container_format: str, stream: Any) -> bool:
    """Whether a container takes a stream: some say so only when the header is written."""
    import av

    try:
        with av.open(io.BytesIO(), "w", format=container_format) as trial:
            trial.add_stream_from_template(stream, opaque=True)
            trial.start_encoding()
    except (ValueError, av.FFmpegError):
        return False
    return True


def convert_audio(out: Any, stream: Any) -> Track | None:
    """The container's own default codec for sound."""
    codec = "libopus" if out.format.name == "webm" else out.default_audio_codec
    return EncodedTrack(out.add_stream(codec, rate=stream.rate), stream)


def convert_text(out: Any, stream: Any) -> Track | None:
    """Text subtitles as the container stores them; pictures as subtitles cannot be converted."""
    before, after = stream.codec_context.name, TEXT_CODECS.get(out.format.name.split(",")[0])
    if before not in TEXT_SUBTITLES or after is None:
        return None
    if hasattr(out, "add_mux_stream"):
        return TextTrack(out.add_mux_stream(after, time_base=stream.time_base), before, after)
    if after != "subrip":
        # Older PyAV opens an encoder for every new stream, which subtitles do not have there.
        return None
    import av

    with av.open(io.BytesIO(EMPTY_SRT), format="srt") as text:
        return TextTrack(out.add_stream_from_template(text.streams[0], opaque=True), before, after)


def copied_packets(original: Any, tracks: Mapping[int, Track], window: Window) -> Iterator[tuple[float, Any]]:
    """The packets of the other streams within a window, with the seconds at which they belong."""
    if not tracks:
        return
    for packet in original.demux([stream for stream in original.streams if stream.index in tracks]):
        moment = packet.dts if packet.dts is not None else packet.pts
        if moment is None:
            continue
        seconds = float(moment * packet.time_base)
        if not window.holds(seconds):
            continue
        index = packet.stream.index
        shift = window.ticks(packet.time_base)
        packet.pts = (moment if packet.pts is None else packet.pts) - shift
        packet.dts = moment - shift
        for result in tracks[index].feed(packet):
            yield seconds - float(window.shift), result
    for track in tracks.values():
        for result in track.drain():
            yield float("inf"), result


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that still holds in another container."""
    return {key: value for key, value in metadata.items() if key.lower() not in CONTAINER_KEYS}


def copy_chapters(out: Any, original: Any, window: Window) -> None:
    """The chapters, cut to the window; older PyAV cannot, which is logged."""
    if not hasattr(original, "chapters") or not hasattr(out, "set_chapters"):
        log.info("chapters, if there are any, are not copied: this PyAV cannot; update the package av")
        return
    if chapters := cut_chapters(original.chapters(), window):
        out.set_chapters(chapters)


def cut_chapters(chapters: Sequence[Mapping[str, Any]], window: Window) -> list[dict[str, Any]]:
    """Chapters that overlap the window, shifted as it is."""
    kept = []
    for chapter in chapters:
        base = chapter["time_base"]
        low, high = (bound / float(base) for bound in (window.low, window.high))
        start, end = max(chapter["start"], low), min(chapter["end"], high)
        if start < end:
            shift = window.ticks(base)
            kept.append({**chapter, "start": round(start) - shift, "end": round(end) - shift})
    return kept


def copy_attachments(out: Any, original: Any) -> None:
    """Fonts and the like, which Matroska holds."""
    attached = [stream for stream in original.streams if stream.type == "attachment"]
    if attached and not (out.format.name == "matroska" and hasattr(out, "add_attachment")):
        log.warning("%d attached files are left out: only Matroska holds them", len(attached))
        return
    for stream in attached:
        out.add_attachment(stream.metadata.get("filename", stream.name), stream.mimetype, stream.data)
