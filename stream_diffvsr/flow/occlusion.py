"""How much to trust the previous frame: flow must agree in both directions and join matching pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tensors import upsample

AGREE_PIXELS, AGREE_SHARE = 2.5, 0.05
"""The distance, in HQ pixels, by which a pixel may miss its starting point after following the flow there and
back; the square of this limit is increased by the given share of both flows' squared lengths."""

MATCH, CONTRAST = 0.04, 0.15
"""Largest difference allowed between two LQ frames along the flow (averaged over channels, in model range),
and the share of the local contrast that is added to it, since small shifts change edges and fine lines."""

ERODE, FEATHER = 5, 5
"""Number of HQ pixels by which untrusted areas are enlarged, and over which trust then fades."""


def mask(lq: Tensor, previous: Tensor, flow: Tensor, back: Tensor | None, scale: int) -> Tensor:
    """Return how much to trust each pixel of the warped previous frame, from 0 (not at all) to 1 (fully).

    `lq` and `previous` are (1, 3, h, w) in model range. `flow`, (1, 2, H, W), points from `lq` back to
    `previous`, in pixels of the large frame (H = scale * h). `back` is the flow from `previous` to `lq`, or
    None if the caller supplied the flow, in which case only the frames are compared. Pixels that have moved
    in from outside the picture are not trusted. The result is (1, 1, H, W), float32.
    """
    now, before = upsample(lq, scale), upsample(previous, scale)
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=torch.float32) + flow[:, :1]
    y = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None] + flow[:, 1:]
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    grid = torch.cat([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=1).movedim(1, -1)

    def along(picture: Tensor) -> Tensor:
        return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)

    grey = lq.mean(1, keepdim=True)
    contrast = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)
    allowed = MATCH + CONTRAST * F.interpolate(contrast, (height, width))
    good = inside & ((along(before) - now).abs().mean(1, keepdim=True) < allowed)
    if back is not None:
        returned = along(back)
        lengths = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
        missed = (flow + returned).square().sum(1, keepdim=True)
        good &= missed < AGREE_PIXELS**2 + AGREE_SHARE * lengths
    # Shrink trusted areas, since networks look around each pixel, then fade the trust to hide the edge.
    bad = _by_axis(F.max_pool2d, (~good).float(), ERODE)
    return 1 - _by_axis(partial(F.avg_pool2d, count_include_pad=False), bad, FEATHER)


def _by_axis(pool: Callable[..., Tensor], picture: Tensor, radius: int) -> Tensor:
    """Pool over the square around each pixel, first along columns and then along rows, which is faster."""
    tall = pool(picture, (2 * radius + 1, 1), 1, (radius, 0))
    return pool(tall, (1, 2 * radius + 1), 1, (0, radius))
