"""Stabilise results by averaging them recursively along the motion wherever consecutive frames agree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...flow.bundled import FlowNetwork, enlarged_and_reduced, sample_with_inside

MOST = 0.9
"""Share of the previous result at `steady` 1; it is below 1 so that old content fades."""

MATCH = 0.12
"""Difference between the two LQ frames, in model range, at which trust falls to about a third."""

AGREE_PIXELS, AGREE_SHARE = 0.5, 0.05
"""Limits on the disagreement between forward and backward flow, in LQ pixels: its square must be less than
the square of the first limit plus the second limit times the sum of both squared lengths."""

WINDOW = 5
"""Side, in LQ pixels, of the window over which differences are averaged and trust is smoothed."""


def steadied(
    hq: Tensor, lq: Tensor, before: tuple[Tensor, Tensor], flow: FlowNetwork, steady: float
) -> Tensor:
    """Blend `hq` (1, 3, H, W) with the previous result; `before` contains the previous hq and lq."""
    previous_hq, previous_lq = before
    scale = hq.shape[-1] // lq.shape[-1]
    now, then = enlarged_and_reduced(lq), enlarged_and_reduced(previous_lq)
    there, back = flow(now, then), flow(then, now)
    moved, inside = sample_with_inside(torch.cat([previous_lq, back], 1), there)
    returned = moved[:, 3:]
    lengths = (there.square() + returned.square()).sum(1, keepdim=True)
    missed = (there + returned).square().sum(1, keepdim=True)
    agrees = inside * (missed < AGREE_PIXELS**2 + AGREE_SHARE * lengths)
    agrees = -F.max_pool2d(-agrees, 3, 1, 1)
    difference = mean((moved[:, :3] - lq).abs().mean(1, keepdim=True))
    trust = mean(agrees) * agrees * torch.exp(-(difference / MATCH).square())
    large = F.interpolate(torch.cat([there * scale, trust], 1), scale_factor=scale, mode="bilinear")
    warped, _ = sample_with_inside(previous_hq, large[:, :2])
    return hq + MOST * steady * large[:, 2:] * (warped - hq)


def mean(picture: Tensor) -> Tensor:
    return F.avg_pool2d(picture, WINDOW, 1, WINDOW // 2, count_include_pad=False)
