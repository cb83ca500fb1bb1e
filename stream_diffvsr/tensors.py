"""The meaning of each tensor, and the conversions at the engine's inputs and outputs.

| name     | shape             | range and unit                                                          |
|----------|-------------------|-------------------------------------------------------------------------|
| lq       | (1, 3, h, w)      | model range: nominally [-1, 1]; finite values outside are not clamped   |
| lq_up    | (1, 3, 4h, 4w)    | lq enlarged x4, bicubic with overshoot                                  |
| hq       | (1, 3, 4h, 4w)    | model range, not clamped                                                |
| flow     | (1, 2, 4h, 4w)    | pixels; channel 0 is dx; points to a pixel's previous position          |
| warped   | (1, 3, 4h, 4w)    | the previous hq warped by flow; 0 (mid grey) outside the picture        |
| latents  | (1, 4, h', w')    | from noise to result; h', w' are h, w padded to multiples of 4          |
| features | list of (1, C, ., .) | from warped, pooled 4x4, coarse to fine, for the decoder's TPM       |
| pixels   | (1, 3, H, W)      | [0, 1], clamped                                                         |

All tensors are float32, and pictures are RGB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import IncompatibleInputError

SCALE = 4
"""The upscaling factor: one LQ pixel becomes a square of this side length."""

LATENT_MULTIPLE = 4
"""Frames are padded to multiples of this, since the TPM pools 4x4 at latent size too."""

MINIMUM_SIDE = 8
"""The smallest side of an LQ frame."""


def to_pixels(hq: Tensor) -> Tensor:
    """Convert float32 values of any shape from model range to [0, 1], and clamp them."""
    return (hq / 2 + 0.5).clamp(0, 1)


def from_pixels(pixels: Tensor) -> Tensor:
    """Convert float32 values of any shape from [0, 1] to model range, [-1, 1]."""
    return pixels * 2 - 1


def upsample(lq: Tensor, scale: float = SCALE) -> Tensor:
    """Enlarge bicubically like the reference (a = -0.75, no antialiasing or clamping); scale 1 is a no-op."""
    return lq if scale == 1 else F.interpolate(lq, scale_factor=scale, mode="bicubic", align_corners=False)


def padded_size(height: int, width: int, multiple: int = LATENT_MULTIPLE) -> tuple[int, int]:
    """Return the height and width, each rounded up to a multiple of `multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Extend (1, C, H, W) on the right and at the bottom by repeating its last column and row."""
    down, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


def check_frame(lq: Tensor) -> None:
    """Raise `IncompatibleInputError` unless `lq` is a valid LQ frame."""
    needed = f"an LQ frame must be float32 with shape (1, 3, h, w) and sides of at least {MINIMUM_SIDE}"
    if not isinstance(lq, Tensor):
        raise IncompatibleInputError(f"{needed}, not {type(lq).__name__}")
    height, width = lq.shape[-2:] if lq.ndim == 4 else (0, 0)
    if lq.shape[:2] != (1, 3) or min(height, width) < MINIMUM_SIDE or lq.dtype != torch.float32:
        raise IncompatibleInputError(f"{needed}, not {tuple(lq.shape)} in {lq.dtype}")
    check_finite(lq, "LQ frame")


def is_finite(x: Tensor) -> bool:
    """Whether all values are finite; checking only the minimum and maximum takes a tenth of the time."""
    return bool(torch.isfinite(torch.stack([x.amin(), x.amax()])).all())


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which would spread to every later frame."""
    if not is_finite(x):
        count = int((~torch.isfinite(x)).sum())
        raise IncompatibleInputError(f"{name} has {count} values that are NaN or infinite")


def check_shape(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Check that a tensor has the given shape, is float32 and has only finite values."""
    if not isinstance(x, Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
        got = f"{tuple(x.shape)} in {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise IncompatibleInputError(f"{name} must have the shape {shape} in float32, not {got}")
    check_finite(x, name)
