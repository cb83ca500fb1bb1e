"""Adjust how closely a result follows its LQ frame: colour fixes, and the model's strength."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_FIXES = ("model", "none", "lab", "wavelet", "adain")
LEVELS = 5
"""Levels of the low-pass filter. Each doubles its reach; 5 keep colour areas of about 30 pixels or more."""


def adain(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Match each channel's mean and standard deviation in `hq` to those in `lq_up`, both (1, 3, H, W)."""
    (var, mean), (var_lq, mean_lq) = (
        torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (hq, lq_up)
    )
    eps = 1e-5
    return (hq - mean) / (var + eps).sqrt() * (var_lq + eps).sqrt() + mean_lq


def lab(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Match the broad hue and saturation of `hq` to those of `lq_up`, both (1, 3, H, W).

    Brightness and finer colour detail are kept.
    """
    (light, colour), (_, wanted) = (_to_lab(x).split((1, 2), 1) for x in (hq, lq_up))
    return _from_lab(torch.cat([light, colour + _low_pass(wanted - colour)], 1))


def wavelet(hq: Tensor, lq_up: Tensor) -> Tensor:
    """Replace the low frequencies of `hq` with those of `lq_up`, both (1, 3, H, W); keep the high ones."""
    return hq + _low_pass(lq_up - hq)


def _low_pass(x: Tensor) -> Tensor:
    """Apply the stationary wavelet's low-pass kernel, 1 2 1, doubling the pixel spacing at each level."""
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
"""The matrix from linear sRGB to CIE XYZ."""
TO_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
"""The matrix from the cube roots of white-relative XYZ to CIELAB, with an L that is 16 too high."""
KNEE = 6 / 29
"""Where the cube root is below this, CIELAB uses a straight line instead."""


def _mix(x: Tensor, rows: Tensor) -> Tensor:
    """Multiply each pixel's channels by a (3, 3) matrix."""
    return torch.einsum("ij,njhw->nihw", rows, x)


def _matrices(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix from linear sRGB to white-relative XYZ, whose rows sum to 1, and TO_LAB."""
    xyz, to_lab = (torch.tensor(rows, dtype=x.dtype, device=x.device) for rows in (TO_XYZ, TO_LAB))
    return xyz / xyz.sum(1, keepdim=True), to_lab


def _to_lab(rgb: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to CIELAB, with an L that is 16 too high."""
    xyz, to_lab = _matrices(rgb)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    each = _mix(linear, xyz)
    root = each.clamp(min=KNEE**3) ** (1 / 3)
    return _mix(torch.where(each > KNEE**3, root, each / (3 * KNEE**2) + 4 / 29), to_lab)


def _from_lab(lab: Tensor) -> Tensor:
    """Reverse `_to_lab`, clipping colours outside sRGB at 0."""
    xyz, to_lab = _matrices(lab)
    root = _mix(lab, torch.linalg.inv(to_lab))
    linear = _mix(torch.where(root > KNEE, root**3, 3 * KNEE**2 * (root - 4 / 29)), torch.linalg.inv(xyz))
    linear = linear.clamp(min=0)
    bright = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, bright)


def apply_fidelity(hq: Tensor, lq_up: Tensor, colour_fix: str, strength: float) -> Tensor:
    """Fix the colours of the model's result, then blend it with the enlarged LQ frame.

    All pictures are (1, 3, H, W) in [0, 1]. A `strength` of 1 keeps the result, 0 returns `lq_up`, and more
    than 1 extrapolates.
    """
    fix = {"lab": lab, "wavelet": wavelet, "adain": adain}.get(colour_fix)
    hq = fix(hq, lq_up).clamp(0, 1) if fix else hq
    return torch.lerp(lq_up, hq, strength).clamp(0, 1)
