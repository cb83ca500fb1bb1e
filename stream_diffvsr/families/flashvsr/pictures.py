"""Frames on their way in and out: their size, their groups and their colours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .projection import FRAMES


def groups(frames: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Four by four."""
    return [frames[at : at + FRAMES] for at in range(0, len(frames), FRAMES)]


def scaled(lq: Tensor, scale: float) -> tuple[int, int]:
    """Height and width of a frame's result."""
    return round(lq.shape[-2] * scale), round(lq.shape[-1] * scale)


def enlarge(lq: Tensor, scale: float) -> Tensor:
    """A frame at the size of its result: bicubic (a = -0.5), without overshoot; by 1 the frame itself."""
    size = scaled(lq, scale)
    if size == (lq.shape[-2], lq.shape[-1]):
        return lq
    return F.interpolate(lq, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def adain(hq: Tensor, lq: Tensor) -> Tensor:
    """Give (1, 3, H, W) the mean and deviation of each channel of `lq`; clamped to [-1, 1]."""
    (var, mean), (var_lq, mean_lq) = (torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (hq, lq))
    eps = 1e-5
    return ((hq - mean) / (var + eps).sqrt() * (var_lq + eps).sqrt() + mean_lq).clamp(-1, 1)
