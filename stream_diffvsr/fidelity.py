"""How near a result stays to its LQ frame: its colours, and the strength of the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_FIXES = ("model", "none", "wavelet", "adain")
LEVELS = 5
"""Of the low-pass: each doubles the reach, so that 5 leave colours of about 30 pixels and more."""


def adain(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Give (1, 3, H, W) the mean and deviation of each channel of `lq_up`, which has the same size."""
    (var, mean), (var_lq, mean_lq) = (
        torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (hq, lq_up)
    )
    eps = 1e-5
    return (hq - mean) / (var + eps).sqrt() * (var_lq + eps).sqrt() + mean_lq


def wavelet(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Give (1, 3, H, W) the low frequencies of `lq_up`, which has the same size; all finer ones stay."""
    return hq + _low_pass(lq_up - hq)


def _low_pass(x: Tensor) -> Tensor:
    """Low-pass by the stationary wavelet's kernel 1 2 1, each level over pixels twice as far apart."""
    for level in range(LEVELS):
        for axis in (2, 3):
            reach = 2**level
            shape = [x.shape[-2], x.shape[-1]]
            padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
            wide = F.pad(x, padding, mode="replicate")
            before, here, after = (wide.narrow(axis, at * reach, shape[axis - 2]) for at in range(3))
            x = (before + 2 * here + after) / 4
    return x


def apply_fidelity(hq: Tensor, lq_up: Tensor, colour_fix: str, strength: float) -> Tensor:
    """The model's result with its colours fixed, then mixed with the enlarged frame.

    All (1, 3, H, W) in [0, 1]. `strength` 1 keeps the result, 0 gives `lq_up`, more than 1 goes beyond.
    """
    fix = {"wavelet": wavelet, "adain": adain}.get(colour_fix)
    hq = fix(hq, lq_up).clamp(0, 1) if fix else hq
    return torch.lerp(lq_up, hq, strength).clamp(0, 1)
