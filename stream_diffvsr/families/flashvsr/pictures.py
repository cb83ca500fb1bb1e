"""Helpers that group and enlarge frames."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .projection import FRAMES


def groups(frames: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Split frames into groups of four."""
    return [frames[at : at + FRAMES] for at in range(0, len(frames), FRAMES)]


def enlarge(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge a frame to `size` (bicubic, a = -0.5) and clamp it, unless it already has that size."""
    if size == (lq.shape[-2], lq.shape[-1]):
        return lq
    return F.interpolate(lq, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
