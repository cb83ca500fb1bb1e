"""The model's input size and the output size, with one resampling step before the model and one after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import VideoError
from ..tensors import MINIMUM_SIDE, SCALE


@dataclass(frozen=True)
class Sizes:
    """The requested output size, set by one of target, short_edge and scale, or else by the model."""

    pre_scale: float = 1.0
    target: tuple[int, int] | None = None
    """(width, height)"""
    short_edge: int | None = None
    scale: float | None = None
    model_scale: float = SCALE
    """The factor by which the model enlarges a frame."""

    def __post_init__(self) -> None:
        given = [name for name in ("target", "short_edge", "scale") if getattr(self, name) is not None]
        if len(given) > 1:
            raise VideoError(f"{' and '.join(given)} were set: use only one to set the output's size.")
        numbers = [*(self.target or ()), self.short_edge or 1, self.scale or 1, self.pre_scale]
        if min(numbers) <= 0 or self.pre_scale > 1:
            raise VideoError("sizes and scales must be positive, and pre-scale must be at most 1.")

    def model(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the model's input; raises `VideoError` if it is too small."""
        height, width = round(height * self.pre_scale), round(width * self.pre_scale)
        if min(height, width) < MINIMUM_SIDE:
            raise VideoError(
                f"frames of {width}x{height} are too small: each side must be at least {MINIMUM_SIDE} pixels."
            )
        return height, width

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the output; sides computed from `short_edge` or `scale` are even numbers."""
        if self.target is not None:
            return self.target[1], self.target[0]
        if self.short_edge is not None:
            factor = self.short_edge / min(height, width)
        elif self.scale is not None:
            factor = self.scale
        else:
            height, width = self.model(height, width)
            return round(self.model_scale * height), round(self.model_scale * width)
        return max(2, 2 * round(height * factor / 2)), max(2, 2 * round(width * factor / 2))

    def model_scale_for(self, height: int, width: int) -> tuple[float, float]:
        """Return the scale (1 to 4) to request from a variable-scale model, and an extra factor for width.

        If the scales of both sides are between 1 and 4, the result needs no resampling.
        """
        sides = zip(self.output(height, width), self.model(height, width), strict=True)
        down, across = (a / b for a, b in sides)
        if min(down, across) >= 1 and max(down, across) <= 4:
            return down, across / down
        return min(4.0, max(1.0, down, across)), 1.0

    def to_model(self, rgb: Tensor) -> Tensor:
        """Resize (1, 3, h, w) in [0, 1] to the size of the model's input; the values stay in [0, 1]."""
        return resize(rgb, self.model(*rgb.shape[-2:]))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with antialiased bicubic interpolation, clamped to [0, 1]; return `x` if no change is needed."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge with plain bicubic interpolation, clamped to [0, 1]; used for alpha and for comparisons."""
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def split_screen(lq: Tensor, hq: Tensor) -> Tensor:
    """Join the left half of the enlarged source to the right half of the result, (1, 3, H, W) in [0, 1]."""
    height, width = hq.shape[-2:]
    half = width // 2
    return torch.cat([enlarge(lq, (height, width))[..., :half], hq[..., half:]], dim=-1)
