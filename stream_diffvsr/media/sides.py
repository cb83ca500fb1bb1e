"""Prepare a source's sound and subtitles, one file per stream, before the first frame is upscaled.

A stream is copied if the output's container accepts it. Otherwise it is converted or, failing that, left out;
both cases are logged. Each file is written completely, including the container's trailer, because some
containers refuse a stream only at that point. So every packet that is later joined into the output has
already been accepted. Finished files are reused when the job is resumed.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..files import atomic, sync_file
from .av_types import Container, Output, Packet, Stream
from .containers import open_container
from .streams import is_cover
from .timeline import Timeline
from .tracks import Window, kept_words, why_no_cover
from .ways import NO_TEXT, RefusedError, Way, add_copy, av_refusals, ways_of

log = logging.getLogger(__name__)

LISTING = "side-list.json"
"""The file that lists the finished side streams."""
OWN_NAME = re.compile(r"side-\d+\.\w+")
REPORT_PACKETS, REPORT_SECONDS = 50, 10.0
"""Number of packets between reports to the caller, and number of seconds between reports in the log."""
OnProgress = Callable[[int, int], None]
"""A function that is called with the amount done and the total."""


@dataclass(frozen=True)
class Side:
    """A finished sound or subtitle stream, in a file with the output's container format."""

    path: Path
    index: int
    """The stream's index in the source."""
    origin: int
    """Seconds that were subtracted from the stream's times so that no time is negative."""
    first: Fraction
    """When the stream is first heard or seen, in seconds on the source's timeline."""

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.path.stat().st_size


