"""Join segments into one file by copying their packets, and add the source's other streams."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..files import sync_file
from .av_types import Container, Output, Packet, Stream
from .codecs import Encoding
from .containers import open_container
from .sides import Side, side_packets
from .tracks import (
    MP4_WORDS,
    Window,
    copy_attachments,
    copy_chapters,
    copy_covers,
    kept_words,
    time_code,
    with_later_time_code,
)
from .ways import av_refusals


@dataclass(frozen=True)
class SegmentFile:
    """A finished segment."""

    name: str
    """Name of the file in the work folder, or empty if the frames are pictures in the output folder."""
    frames: int
    size: int
    first: int
    """Timestamp of its first frame, in ticks of the source."""
    end: int
    """End of its last frame, in ticks of the source."""
    depth: int = 0
    """Largest number of frames by which decoding order lags behind presentation order."""
    compare: str = ""
    """Name of the file that contains the split-screen video's segment."""
    compare_depth: int = 0


def join(
    target: Path,
    container_format: str,
    files: Sequence[Path],
    parts: Sequence[SegmentFile],
    encoding: Encoding,
    *,
    source: Path | None,
    stream: int | None = None,
    sides: Sequence[Side] = (),
    words: bool = True,
    metadata: Mapping[str, str],
    window: Window,
) -> None:
    """Write `target` from the segments and, if `source` is given, from the source's other streams.

    `sides` are the prepared sound and subtitles of the source, and `stream` is the index of its video stream.
    With `words`, the source's metadata, chapters, cover pictures and attached files are copied too. `target`
    is synced to disk. Raises `RefusedError` if the container does not accept a stream, or `OSError` if
    reading or writing fails.
    """
    import av

    with av_refusals(), ExitStack() as stack:
        original = None if source is None else stack.enter_context(open_container(source))
        skipped = seconds_before(original, stream, window)
        tags = {} if original is None or not words else kept_words(original.metadata)
        tags = with_later_time_code(tags, skipped, encoding.rate) | dict(metadata)
        others = sorted(tags.keys() - MP4_WORDS) if container_format in ("mp4", "mov") else []
        options = {}
        if container_format in ("mp4", "mov"):
            # Both of the file's timescales use the source's ticks, so that a late start is also exact.
            ticks = str(encoding.time_base.denominator)
            options = {"movflags": f"+faststart{'+use_metadata_tags' if others else ''}"}
            options |= {"video_track_timescale": ticks, "movie_timescale": ticks}
        out = stack.enter_context(
            av.open(str(target.absolute()), "w", format=container_format, container_options=options)
        )
        video = add_video(out, files[0], encoding)
        streams = [video_packets(files, parts, encoding, video, window.ticks(encoding.time_base))]
        out.metadata.update(tags)
        if source is not None and original is not None:
            if words and stream is not None:
                keep_words_of_video(video, original.streams[stream], skipped, encoding.rate)
            found = (side_packets(out, original, side, window) for side in sides)
            streams += [packets for packets in found if packets is not None]
            if words:
                copy_attachments(out, original)
                streams.append(copy_covers(out, original, source, others))
                copy_chapters(out, original, window)
        mux(out, streams)
    sync_file(target)


def seconds_before(original: Container | None, stream: int | None, window: Window) -> Fraction:
    """Return how many seconds of the video stream come before the window."""
    if original is None or stream is None or not math.isfinite(window.low):
        return Fraction(0)
    video = original.streams[stream]
    return window.shift - (video.start_time or 0) * video.time_base


def keep_words_of_video(video: Stream, original: Stream, skipped: Fraction, rate: Fraction) -> None:
    """Copy the video stream's title, language, flags and time code (advanced by `skipped` seconds)."""
    words = with_later_time_code(time_code(original) | kept_words(original.metadata), skipped, rate)
    for key in [key for key in words if key.lower() in ("vendor_id", "handler_name", "alpha_mode")]:
        del words[key]
    video.metadata.update(words)
    video.disposition = original.disposition.value


def mux(out: Output, streams: Iterable[Iterator[tuple[float, Packet]]]) -> None:
    """Write the packets of all streams in time order."""
    for _, packet in heapq.merge(*streams, key=lambda item: item[0]):
        out.mux(packet)


def add_video(out: Output, first: Path, encoding: Encoding) -> Any:
    """Add the output's video stream, based on the first segment's stream."""
    with open_container(first) as container:
        stream = out.add_stream_from_template(container.streams.video[0], opaque=True)
    context, colour = stream.codec_context, encoding.colour
    if context.name == "hevc" and out.format.name in ("mp4", "mov"):
        # Apple's players do not play files with FFmpeg's default tag, hev1.
        context.codec_tag = "hvc1"
    context.colorspace, context.color_range = colour.matrix, 2 if colour.full_range else 1
    context.color_primaries, context.color_trc = colour.primaries, colour.transfer
    if encoding.aspect is not None:
        stream.sample_aspect_ratio = encoding.aspect
    # Players may read the rate from the container; older PyAV versions cannot set it on a copied template.
    with suppress(RuntimeError):
        context.framerate = encoding.rate
    return stream


def video_packets(
    files: Sequence[Path], parts: Sequence[SegmentFile], encoding: Encoding, stream: Stream, shift: int
) -> Iterator[tuple[float, Packet]]:
    """Yield the packets of all segments with the source's timestamps and increasing decoding times.

    Encoders differ in the decoding times that they set, especially if the frame rate varies. They are
    therefore replaced: packet i is decoded when frame i - depth is shown. These times always increase, and
    none is later than the time of the packet's own frame.
    """
    depth = max(part.depth for part in parts)
    step = max(1, round(1 / (encoding.rate * encoding.time_base)))
    earlier = deque(parts[0].first - step * back for back in range(depth, 0, -1))
    for part, file in zip(parts, files, strict=True):
        times = sorted(packet.pts for packet in segment_packets(file, part, encoding))
        if len(times) != part.frames:
            raise OSError(f"{file} contains {len(times)} frames instead of {part.frames}")
        following = dict(zip(times, [*times[1:], part.end], strict=True))
        for shown, packet in zip(times, segment_packets(file, part, encoding), strict=True):
            earlier.append(shown)
            packet.duration = max(1, following[packet.pts] - packet.pts)
            packet.dts = earlier.popleft() - shift
            packet.pts -= shift
            packet.stream = stream
            yield float(packet.dts * encoding.time_base), packet


def segment_packets(path: Path, part: SegmentFile, encoding: Encoding) -> Iterator[Any]:
    """Yield the packets of a segment in decoding order, with `pts` in ticks of the source."""
    with open_container(path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            packet.pts = round(packet.pts * stream.time_base / encoding.time_base) + part.first
            packet.time_base = encoding.time_base
            yield packet
