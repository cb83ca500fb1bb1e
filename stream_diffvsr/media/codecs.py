"""The encoders, the settings that they accept, and the containers that support them."""

from __future__ import annotations

import functools
import io
import logging
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from ..errors import VideoError
from .av_types import Output
from .colour import BT709, LAYOUTS, RGB, SITINGS, Colour, Layout
from .streams import SourceInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Codec:
    """An encoder and its settings."""

    encoder: str
    """FFmpeg's name for the encoder."""
    formats: tuple[str, ...]
    """Pixel formats from `LAYOUTS`; the default for each bit depth comes first."""
    crf: int | None = None
    """Default quality, or None if the encoder has no quality setting."""
    crf_names: tuple[str, ...] = ("crf",)
    crf_most: int = 51
    crf_unit: int = 1
    """The size of one quality step in the encoder's own unit."""
    options: Mapping[str, str] = field(default_factory=dict)
    native: Mapping[str, str] = field(default_factory=dict)
    """Pixel format -> the format with the same values in the order that the encoder requires."""
    narrowest: int = 1
    """The smallest frame width that the encoder can handle."""
    sitings: tuple[str, ...] = ("left",)
    """Chroma positions that the encoder can signal for 4:2:0; any other position is replaced by the first."""


YUV8 = ("yuv420p", "yuv422p", "yuv444p")
YUV10 = ("yuv420p10le", "yuv422p10le", "yuv444p10le")
YUV12 = ("yuv420p12le", "yuv422p12le", "yuv444p12le")
YUV16 = ("yuv420p16le", "yuv422p16le", "yuv444p16le")
RGB_DEEP = ("gbrp10le", "gbrp12le", "gbrp16le")
NVENC = {"rc": "constqp", "preset": "p5"}
AMF = {"rc": "cqp"}
APPLE = {"flags": "+qscale"}
SHUFFLED = {"yuv420p": "nv12", "yuv420p10le": "p010le"}
LAMBDA = 118
"""The size of one quality step in units of FFmpeg's `global_quality`."""

CODECS = {
    "h264": Codec("libx264", YUV8 + YUV10, 18, sitings=tuple(SITINGS)),
    "h265": Codec(
        "libx265",
        YUV8 + YUV10 + YUV12,
        18,
        options={"x265-params": "log-level=error"},
        # At widths up to 48, x265 writes out of bounds and sooner or later crashes the process.
        narrowest=64,
        sitings=tuple(SITINGS),
    ),
    "av1": Codec(
        "libsvtav1",
        ("yuv420p", "yuv420p10le"),
        24,
        crf_most=63,
        options={"preset": "6"},
        sitings=("left", "topleft"),
    ),
    "prores": Codec("prores_ks", ("yuv422p10le", "yuv444p10le")),
    "ffv1": Codec(
        "ffv1", YUV8 + YUV10 + YUV12 + YUV16 + RGB_DEEP, options={"level": "3", "slicecrc": "1", "g": "1"}
    ),
    "png": Codec("png", ("rgb24", "rgb48be")),
    "h264_nvenc": Codec("h264_nvenc", ("yuv420p", "yuv444p"), 18, ("qp",), options=NVENC),
    "hevc_nvenc": Codec(
        "hevc_nvenc", ("yuv420p", "yuv444p", "yuv420p10le"), 18, ("qp",), options=NVENC, native=SHUFFLED
    ),
    "av1_nvenc": Codec(
        "av1_nvenc", ("yuv420p", "yuv420p10le"), 90, ("qp",), 255, options=NVENC, native=SHUFFLED
    ),
    "h264_qsv": Codec("h264_qsv", ("yuv420p",), 18, ("global_quality",), native=SHUFFLED),
    "hevc_qsv": Codec("hevc_qsv", ("yuv420p", "yuv420p10le"), 18, ("global_quality",), native=SHUFFLED),
    "av1_qsv": Codec("av1_qsv", ("yuv420p", "yuv420p10le"), 24, ("global_quality",), native=SHUFFLED),
    "h264_amf": Codec("h264_amf", ("yuv420p",), 18, ("qp_i", "qp_p", "qp_b"), options=AMF, native=SHUFFLED),
    "hevc_amf": Codec(
        "hevc_amf", ("yuv420p", "yuv420p10le"), 18, ("qp_i", "qp_p"), options=AMF, native=SHUFFLED
    ),
    "h264_videotoolbox": Codec(
        "h264_videotoolbox", ("yuv420p",), 65, ("global_quality",), 100, LAMBDA, APPLE, SHUFFLED
    ),
    "hevc_videotoolbox": Codec(
        "hevc_videotoolbox", ("yuv420p", "yuv420p10le"), 65, ("global_quality",), 100, LAMBDA, APPLE, SHUFFLED
    ),
}
"""Value of `--codec` -> encoder."""

INTRA_CODECS = ("prores", "ffv1", "png")
"""Codecs that encode each frame independently."""

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Suffix of the output file -> FFmpeg's name for the container."""


