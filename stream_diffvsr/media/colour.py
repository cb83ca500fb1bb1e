"""Convert between code values and RGB, using float32 arithmetic so that nothing is reduced to 8 bits.

PyAV provides planes of integers; this module applies the matrix, the range and the chroma positions on the
tensors' device. Chroma is read and written at the position that the stream specifies, or by default at the
left sample of each luma pair, as in H.264 and H.265.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import VideoError
from .av_types import Frame

RGB, BT709, UNSPECIFIED, BT601, BT2020 = 0, 1, 2, 6, 9
"""The numbers that FFmpeg and ITU-T H.273 assign to matrices and primaries."""
FULL_RANGE, LIMITED_RANGE = 2, 1
HD_WIDTH, SD_LINES = 1280, 576
"""Untagged video that is at least this wide or has more than this many lines is read as BT.709, and any other
untagged video as BT.601, as players do."""
SITINGS = {
    "left": (0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0, 0),
    "top": (0.5, 0),
    "bottomleft": (0, 1),
    "bottom": (0.5, 1),
}
"""FFmpeg's name for a chroma sample's position among its luma samples -> the position (across, down)."""

LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
"""Matrix -> the weights of red and blue in luma."""


@dataclass(frozen=True)
class Colour:
    """How to interpret code values: a video stream's four tags, numbered as in ITU-T H.273."""

    matrix: int = UNSPECIFIED
    full_range: bool = False
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    siting: str = field(default="left", repr=False)
    """Position of the chroma samples, as a key of `SITINGS`."""

    def resolved(self, width: int, height: int) -> Colour:
        """Return the tags with a missing matrix filled in; raises `VideoError` for an unknown matrix."""
        if self.matrix == UNSPECIFIED:
            guess = BT709 if width >= HD_WIDTH or height > SD_LINES else BT601
            untagged = self.primaries == self.transfer == UNSPECIFIED
            return replace(
                self,
                matrix=guess,
                primaries=guess if untagged else self.primaries,
                transfer=guess if untagged else self.transfer,
            )
        if self.matrix != RGB and self.matrix not in LUMA_WEIGHTS:
            raise VideoError(
                f"the video uses colour matrix {self.matrix} (ITU-T H.273), but only "
                f"{', '.join(map(str, LUMA_WEIGHTS))} are supported: convert it first."
            )
        return self


@dataclass(frozen=True)
class Layout:
    """The bit depth of an output pixel format, and the factors by which its chroma planes are reduced."""

    bits: int
    chroma_width: int
    chroma_height: int
    rgb: bool = False


LAYOUTS = {
    "yuv420p": Layout(8, 2, 2),
    "yuv422p": Layout(8, 2, 1),
    "yuv444p": Layout(8, 1, 1),
    "yuv420p10le": Layout(10, 2, 2),
    "yuv422p10le": Layout(10, 2, 1),
    "yuv444p10le": Layout(10, 1, 1),
    "yuv420p12le": Layout(12, 2, 2),
    "yuv422p12le": Layout(12, 2, 1),
    "yuv444p12le": Layout(12, 1, 1),
    "yuv420p16le": Layout(16, 2, 2),
    "yuv422p16le": Layout(16, 2, 1),
    "yuv444p16le": Layout(16, 1, 1),
    "gbrp10le": Layout(10, 1, 1, rgb=True),
    "gbrp12le": Layout(12, 1, 1, rgb=True),
    "gbrp16le": Layout(16, 1, 1, rgb=True),
    "rgb24": Layout(8, 1, 1, rgb=True),
    "rgb48be": Layout(16, 1, 1, rgb=True),
}

PAIRED = {"nv12": 0, "p010le": 6}
"""4:2:0 formats with interleaved chroma, as hardware requires -> number of bits by which to shift values."""


