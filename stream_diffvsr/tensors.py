"""What each tensor means, and the conversions at the borders.

| name     | shape             | range and unit                                                          |
|----------|-------------------|-------------------------------------------------------------------------|
| lq       | (1, 3, h, w)      | model range: nominal [-1, 1], finite values outside pass unclamped      |
| lq_up    | (1, 3, 4h, 4w)    | bicubic x4 of lq, with its overshoot                                    |
| hq       | (1, 3, 4h, 4w)    | model range, not clamped                                                |
| flow     | (1, 2, 4h, 4w)    | pixels; channel 0 is dx; where a pixel was in the previous frame        |
| warped   | (1, 3, 4h, 4w)    | the previous hq pulled along flow; outside is 0, mid grey               |
| latents  | (1, 4, h', w')    | noise to result; h', w' are h, w padded to multiples of 4               |
| features | list of (1, C, ., .) | of warped, pooled 4x4, coarse to fine, for the decoder's TPM         |
| pixels   | (1, 3, H, W)      | [0, 1], clamped                                                         |

All are float32, RGB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import IncompatibleInputError

SCALE = 4
"""One LQ pixel becomes a square of this side."""

LATENT_MULTIPLE = 4
"""The TPM pools 4x4 at latent size too, so padded frames have sides of this multiple."""

MINIMUM_SIDE = 8
"""Smallest LQ side."""


def to_pixels(hq: Tensor) -> Tensor:
    """Model range -> [0, 1], clamped. Any shape, float32."""
    return (hq / 2 + 0.5).clamp(0, 1)


def from_pixels(pixels: Tensor) -> Tensor:
    """[0, 1] -> model range [-1, 1]. Any shape, float32."""
    return pixels * 2 - 1


def upsample(lq: Tensor, scale: float = SCALE) -> Tensor:
    """Bicubic as in the reference: a = -0.75, no antialiasing, not clamped; a factor of 1 changes nothing."""
    return lq if scale == 1 else F.interpolate(lq, scale_factor=scale, mode="bicubic", align_corners=False)


def padded_size(height: int, width: int, multiple: int = LATENT_MULTIPLE) -> tuple[int, int]:
    """Height and width rounded up to multiples of `multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Extend (1, C, H, W) at the right and the bottom by repeating its last column and row."""
    down, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


def check_frame(lq: Tensor) -> None:
    """Raise `IncompatibleInputError` unless it is an LQ frame."""
    needed = f"an LQ frame must be (1, 3, h, w) in float32 with sides of at least {MINIMUM_SIDE}"
    if not isinstance(lq, Tensor):
        raise IncompatibleInputError(f"{needed}, not {type(lq).__name__}")
    height, width = lq.shape[-2:] if lq.ndim == 4 else (0, 0)
    if lq.shape[:2] != (1, 3) or min(height, width) < MINIMUM_SIDE or lq.dtype != torch.float32:
        raise IncompatibleInputError(f"{needed}, not {tuple(lq.shape)} in {lq.dtype}")
    check_finite(lq, "LQ frame")


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; checking only the extremes takes a tenth of the time."""
    return bool(torch.isfinite(torch.stack([x.amin(), x.amax()])).all())


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which would spread to every later frame."""
    if not is_finite(x):
        count = int((~torch.isfinite(x)).sum())
        raise IncompatibleInputError(f"{name} has {count} values that are NaN or infinite")


def check_shape(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse a tensor of another shape, another dtype than float32, or with values that are not finite."""
    if not isinstance(x, Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
        got = f"{tuple(x.shape)} in {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise IncompatibleInputError(f"{name} must have the shape {shape} in float32, not {got}")
    check_finite(x, name)