@dataclass(frozen=True)
class Encoding:
    """All the settings used to open an encoder."""

    codec: str
    pix_fmt: str
    options: Mapping[str, str]
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    colour: Colour
    aspect: Fraction | None

    @property
    def native_format(self) -> str:
        """The pixel format used to open the encoder."""
        return CODECS[self.codec].native.get(self.pix_fmt, self.pix_fmt)

    @property
    def reorder(self) -> int:
        """An upper bound on the number of frames by which reordering delays the encoder's output."""
        return 0 if self.codec in INTRA_CODECS else 16

    @property
    def segment_format(self) -> str:
        """The container for segments: MP4 if it supports the codec, because MP4 keeps timestamps exact."""
        return {"prores": "mov", "ffv1": "nut"}.get(self.codec, "mp4")


def choose_encoding(
    codec: str,
    pix_fmt: str | None,
    crf: int | None,
    info: SourceInfo,
    size: tuple[int, int],
) -> Encoding:
    """Return the settings for encoding at `size` (height, width); raises `VideoError` if none will work."""
    if codec not in CODECS:
        raise VideoError(f"unknown codec {codec!r}; use one of {', '.join(CODECS)}.")
    spec = CODECS[codec]
    pix_fmt = pix_fmt or default_format(spec, info.bits)
    if pix_fmt not in spec.formats:
        raise VideoError(
            f"{codec} does not support the pixel format {pix_fmt!r} here; use one of "
            f"{', '.join(spec.formats)}."
        )
    height, width = size
    layout = LAYOUTS[pix_fmt]
    if layout.bits < info.bits:
        log.warning(
            "reducing the bit depth from %d to %d because %s is written as %s",
            info.bits,
            layout.bits,
            codec,
            pix_fmt,
        )
    if width % layout.chroma_width or height % layout.chroma_height:
        raise VideoError(
            f"{pix_fmt} requires even dimensions, but the output is {width}x{height}: change the target size."
        )
    colour = output_colour(info.colour, spec, layout)
    options = encoder_options(codec, crf, info)
    if len(spec.sitings) > 1 and layout.chroma_height == 2:
        options["chroma_sample_location"] = colour.siting
    return Encoding(
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
        width=width,
        height=height,
        rate=info.rate,
        time_base=info.time_base,
        colour=colour,
        aspect=kept_aspect(info, width, height),
    )


def kept_aspect(info: SourceInfo, width: int, height: int) -> Fraction | None:
    """Return the pixel aspect ratio that keeps the picture's shape at a new size; None means square pixels.

    Rounding to whole pixels is not treated as a change of shape.
    """
    if abs(width * info.height - height * info.width) <= 2 * max(info.width, info.height):
        return info.aspect
    aspect = Fraction(info.width * height, info.height * width) * (info.aspect or 1)
    return None if aspect == 1 else aspect.limit_denominator(1000)


def default_format(spec: Codec, bits: int) -> str:
    """Return the format with the lowest sufficient bit depth, or the highest available; prefer 4:2:0."""
    depths = {LAYOUTS[name].bits for name in spec.formats}
    depth = min((d for d in depths if d >= bits), default=max(depths))
    return next(name for name in spec.formats if LAYOUTS[name].bits == depth)


def encoder_options(codec: str, crf: int | None, info: SourceInfo) -> dict[str, str]:
    """Return the encoder's private options; raises `VideoError` for a quality that it does not accept."""
    spec = CODECS[codec]
    options = dict(spec.options)
    if crf is not None and spec.crf is None:
        raise VideoError(f"{codec} has no quality setting: omit --crf.")
    if crf is not None and not 0 <= crf <= spec.crf_most:
        raise VideoError(f"{codec} accepts --crf values from 0 to {spec.crf_most}, not {crf}.")
    if spec.crf is not None:
        quality = str(spec.crf_unit * (spec.crf if crf is None else crf))
        options |= dict.fromkeys(spec.crf_names, quality)
    for key, value in hdr_options(codec, info).items():
        options[key] = f"{options[key]}:{value}" if key in options else value
    return options


HDR_OPTIONS = {
    "h264": ("x264-params", 50_000, 10_000, "mastering-display", "cll"),
    "h265": ("x265-params", 50_000, 10_000, "master-display", "max-cll"),
    "av1": ("svtav1-params", 1, 1, "mastering-display", "content-light"),
}
"""Codec -> option name, units per 1.0 of chromaticity, units per candela, and the option's two keys."""


def hdr_options(codec: str, info: SourceInfo) -> dict[str, str]:
    """Return the encoder option that writes the source's HDR10 data into the stream."""
    if not info.side_data:
        return {}
    if codec not in HDR_OPTIONS:
        log.warning(
            "writing %s without the source's HDR10 data (mastering display, light level), which only %s "
            "can store",
            codec,
            ", ".join(HDR_OPTIONS),
        )
        return {}
    key, chroma, light, display_name, level_name = HDR_OPTIONS[codec]
    found = []
    if data := info.side_data.get("MASTERING_DISPLAY_METADATA"):
        found.append(f"{display_name}={mastering_display(data, chroma, light)}")
    if data := info.side_data.get("CONTENT_LIGHT_LEVEL"):
        found.append("{}={},{}".format(level_name, *struct.unpack_from("=2I", data)))
    return {key: ":".join(found)}