@dataclass(frozen=True, eq=False)
class Planes:
    """Copies of a decoded frame's code values, which take up an eighth of the memory of float32 RGB."""

    values: tuple[np.ndarray, ...]
    """One plane (h, w) per component, as uint8 or int32; alpha comes last."""
    bits: tuple[int, ...]
    is_rgb: bool
    has_alpha: bool
    size: tuple[int, int]
    """(height, width)"""
    colour: Colour

    def to_rgb(self, device: torch.device | str = "cpu", step: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return RGB (1, 3, h, w) and alpha (1, 1, h, w) or None, as float32 in [0, 1], computed on `device`.

        With a `step`, RGB contains only every step-th row and column, starting with the first.
        """
        planes = [
            (torch.from_numpy(values).to(device).float()[None, None], bits)
            for values, bits in zip(self.values, self.bits, strict=True)
        ]
        alpha = None
        if self.has_alpha:
            values, bits = planes.pop()
            alpha = values / (2**bits - 1)
        if self.is_rgb:
            rgb = torch.cat([values / (2**bits - 1) for values, bits in planes], dim=1)
            return rgb[:, :, ::step, ::step], alpha
        return yuv_to_rgb(planes, self.colour, self.size, step), alpha

    def checksum(self) -> int:
        """Return a checksum of the values, for telling frames apart."""
        total = 0
        for values in self.values:
            total = zlib.crc32(values.tobytes(), total)
        return total


def planes_of(frame: Frame, colour: Colour) -> Planes:
    """Return the code values of a decoded `av.VideoFrame`."""
    frame = planar(frame)
    components = frame.format.components
    return Planes(
        tuple(read_plane(frame, component) for component in components),
        tuple(component.bits for component in components),
        frame.format.is_rgb,
        components[-1].is_alpha,
        (frame.height, frame.width),
        colour,
    )


def frame_to_rgb(frame: Frame, colour: Colour) -> tuple[Tensor, Tensor | None]:
    """Convert an `av.VideoFrame` to RGB (1, 3, h, w) and alpha (1, 1, h, w) or None, float32 in [0, 1]."""
    return planes_of(frame, colour).to_rgb()


def planar(frame: Frame) -> Any:
    """Return a frame with the same values, stored as one plane of little-endian integers per component."""
    layout = frame.format
    one_each = {c.plane for c in layout.components} == set(range(len(layout.components)))
    if one_each and not (layout.has_palette or layout.is_big_endian) and layout.components[0].bits <= 16:
        return frame
    return frame.reformat(format=planar_name(layout, frame.width, frame.height))


def planar_name(layout: Any, width: int, height: int) -> str:
    """Return the planar format that preserves the values of a packed format."""
    components = layout.components
    deep = max(c.bits for c in components) > 8
    alpha = "a" if layout.has_palette or components[-1].is_alpha else ""
    if layout.is_rgb or layout.has_palette:
        return f"gbr{alpha}p" + ("16le" if deep else "")
    if len(components) < 3:
        return ("yuva444p" if alpha else "gray") + ("16le" if deep else "")
    halves = (components[1].width < width) + (components[1].height < height)
    depth = f"{max(10, components[0].bits)}le" if deep else ""
    return f"yuv{alpha}{('444', '422', '420')[halves]}p{depth}"


def read_plane(frame: Frame, component: Any) -> np.ndarray:
    """Return a copy of one component (h, w), as uint8, or as int32 if it has more than 8 bits."""
    plane = frame.planes[component.plane]
    kind = np.dtype(np.uint8 if component.bits <= 8 else np.uint16)
    rows = np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind.itemsize)
    return rows[: component.height, : component.width].astype(np.uint8 if component.bits <= 8 else np.int32)


STRIP = 64
"""Number of rows that a CPU converts at a time, so that intermediate results stay in its cache."""


def yuv_to_rgb(
    planes: list[tuple[Tensor, int]], colour: Colour, size: tuple[int, int], skip: int = 1
) -> Tensor:
    """Convert luma and two chroma planes, each with its bit depth, to RGB (1, 3, h, w) in [0, 1].

    Without chroma planes, the result is grey. Only every `skip`-th row and column is converted.
    """
    (luma, bits), *chroma = planes
    luma = luma[:, :, ::skip, ::skip]
    step = 2.0 ** (bits - 8)
    black, white = (0.0, 2.0**bits - 1) if colour.full_range else (16 * step, 219 * step)
    if not chroma:
        return ((luma - black) / white).clamp(0, 1).expand(-1, 3, -1, -1)
    span = 2**bits - 1 if colour.full_range else 224 * step
    weight_red, weight_blue = LUMA_WEIGHTS[colour.matrix]
    rgb = luma.new_empty(1, 3, *luma.shape[2:])
    strip = STRIP if luma.device.type == "cpu" else size[0]
    between = [[at[::skip] for at in _between(p, size, colour.siting)] for p, _ in chroma]
    for top in range(0, luma.shape[2], strip):
        grey = (luma[:, :, top : top + strip] - black) / white
        blue, red = (
            (_upsample(p, rows[top : top + strip], columns) - 128 * step) / span
            for (p, _), (rows, columns) in zip(chroma, between, strict=True)
        )
        red = grey + 2 * (1 - weight_red) * red
        blue = grey + 2 * (1 - weight_blue) * blue
        green = (grey - weight_red * red - weight_blue * blue) / (1 - weight_red - weight_blue)
        torch.cat([red, green, blue], dim=1, out=rgb[:, :, top : top + strip]).clamp_(0, 1)
    return rgb


def upsample_chroma(plane: Tensor, size: tuple[int, int], siting: str = "left") -> Tensor:
    """Enlarge a plane (1, 1, h', w') to (1, 1, *size), interpolating linearly between sample positions."""
    return _upsample(plane, *_between(plane, size, siting))


def _between(plane: Tensor, size: tuple[int, int], siting: str) -> tuple[Tensor, Tensor]:
    """Return where the picture's rows and columns lie among a plane's samples, clamped to its edges."""
    found = []
    for length, have, place in zip(size, plane.shape[-2:], reversed(SITINGS[siting]), strict=True):
        factor = -(-length // have)
        positions = (torch.arange(length, device=plane.device) - place * (factor - 1)) / factor
        found.append(positions.clamp(0, have - 1))
    return found[0], found[1]


def _upsample(plane: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _lerp(_lerp(plane, rows, -2), columns, -1)


def _lerp(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Interpolate linearly between the samples along one axis."""
    low = positions.long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    share = (positions - low).reshape([-1 if axis == dim % x.ndim else 1 for axis in range(x.ndim)])
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)


