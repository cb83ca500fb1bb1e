"""Read from the middle of a file, producing the same frames, indices and times as when read from the start.

Seeking is fast but can go wrong: timestamps may repeat, a file's index may be incorrect, and pictures may
refer to skipped pictures. Seeking is therefore used only to reach a known frame from an earlier key frame. If
anything is not as expected, seeking is abandoned (`DoubtError`), and the file is read from the beginning.
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
"""Codecs for which packets can be counted instead of frames; some VP8 and MPEG-4 packets yield no frame."""
INDEXED = ("mp4", "matroska")
"""Containers that store the boundaries of packets."""
REORDERED = 64
"""More packets than any codec reorders."""
STEPS_BACK = (0, 1, 4, 16, 64)
"""How many seconds to go back from the wanted frame when seeking; the numbers are tried in this order."""


class DoubtError(Exception):
    """Raised if frames read after seeking may differ from frames read from the start."""


@dataclass(frozen=True)
class Place:
    """A known frame of a source, from which reading can continue."""

    index: int
    time: int
    """Its presentation timestamp, in ticks."""
    digest: int | None = None
    """Its picture's checksum, or None if the frame had not been read or if data or times were faulty."""


def frames_from(
    container: Container,
    stream: Stream,
    place: Place,
    decode: Callable[[Any, Any], Iterator[Any]],
    looks: Callable[[Any], int],
) -> Iterator[Any]:
    """Yield decoded frames, beginning with the place's own frame; `looks` returns a frame's checksum.

    Raises `DoubtError` if the place's frame is missing or different.
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
    """Yield frames, starting at a key frame no later than a place; those before it may lack references."""
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
    """Return the place where a span starts, and the timestamps of all frames up to there and of a few more.

    This counts packets and sorts their timestamps; nothing is decoded. `first` is the first frame's
    timestamp. Raises `DoubtError` if the number of packets may differ from the number of frames.
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
        raise DoubtError("its frames cannot be told apart by their timestamps")
    for index, time in enumerate(times):
        if not span.before(index, (time - first) * stream.time_base):
            return Place(index, time), times
    raise DoubtError("its packets end before the first frame to read")


def timestamps(container: Container, stream: Stream, span: Span, first: int) -> array[int]:
    """Return the sorted timestamps of all frames up to a span's start and of a few more.

    Raises `DoubtError` if a packet has no timestamp, or is damaged or discarded.
    """
    times: array[int] = array("q")
    left = REORDERED
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_discard or packet.is_corrupt:
            raise DoubtError("some of its packets lack a picture or a timestamp")
        times.append(packet.pts)
        if not span.before(len(times) - 1, (packet.pts - first) * stream.time_base):
            left -= 1
        if left == 0:
            # The last timestamps may have gaps, for packets that have not been read yet.
            return array("q", sorted(times)[: -(REORDERED // 2)])
    return array("q", sorted(times))


def check_counted(times: array[int] | None, index: int, frame: Frame) -> None:
    """Raise `DoubtError` if a frame's timestamp differs from the one that `count_to` found for its index."""
    if times is not None and index < len(times) and frame.pts != times[index]:
        raise DoubtError("its number of packets differs from its number of frames")
