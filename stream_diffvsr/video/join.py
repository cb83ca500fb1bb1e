"""Segments become one file: packets are copied, with the sound, subtitles and words of the source."""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .codecs import Encoding
from .journal import Part, sync_file
from .read import open_container

log = logging.getLogger(__name__)

CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "duration"}
"""Metadata that belongs to the file it stood in."""


def join(
    target: Path,
    container_format: str,
    folder: Path,
    parts: Sequence[Part],
    encoding: Encoding,
    *,
    source: Path | None,
    metadata: Mapping[str, str],
    whole: bool,
) -> None:
    """Write `target` from the segments, with the other streams of `source` unless that is None.

    `whole`: all of the source was done, so streams are copied to their end; else only the time of the
    frames. `target` is synced to the disk.
    """
    import av

    options = {"movflags": "+use_metadata_tags+faststart"} if container_format in ("mp4", "mov") else {}
    with av.open(str(target), "w", format=container_format, container_options=options) as out:
        video = add_video(out, folder / parts[0].name, encoding)
        streams = [video_packets(folder, parts, encoding, video)]
        if source is not None:
            with open_container(source) as original:
                out.metadata.update(kept_words(original.metadata))
                out.metadata.update(metadata)
                copied = add_copies(out, original)
                span = None if whole else (parts[0].first, parts[-1].end)
                streams.append(copied_packets(original, copied, encoding.time_base, span))
                mux(out, streams)
        else:
            out.metadata.update(metadata)
            mux(out, streams)
    sync_file(target)


def mux(out: Any, streams: Iterable[Iterator[tuple[float, Any]]]) -> None:
    """Write packets in the order of their times."""
    for _, packet in heapq.merge(*streams, key=lambda item: item[0]):
        out.mux(packet)


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that still holds in another container."""
    return {key: value for key, value in metadata.items() if key.lower() not in CONTAINER_KEYS}


def add_video(out: Any, first: Path, encoding: Encoding) -> Any:
    """The video stream of the output, as the first segment has it."""
    with open_container(first) as container:
        template = container.streams.video[0]
        stream = out.add_stream_from_template(template, opaque=True)
    stream.time_base = encoding.time_base
    return stream


def video_packets(
    folder: Path, parts: Sequence[Part], encoding: Encoding, stream: Any
) -> Iterator[tuple[float, Any]]:
    """The packets of all segments with timestamps of the source, and decoding times that rise throughout.

    Encoders differ in what they give as decoding times, above all at varying frame rates. Here packet i
    is decoded when frame i - depth is shown: that always rises, and never comes after its own frame.
    """
    depth = max(part.depth for part in parts)
    step = max(1, round(1 / (encoding.rate * encoding.time_base)))
    earlier = deque([parts[0].first - step * back for back in range(depth, 0, -1)], maxlen=depth + 1)
    for part in parts:
        times = sorted(packet.pts for packet in segment_packets(folder / part.name, part, encoding))
        if len(times) != part.frames:
            raise OSError(f"{folder / part.name} holds {len(times)} of {part.frames} frames")
        following = dict(zip(times, [*times[1:], part.end], strict=True))
        for shown, packet in zip(times, segment_packets(folder / part.name, part, encoding), strict=True):
            earlier.append(shown)
            packet.dts = earlier.popleft() if len(earlier) > depth else earlier[0]
            packet.duration = max(1, following[packet.pts] - packet.pts)
            packet.stream = stream
            yield float(packet.dts * encoding.time_base), packet


def segment_packets(path: Path, part: Part, encoding: Encoding) -> Iterator[Any]:
    """The packets of a segment in decoding order, their `pts` in ticks of the source."""
    with open_container(path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            packet.pts = round(packet.pts * stream.time_base / encoding.time_base) + part.first
            packet.time_base = encoding.time_base
            yield packet


def add_copies(out: Any, original: Any) -> dict[int, Any]:
    """Streams of the output for the sound and subtitles of the source, by the source's stream index."""
    copies = {}
    for stream in original.streams:
        if stream.type not in ("audio", "subtitle"):
            continue
        copies[stream.index] = out.add_stream_from_template(stream, opaque=True)
        copies[stream.index].metadata.update(stream.metadata)
    return copies


def copied_packets(
    original: Any, copies: Mapping[int, Any], time_base: Fraction, span: tuple[int, int] | None
) -> Iterator[tuple[float, Any]]:
    """The packets of the copied streams, within a span of the video's ticks."""
    wanted = [stream for stream in original.streams if stream.index in copies]
    low, high = (float("-inf"), float("inf")) if span is None else (float(t * time_base) for t in span)
    if not wanted:
        return
    for packet in original.demux(wanted):
        if packet.pts is None and packet.dts is None:
            continue
        moment = packet.dts if packet.dts is not None else packet.pts
        time = float(moment * packet.time_base)
        if low <= time < high:
            packet.stream = copies[
                packet.stream_index if hasattr(packet, "stream_index") else packet.stream.index
            ]
            yield time, packet
