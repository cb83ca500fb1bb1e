"""Reading from the middle of a file with the same frames, indices and times as from its start.

Seeking is fast and may be wrong: timestamps repeat, indices lie, pictures refer to what was jumped over.
So it is used only towards a frame that is known, from a key frame before it, and given up (`DoubtError`) as
soon as anything is not as expected; then the file is read from its start.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .av_types import Container, Frame, Stream
from .span import Span

ONE_PACKET_ONE_FRAME = {"h264", "hevc", "av1", "vp9", "prores", "ffv1", "mjpeg", "png", "dnxhd"}
"""Codecs whose packets can be counted instead of their frames; in VP8 and MPEG-4 some show nothing."""
INDEXED = ("mp4", "matroska")
"""Containers that keep packets apart by themselves."""
REORDERED = 64
"""More packets than any codec keeps back."""
STEPS_BACK = (0, 1, 4, 16, 64)
"""Seconds by which the place to seek to lies before the frame, in turn."""


class DoubtError(Exception):
    """What was read after seeking is not as it would be from the start."""


@dataclass(frozen=True)
class Place:
    """A known frame of a source, from which reading can continue."""

    index: int
    time: int
    """Its presentation timestamp, in ticks."""
    digest: int | None = None
    """Checksum of its picture, where it was read before from a file in good order."""


def frames_from(
    container: Container,
    stream: Stream,
    place: Place,
    decode: Callable[[Any, Any], Iterator[Any]],
    looks: Callable[[Any], int],
) -> Iterator[Any]:
    """Decoded frames from a place on, its own frame first; `looks` tells a frame's checksum.

    Raises `DoubtError` where that frame is not found, or is another.
    """
    frames = decode_from(container, stream, place, decode)
    frame = next((frame for frame in frames if frame.pts is None or frame.pts >= place.time), None)
    if frame is None or frame.pts != place.time:
        raise DoubtError("the frame to resume from was not found")
    if place.digest is not None and looks(frame) != place.digest:
        raise DoubtError("the frame to resume from was decoded differently")
    yield frame
    yield from frames


def decode_from(
    container: Container, stream: Stream, place: Place, decode: Callable[[Any, Any], Iterator[Any]]
) -> Iterator[Any]:
    """Frames from the key frame before a place on; what comes before that one may lack its references."""
    import av

    for seconds in STEPS_BACK:
        try:
            container.seek(place.time - round(seconds / stream.time_base), stream=stream)
        except (av.FFmpegError, OSError) as error:
            raise DoubtError(f"seeking failed: {error}") from error
        frames = decode(container, stream)
        key = next((frame for frame in frames if frame.key_frame), None)
        if key is not None and key.pts is not None and key.pts <= place.time:
            yield key
            yield from frames
            return
    raise DoubtError("no key frame was found before the frame to resume from")


def count_to(
    container: Container, stream: Stream, span: Span, first: int, interlaced: bool
) -> tuple[Place, array[int]]:
    """The place where a span starts, and the timestamps of all frames up to it and some more.

    Nothing is decoded: packets are counted, and their timestamps put in order. `first` is the timestamp
    of the first frame. Raises `DoubtError` where packets may be more or fewer than frames.
    """
    containers = container.format.name.split(",")
    if (
        interlaced
        or stream.codec_context.codec.canonical_name not in ONE_PACKET_ONE_FRAME
        or not any(name in containers for name in INDEXED)
    ):
        raise DoubtError("its frames cannot be counted without decoding them")
    times = timestamps(container, stream, span, first)
    if not times or times[0] != first or any(a == b for a, b in itertools.pairwise(times)):
        raise DoubtError("its timestamps do not distinguish its frames")
    for index, time in enumerate(times):
        if not span.before(index, (time - first) * stream.time_base):
            return Place(index, time), times
    raise DoubtError("its packets end before the frame to start from")


def timestamps(container: Container, stream: Stream, span: Span, first: int) -> array[int]:
    """Those of the frames up to the start of a span and some more, in order. Raises `DoubtError`."""
    times: array[int] = array("q")
    left = REORDERED
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_discard or packet.is_corrupt:
            raise DoubtError("it has packets without a picture, or without a time")
        times.append(packet.pts)
        if not span.before(len(times) - 1, (packet.pts - first) * stream.time_base):
            left -= 1
        if left == 0:
            # The last ones may still lack some that are shown before them.
            return array("q", sorted(times)[: -(REORDERED // 2)])
    return array("q", sorted(times))


def check_counted(times: array[int] | None, index: int, frame: Frame) -> None:
    """Raise `DoubtError` where a frame is not the one that was counted."""
    if times is not None and index < len(times) and frame.pts != times[index]:
        raise DoubtError("it has different numbers of packets and frames")