def rgb_to_planes(rgb: Tensor, name: str, colour: Colour) -> list[np.ndarray]:
    """Convert RGB (1, 3, H, W) in [0, 1] to the planes of a format in `LAYOUTS`, rounded half to even.

    For an RGB format, return a single array (H, W, 3).
    """
    return [samples(plane, name) for plane in to_planes(rgb, name, colour)]


def to_planes(rgb: Tensor, name: str, colour: Colour) -> list[Tensor]:
    """Like `rgb_to_planes`, but return uint8 or int32 tensors on the device of `rgb`."""
    layout = LAYOUTS[name]
    top = 2**layout.bits - 1
    if layout.rgb:
        return [_whole(rgb[0].movedim(0, -1) * top, layout.bits)]
    weight_red, weight_blue = LUMA_WEIGHTS[colour.matrix]
    red, green, blue = rgb.split(1, dim=1)
    luma = weight_red * red + (1 - weight_red - weight_blue) * green + weight_blue * blue
    chroma = [(blue - luma) / (2 * (1 - weight_blue)), (red - luma) / (2 * (1 - weight_red))]
    chroma = [downsample_chroma(plane, layout, colour.siting) for plane in chroma]
    step = 2.0 ** (layout.bits - 8)
    luma = luma * top if colour.full_range else luma * (219 * step) + 16 * step
    span = top if colour.full_range else 224 * step
    planes = [luma, *(plane * span + 128 * step for plane in chroma)]
    return [_whole(plane[0, 0], layout.bits) for plane in planes]


def downsample_chroma(plane: Tensor, layout: Layout, siting: str = "left") -> Tensor:
    """Reduce a full-size plane (1, 1, H, W) to chroma size, averaging around each sample's position."""
    x, y = SITINGS[siting]
    if layout.chroma_width == 2:
        plane = _halve(plane, x)
    if layout.chroma_height == 2:
        plane = _halve(plane.transpose(-1, -2), y).transpose(-1, -2)
    return plane


def _halve(plane: Tensor, place: float) -> Tensor:
    """Halve the number of columns: average pairs if samples lie midway, else use 1-2-1 weights."""
    # Use slices rather than a convolution, which would run in TF32 on some GPUs.
    first, second = plane[..., ::2], plane[..., 1::2]
    if plane.shape[-1] % 2:
        second = torch.cat([second, plane[..., -1:]], dim=-1)
    if place == 0.5:
        return (first + second) / 2
    if place == 0:
        before = torch.cat([first[..., :1], second[..., :-1]], dim=-1)
        return (before + 2 * first + second) / 4
    after = torch.cat([first[..., 1:], second[..., -1:]], dim=-1)
    return (first + 2 * second + after) / 4


def _whole(values: Tensor, bits: int) -> Tensor:
    """Round half to even, and clamp to the range of the bit depth."""
    return values.round().clamp(0, 2**bits - 1).to(torch.uint8 if bits <= 8 else torch.int32)


def samples(plane: Tensor, name: str) -> np.ndarray:
    """Return a plane of a format in `LAYOUTS` as a uint8 or uint16 array."""
    return plane.cpu().numpy().astype(np.uint8 if LAYOUTS[name].bits <= 8 else np.uint16, copy=False)


def planes_to_frame(planes: list[np.ndarray], name: str) -> Any:
    """Return an `av.VideoFrame` made from the planes, in a format from `LAYOUTS` or `PAIRED`."""
    import av

    height, width = planes[0].shape[:2]
    frame: Any = av.VideoFrame(width, height, name)
    if name in PAIRED:
        # FFmpeg's own conversion to these formats is not always exact.
        pairs = np.stack(planes[1:], axis=-1).reshape(planes[1].shape[0], -1)
        planes = [plane << PAIRED[name] for plane in (planes[0], pairs)]
    elif LAYOUTS[name].rgb:
        planes = _interleave(planes[0], name)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.frombuffer(plane, values.dtype).reshape(-1, plane.line_size // values.itemsize)
        rows[: values.shape[0], : values.shape[1]] = values
    return frame


def _interleave(picture: np.ndarray, name: str) -> list[np.ndarray]:
    """Return RGB (H, W, 3) as the single plane of a packed format, or as planes in the order G, B, R."""
    if name.startswith("gbr"):
        return [picture[..., channel] for channel in (1, 2, 0)]
    packed = picture.reshape(picture.shape[0], -1)
    return [packed.byteswap() if name.endswith("be") else packed]
