"""The properties of a video stream: size, rate, depth, colour, rotation and HDR data."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import VideoError
from .av_types import Container, Frame, Stream
from .colour import BT709, FULL_RANGE, LIMITED_RANGE, RGB, SITINGS, UNSPECIFIED, Colour
from .timeline import MAY_JUMP, UNTIMED

log = logging.getLogger(__name__)

DEFAULT_RATE = Fraction(25)
"""Frames per second for sources without a rate, such as folders of pictures."""


@dataclass(frozen=True)
class SourceInfo:
    """A source's properties, known before upscaling begins; sizes are those of the upright picture."""

    width: int
    height: int
    bits: int
    time_base: Fraction
    """Seconds per tick of the timestamps."""
    rate: Fraction
    """Nominal frames per second."""
    frames: int | None
    """Number of frames, possibly estimated from the duration, or None if unknown."""
    colour: Colour = Colour(RGB, True, BT709, BT709)
    aspect: Fraction | None = None
    """A pixel's width divided by its height, or None for square pixels."""
    has_alpha: bool = False
    interlaced: bool = False
    side_data: dict[str, bytes] = field(default_factory=dict)
    """HDR10 data of the first frame, by name, in FFmpeg's memory layout."""
    timed: bool = True
    """Whether frames have timestamps; if not, they follow one another at `rate`."""
    free_start: bool = False
    """Whether timestamps can start at any value, as in broadcasts; if so, the output starts at 0 instead."""


def choose_stream(container: Container, path: Path, wanted: int | None) -> Stream:
    """Return the video stream to upscale: the one whose index in the file is `wanted`, or else the best."""
    videos = [s for s in container.streams.video if getattr(s, "codec_context", None) and not is_cover(s)]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise VideoError(f"{path} has no video stream that can be decoded, only {kinds}.")
    if wanted is None:
        # Some cameras store a still picture before the video itself, as a stream with a single frame.
        best = max(videos, key=lambda s: (s.frames != 1, s.width * s.height, s.frames, -s.index))
        if others := [str(s.index) for s in videos if s is not best]:
            log.warning(
                "%s has several video streams; only stream %d (%dx%d) is upscaled, not %s: "
                "use --stream to choose another",
                path,
                best.index,
                best.width,
                best.height,
                ", ".join(others),
            )
        return best
    for stream in videos:
        if stream.index == wanted:
            return stream
    known = ", ".join(f"{s.index} ({s.width}x{s.height})" for s in videos)
    raise VideoError(f"{path} has no video stream {wanted}; its video streams are {known}.")


def is_cover(stream: Stream) -> bool:
    """Whether a video stream is a cover picture, as in an audio file."""
    disposition = stream.disposition
    return bool(disposition & type(disposition).attached_pic)


def describe(stream: Stream, frame: Frame) -> SourceInfo:
    """Return a source's properties, taken from its stream and its first frame."""
    context = stream.codec_context
    width, height = turned_size(frame)
    turned = (width, height) != (frame.width, frame.height)
    flags = stream.container.format.flags
    untimed = bool(flags & UNTIMED)
    rates = [stream.average_rate, stream.guessed_rate]
    if untimed or stream.container.format.name in ("avi", "dv"):
        # Here, the average rate is the demuxer's default, counts empty packets, or is a clock's tick rate.
        rates.reverse()
    rate = next(filter(None, rates), DEFAULT_RATE)
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
        frames=named_frames(stream) or (round(length * rate) if length else None),
        colour=colour_of(frame, context),
        aspect=None if aspect in (None, 1) else (1 / aspect if turned else aspect),
        has_alpha=frame.format.components[-1].is_alpha or frame.format.has_palette,
        interlaced=bool(frame.interlaced_frame),
        side_data=hdr_data(frame, stream.metadata),
        timed=not untimed,
        free_start=bool(flags & MAY_JUMP),
    )


def turned_size(frame: Frame) -> tuple[int, int]:
    """Return the width and height of a frame as it is displayed."""
    matrix = display_matrix(frame)
    turned = matrix is not None and matrix[0] == 0
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def side_data(frame: Frame) -> dict[str, bytes]:
    """Return a frame's side data, keyed by FFmpeg's names.

    If PyAV 18 has no name for one kind of side data, such as EXIF in Motion JPEG from cameras, it provides no
    side data at all.
    """
    found = {}
    with suppress(ValueError):
        for data in frame.side_data:
            with suppress(ValueError):
                found[data.type.name] = bytes(data)
    return found


def named_frames(stream: Stream) -> int:
    """Return a stream's number of frames according to its index, or 0 if it is unknown."""
    # Older PyAV versions expose no index. The index of AVI also lists empty packets, and that of MP4 also
    # lists frames that are not shown.
    if (entries := getattr(stream, "index_entries", None)) is None or not stream.frames:
        return stream.frames
    return min(stream.frames, sum(1 for e in entries if e.size and not getattr(e, "is_discard", False)))