def mastering_display(data: bytes, chroma: int, light: int) -> str:
    """Format FFmpeg's rationals for R, G, B, white and the luminance range as the encoders expect them."""
    numbers = struct.unpack_from("=20i", data)
    values = [Fraction(top, bottom or 1) for top, bottom in zip(numbers[::2], numbers[1::2], strict=True)]
    red, green, blue, white = (values[i : i + 2] for i in range(0, 8, 2))
    pairs = [(name, [v * chroma for v in pair]) for name, pair in zip("GBR", (green, blue, red), strict=True)]
    pairs += [("WP", [v * chroma for v in white]), ("L", [values[9] * light, values[8] * light])]
    number = round if chroma > 1 else float
    return "".join(f"{name}({number(a)},{number(b)})" for name, (a, b) in pairs)


def output_colour(colour: Colour, spec: Codec, layout: Layout) -> Colour:
    """Return the output's colour tags: the source's tags, but with a matrix that suits the pixel format.

    The chroma samples keep the source's position if the codec can signal it.
    """
    if layout.rgb:
        return replace(colour, matrix=RGB, full_range=True)
    kept = layout.chroma_height == 2 and colour.siting in spec.sitings
    colour = replace(colour, siting=colour.siting if kept else spec.sitings[0])
    if colour.matrix == RGB:
        return replace(colour, matrix=BT709, full_range=False)
    # ProRes cannot signal full range.
    return replace(colour, full_range=colour.full_range and spec.encoder != "prores_ks")


def check_encoder(encoding: Encoding, container: str) -> None:
    """Raise `VideoError` if the container does not support the codec or the encoder cannot be opened here."""
    import av

    check_opens(encoding.codec)
    refused = (
        f"{encoding.codec} cannot encode {encoding.width}x{encoding.height} as {encoding.pix_fmt} with "
        "these settings ({}): choose another --codec or --target."
    )
    if encoding.width < (narrowest := CODECS[encoding.codec].narrowest):
        raise VideoError(refused.format(f"frames must be at least {narrowest} pixels wide"))
    try:
        with av.open(io.BytesIO(), "w", format=container) as out:
            open_encoder(out, encoding).codec_context.open()
    except av.FFmpegError as error:
        raise VideoError(refused.format(error.strerror)) from error
    except ValueError as error:
        raise VideoError(
            f"{encoding.codec} cannot be written to {container} ({error}): choose another --codec or suffix."
        ) from error


def check_opens(codec: str) -> None:
    """Raise `VideoError` if an encoder cannot be opened on this machine."""
    if (reason := open_error(codec)) is not None:
        raise VideoError(
            f"the encoder {codec} cannot be opened on this machine ({reason}); use --codec to choose "
            f"one of these: {', '.join(name for name in CODECS if open_error(name) is None)}."
        )


@functools.cache
def open_error(codec: str) -> str | None:
    """Try to open an encoder for a small picture; return the reason for failure, or None on success."""
    import av

    spec = CODECS[codec]
    silence_svt()
    try:
        context: Any = av.CodecContext.create(spec.encoder, "w")
        context.width, context.height, context.pix_fmt = (
            256,
            256,
            spec.native.get(spec.formats[0], spec.formats[0]),
        )
        context.time_base, context.options = Fraction(1, 25), dict(spec.options)
        context.open()
    except ValueError:
        return "FFmpeg was built without it"
    except av.FFmpegError as error:
        return f"its hardware or driver is missing: {error.strerror}" if "_" in codec else error.strerror
    return None


def silence_svt() -> None:
    """Set the environment variable that makes SVT-AV1 log only errors instead of flooding stderr."""
    os.environ.setdefault("SVT_LOG", "1")


def open_encoder(container: Output, encoding: Encoding) -> Any:
    """Add a stream with the encoder to an open output container."""
    spec = CODECS[encoding.codec]
    silence_svt()
    stream = container.add_stream(spec.encoder, rate=encoding.rate, options=dict(encoding.options))
    stream.width, stream.height, stream.pix_fmt = encoding.width, encoding.height, encoding.native_format
    context = stream.codec_context
    context.time_base = encoding.time_base
    stream.time_base = encoding.time_base
    context.colorspace = encoding.colour.matrix
    context.color_primaries = encoding.colour.primaries
    context.color_trc = encoding.colour.transfer
    context.color_range = 2 if encoding.colour.full_range else 1
    if encoding.aspect is not None:
        context.sample_aspect_ratio = encoding.aspect
        stream.sample_aspect_ratio = encoding.aspect
    return stream
