"""Frames on their way in and out: their size and their groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .projection import FRAMES


def groups(frames: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Four by four."""
    return [frames[at : at + FRAMES] for at in range(0, len(frames), FRAMES)]


def enlarge(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """A frame at the size of its result: bicubic (a = -0.5), without overshoot; unchanged where it fits."""
    if size == (lq.shape[-2], lq.shape[-1]):
        return lq
    return F.interpolate(lq, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