def siting_of(frame: Frame) -> str:
    """Return the position of a frame's chroma samples, or "left" if the frame does not specify it.

    PyAV does not expose it, so it is read from the log output of FFmpeg's `showinfo` filter.
    """
    import av.filter
    import av.logging

    graph, level = av.filter.Graph(), av.logging.get_level()
    size: dict[str, Any] = {"width": frame.width, "height": frame.height, "format": frame.format}
    source = graph.add_buffer(**size, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("showinfo"), graph.add("buffersink")).configure()
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as logs:
            graph.push(frame)  # type: ignore[arg-type]
            graph.pull()
    finally:
        av.logging.set_level(level)
    found = re.search(r" cl:(\w+)", "".join(text for _, _, text in logs))
    return found[1] if found and found[1] in SITINGS else "left"


def colour_of(frame: Frame, context: Any) -> Colour:
    """Return a stream's colour tags, with missing tags filled in."""
    if frame.format.is_rgb or frame.format.has_palette:
        return Colour(RGB, True, BT709, BT709)
    said = int(frame.color_range)
    # FFmpeg, which writes most grey video, treats grey without a range tag as full range.
    grey = len(frame.format.components) < 3 and said != LIMITED_RANGE
    full = said == FULL_RANGE or grey or frame.format.name.startswith("yuvj")
    tags = [int(value) or UNSPECIFIED for value in (context.color_primaries, context.color_trc)]
    matrix = int(frame.colorspace) or UNSPECIFIED
    return Colour(matrix, full, *tags, siting=siting_of(frame)).resolved(frame.width, frame.height)


HDR_DATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL")
LOST_DATA = {
    "DYNAMIC_HDR_PLUS": "DYNAMIC_HDR_PLUS",
    "DYNAMIC_HDR_VIVID": "DYNAMIC_HDR_VIVID",
    "DOVI_METADATA": "DOVI_METADATA",
    "AMBIENT_VIEWING_ENVIRONMENT": "AMBIENT_VIEWING_ENVIRONMENT",
    "SPHERICAL": "360 degree projection",
    "STEREO3D": "3D arrangement",
}
"""Side data that changes from scene to scene or that no encoder here accepts -> its name in the log."""


STEREO_WORD = "stereo_mode"
"""Matroska's metadata key for the arrangement of two views in one picture; copied like other metadata."""


def hdr_data(frame: Frame, words: Mapping[str, str]) -> dict[str, bytes]:
    """Return a frame's complete HDR10 side data, and log any side data that cannot be kept."""
    found = side_data(frame)
    if STEREO_WORD in words:
        found.pop("STEREO3D", None)
    if lost := [called for name, called in LOST_DATA.items() if name in found]:
        log.warning("the source's %s cannot be kept in the output", " and ".join(lost))
    display = found.get(HDR_DATA[0])
    # The last two numbers are flags that say whether the chromaticities and the luminances are known.
    if display is not None and 0 in struct.unpack_from("=2i", display, 80):
        log.warning("the source's mastering display data is incomplete, so it is not kept")
        del found[HDR_DATA[0]]
    return {name: data for name, data in found.items() if name in HDR_DATA}


QUARTERS = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}


def display_matrix(frame: Frame) -> tuple[int, int, int, int] | None:
    """Return the signs (a, b, c, d) of the frame's display matrix, or None if the frame is upright.

    A pixel (x, y) is shown at (a x + c y, b x + d y). Only quarter turns and mirroring are recognised.
    """
    import numpy as np

    if (data := side_data(frame).get("DISPLAYMATRIX")) is None:
        # Without side data, the angle is still available: in degrees anticlockwise, without mirroring.
        return QUARTERS.get(frame.rotation % 360)
    values = np.frombuffer(data, np.int32)
    a, b, c, d = (int(np.sign(values[i]) if abs(values[i]) > 1 << 15 else 0) for i in (0, 1, 3, 4))
    upright = (a, b, c, d) == (1, 0, 0, 1)
    return None if upright or abs(a * d - b * c) != 1 else (a, b, c, d)


def upright(x: Tensor, matrix: tuple[int, int, int, int] | None) -> Tensor:
    """Turn and mirror (1, C, h, w) according to a display matrix."""
    if matrix is None:
        return x
    a, b, c, d = matrix
    if a == 0:
        x, (a, d) = x.transpose(-1, -2), (c, b)
    mirrored = [axis for axis, sign in ((-1, a), (-2, d)) if sign < 0]
    return (x.flip(mirrored) if mirrored else x).contiguous()
