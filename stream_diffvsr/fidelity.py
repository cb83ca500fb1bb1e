"""How close a result stays to its LQ frame: its colours, and the strength of the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_FIXES = ("model", "none", "lab", "wavelet", "adain")
LEVELS = 5
"""Of the low-pass: each doubles the reach, so that 5 leave colours of about 30 pixels and more."""


def adain(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Give (1, 3, H, W) the mean and deviation of each channel of `lq_up`, which has the same size."""
    (var, mean), (var_lq, mean_lq) = (
        torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (hq, lq_up)
    )
    eps = 1e-5
    return (hq - mean) / (var + eps).sqrt() * (var_lq + eps).sqrt() + mean_lq


def lab(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Give (1, 3, H, W) the broad hue and saturation of `lq_up`; brightness and all finer colours stay."""
    (light, colour), (_, wanted) = (_to_lab(x).split((1, 2), 1) for x in (hq, lq_up))
    return _from_lab(torch.cat([light, colour + _low_pass(wanted - colour)], 1))


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


TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
"""Linear sRGB to CIE XYZ."""
TO_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
"""The cube roots of XYZ over white to CIELAB, whose L is left 16 higher."""
KNEE = 6 / 29
"""Below it, CIELAB goes on in a straight line instead of the cube root."""


def _mix(x: Tensor, rows: Tensor) -> Tensor:
    """Each pixel's channels by a matrix (3, 3)."""
    return torch.einsum("ij,njhw->nihw", rows, x)


def _matrices(x: Tensor) -> tuple[Tensor, Tensor]:
    """Linear sRGB to XYZ over white, whose rows sum to 1, and on to CIELAB."""
    xyz, to_lab = (torch.tensor(rows, dtype=x.dtype, device=x.device) for rows in (TO_XYZ, TO_LAB))
    return xyz / xyz.sum(1, keepdim=True), to_lab


def _to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIELAB, its L 16 higher."""
    xyz, to_lab = _matrices(rgb)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    each = _mix(linear, xyz)
    root = each.clamp(min=KNEE**3) ** (1 / 3)
    return _mix(torch.where(each > KNEE**3, root, each / (3 * KNEE**2) + 4 / 29), to_lab)


def _from_lab(lab: Tensor) -> Tensor:
    """The reverse; colours that sRGB does not have are cut off at 0."""
    xyz, to_lab = _matrices(lab)
    root = _mix(lab, torch.linalg.inv(to_lab))
    linear = _mix(torch.where(root > KNEE, root**3, 3 * KNEE**2 * (root - 4 / 29)), torch.linalg.inv(xyz))
    linear = linear.clamp(min=0)
    bright = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, bright)


def apply_fidelity(hq: Tensor, lq_up: Tensor, colour_fix: str, strength: float) -> Tensor:
    """The model's result with its colours fixed, then mixed with the enlarged frame.

    All (1, 3, H, W) in [0, 1]. `strength` 1 keeps the result, 0 gives `lq_up`, more than 1 goes beyond.
    """
    fix = {"lab": lab, "wavelet": wavelet, "adain": adain}.get(colour_fix)
    hq = fix(hq, lq_up).clamp(0, 1) if fix else hq
    return torch.lerp(lq_up, hq, strength).clamp(0, 1)