class Making:
    """Writes one sound or subtitle stream, either copied or converted."""

    def __init__(self, stream: Stream, way: Any, path: Path, container_format: str) -> None:
        import av

        self.index, self.path, self.origin = stream.index, path, 0
        self.first: Fraction | None = None
        self.last: int | None = None
        scale = stream.rate or 1000 if stream.type == "audio" else 1000
        options = {"movie_timescale": str(scale)} if container_format in ("mp4", "mov") else {}
        with av_refusals():
            self.out = av.open(str(path.absolute()), "w", format=container_format, container_options=options)
            self.way: Way = way(self.out, stream)

    def feed(self, packet: Packet) -> None:
        """Write a source packet, converting it if necessary. Raises `RefusedError`."""
        packet.pts = packet.dts if packet.pts is None else packet.pts
        packet.dts = packet.pts if packet.dts is None else packet.dts
        if packet.pts is not None:
            with av_refusals():
                self._write(self.way.feed(packet))

    def _write(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            base = packet.time_base
            if self.first is None:
                self.origin = math.floor(packet.dts * base)
                heard = packet.pts * base + encoder_delay(packet)
                self.first = heard if self.way.first is None else self.way.first
            shift = round(self.origin / base)
            packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
            self.last = set_rising_dts(packet, self.last)
            self.out.mux(packet)

    def finish(self) -> Side | None:
        """Finish the file and return it, or None if nothing was written. Raises `RefusedError`."""
        with av_refusals():
            self._write(self.way.drain())
            if self.first is not None:
                self.out.close()
                sync_file(self.path)
                return Side(self.path, self.index, self.origin, self.first)
        self.drop()
        return None

    def drop(self) -> None:
        """Close and delete the file."""
        with suppress(Exception):
            self.out.close()
        self.path.unlink(missing_ok=True)


def set_rising_dts(packet: Packet, last: int | None) -> int:
    """Ensure that a packet's decoding time is later than `last`, as muxers require, and return it."""
    if last is not None and packet.dts <= last:
        packet.dts = last + 1
    packet.pts = max(packet.pts, packet.dts)
    return packet.dts


def encoder_delay(packet: Packet) -> Fraction:
    """Return the encoder delay: the number of seconds at the start of a packet that are not played."""
    context = getattr(packet.stream, "codec_context", None)
    rate = getattr(context, "rate", 0)
    if not rate or not hasattr(packet, "has_sidedata") or not packet.has_sidedata("skip_samples"):
        return Fraction(0)
    return Fraction(int.from_bytes(bytes(packet.get_sidedata("skip_samples"))[:4], "little"), rate)


def make_sides(
    source: Path, container_format: str, folder: Path, on_progress: OnProgress | None = None
) -> list[Side]:
    """Write a source's sound and subtitles to files named `side-<stream>.<container_format>` in a folder.

    Files from an earlier run are reused. Conversions and omissions are logged. `on_progress` is called with
    the number of bytes read and the source's size in bytes; it may raise an exception to stop the work.
    Raises `VideoError` if the source cannot be opened, and `OSError` if the disk fails.
    """
    listing = folder / LISTING
    sides, said = _listed(listing) or _make(source, container_format, folder, Report(on_progress))
    for line in said:
        log.warning(line)
    with atomic(listing) as file:
        facts = [{**vars(s), "path": s.path.name, "first": str(s.first), "size": s.size} for s in sides]
        file.write(json.dumps({"sides": facts, "said": said}).encode())
    return sides


def _listed(listing: Path) -> tuple[list[Side], list[str]] | None:
    """Return an earlier run's side streams and messages, or None if they are incomplete."""
    try:
        found = json.loads(listing.read_text(encoding="utf-8"))
        sides = []
        for facts in found["sides"]:
            size, name = facts.pop("size"), facts.pop("path")
            if not OWN_NAME.fullmatch(name):
                return None
            sides.append(Side(listing.parent / name, first=Fraction(facts.pop("first")), **facts))
            if sides[-1].size != size:
                return None
        return sides, [str(line) for line in found["said"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class Report:
    """Reports how much of a source has been read."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress
        self.next = time.monotonic() + REPORT_SECONDS
        self.packets = 0

    def read(self, packet: Packet, total: int) -> None:
        """Count a packet from a source of `total` bytes, and report progress from time to time."""
        self.packets += 1
        if self.packets % REPORT_PACKETS or not packet.pos:
            return
        if self.on_progress is not None:
            self.on_progress(packet.pos, total)
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + REPORT_SECONDS
            log.info("preparing sound and subtitles: %d %%", 100 * packet.pos // max(1, total))


def _make(source: Path, container_format: str, folder: Path, report: Report) -> tuple[list[Side], list[str]]:
    """Write each stream in the first way that the container accepts; return the sides and messages to log."""
    with open_container(source) as original:
        wanted = [s for s in original.streams if s.type in ("audio", "subtitle") and s.codec_context]
        said = what_is_lost(original, container_format)
        remedies = {stream.index: keeping_advice(stream, container_format) for stream in wanted}
        ways = {stream.index: ways_of(stream) for stream in wanted}
        names = {
            stream.index: f"{stream.type} stream {stream.index} ({stream.codec_context.name})"
            for stream in wanted
        }
    done: dict[int, Side | None] = {}
    reasons: dict[int, str] = {}
    while left := {index: rest[0] for index, rest in ways.items() if rest and index not in done}:
        makings = _one_reading(source, container_format, folder, left, reasons, report)
        for index, making in makings.items():
            try:
                done[index] = making.finish()
            except RefusedError as refused:
                reasons.setdefault(index, str(refused))
                making.drop()
                continue
            if done[index] is None:
                said.append(f"{names[index]} is left out: it contains nothing that can be decoded")
            elif making.way.name:
                said.append(
                    f"{names[index]} is converted to {making.way.name}: {container_format} cannot store it "
                    f"({reasons.get(index)}); {remedies[index]}"
                )
            if making.way.damaged:
                count = making.way.damaged
                said.append(f"{count} packets of {names[index]} cannot be decoded and are left out")
        for index in left:
            ways[index] = ways[index][1:]
    said += [
        f"{names[index]} is left out: {container_format} cannot store it ({reasons.get(index)}); "
        f"{remedies[index]}"
        for index in sorted(set(ways) - set(done))
    ]
    return [side for _, side in sorted(done.items()) if side is not None], said


def what_is_lost(original: Container, container_format: str) -> list[str]:
    """Return a message for each stream that is left out entirely."""
    said = []
    for stream in original.streams:
        why = None
        if stream.type in ("audio", "subtitle") and not stream.codec_context:
            why = "its codec is unknown"
        elif stream.type == "data" and ("timecode" not in stream.metadata or stream.frames > 1):
            # A time code is a single packet; Sony's per-frame data also has a time code in its metadata.
            why = "its packets cannot be copied"
        elif stream.type == "video" and is_cover(stream):
            why = why_no_cover(stream, container_format)
        elif stream.type == "attachment" and container_format != "matroska":
            why = "only .mkv can store attached files"
        if why:
            name = stream.metadata.get("handler_name") or stream.metadata.get("filename")
            called = f" ({name})" if name else ""
            said.append(f"{stream.type} stream {stream.index}{called} is left out: {why}")
    return said


def keeping_advice(stream: Stream, container_format: str) -> str:
    """Return advice on how to keep a stream (nearly) unchanged or, failing that, how to leave it out."""
    import av

    if container_format != "matroska":
        try:
            with av_refusals(), av.open(io.BytesIO(), "w", format="matroska") as mkv:
                add_copy(mkv, stream)
            return "use an .mkv output to keep it"
        except RefusedError:
            if stream.type == "audio":
                return "use an .mkv output to store it as FLAC, without further loss"
    return "use --no-audio to leave it out"


def _one_reading(
    source: Path,
    container_format: str,
    folder: Path,
    ways: dict[int, Any],
    reasons: dict[int, str],
    report: Report,
) -> dict[int, Making]:
    """Read the source once and write these streams; refused streams are missing from the result."""
    makings: dict[int, Making] = {}
    with open_container(source) as original:
        for index, way in ways.items():
            path = folder / f"side-{index}.{container_format}"
            try:
                makings[index] = Making(original.streams[index], way, path, container_format)
            except RefusedError as refused:
                reasons.setdefault(index, str(refused))
        try:
            _feed(original, makings, reasons, report)
        except BaseException:
            for making in makings.values():
                making.drop()
            raise
        return makings


def _feed(original: Container, makings: dict[int, Making], reasons: dict[int, str], report: Report) -> None:
    """Write each packet of the source to its stream's file, and remove refused streams from `makings`."""
    import av

    line = Timeline(original)
    # Read the video packets too: an interrupt is noticed only between packets, and subtitles may be rare.
    wanted = [*(original.streams[index] for index in makings), *original.streams.video]
    packets = original.demux(line.streams(original, *wanted))
    while makings:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            log.warning("the sound and subtitles of %s cannot be read to the end (%s)", original.name, error)
            return
        if packet is None:
            return
        line.straighten(packet)
        report.read(packet, original.size)
        if not packet.size or (making := makings.get(packet.stream.index)) is None:
            continue
        try:
            making.feed(packet)
        except RefusedError as refused:
            reasons.setdefault(making.index, str(refused))
            making.drop()
            del makings[making.index]


def side_packets(
    out: Output, original: Container, side: Side, window: Window
) -> Iterator[tuple[float, Packet]] | None:
    """Add a side stream to `out` and return its packets within the window, each with its time in seconds.

    The stream keeps its metadata from the source. If no packet is within the window, return None and do not
    add the stream, because some containers refuse empty streams.
    """
    packets = _in_window(side, window)
    if (first := next(packets, None)) is None:
        return None
    with open_container(side.path) as container:
        stream = add_copy(out, container.streams[0])
    source = original.streams[side.index]
    stream.metadata.update(kept_words(source.metadata))
    # This copies the flags for default and forced tracks.
    stream.disposition = source.disposition.value

    def attached() -> Iterator[tuple[float, Packet]]:
        last = None
        for packet in itertools.chain([first], packets):
            packet.stream = stream
            last = set_rising_dts(packet, last)
            yield float(packet.dts * packet.time_base), packet

    return attached()


def _in_window(side: Side, window: Window) -> Iterator[Any]:
    """Yield packets with their times in the output; subtitles that extend beyond the window are cut."""
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
