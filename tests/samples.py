"""Frames and a flow to feed the networks with."""

from __future__ import annotations

import torch

from stream_diffvsr.tensors import upsample


def shift_flow(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """A cheap flow that depends on both frames, so that mixing them up is seen."""
    difference = (current - previous).mean(1, keepdim=True)
    return torch.cat([2 * difference + 1, -difference], dim=1)


def moving(count: int, height: int = 12, width: int = 16, seed: int = 0) -> torch.Tensor:
    """A smooth random pattern that drifts, (N, 3, h, w) float32 in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, height // 4 + 4, width // 4 + count + 4), generator=generator) * 2 - 1
    wide = upsample(coarse).clamp(-1, 1)
    return torch.cat([wide[..., :height, 2 * i : 2 * i + width] for i in range(count)])
