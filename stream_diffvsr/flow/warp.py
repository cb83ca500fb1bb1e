"""Warp the previous frame onto the current frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """Sample `frame` bilinearly where `flow` points; positions outside the picture yield 0.

    `frame` is (1, C, H, W), and `flow` is (1, 2, H, W) in pixels, with channel 0 = dx; returns (1, C, H, W).
    The computation is always in float32, because half precision cannot even represent the pixel positions of
    a large frame.

    The reference normalises positions by W-1 but samples with align_corners=False, so zero flow is not the
    identity: it shifts the picture by amounts from -0.5 px at the left edge to +0.5 px at the right edge. The
    weights were trained with this shift, so it is kept for parity (tests/test_golden.py).
    """
    height, width = frame.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=torch.float32) + flow[:, 0].float()
    y = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None] + flow[:, 1].float()
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(frame.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def centred(flow: Tensor) -> Tensor:
    """Correct a flow for the shift in `warp`, so that `warp` samples exactly where the given `flow` points.

    (1, 2, H, W) -> (1, 2, H, W). Used for checkpoints trained with this correction, as stated in their index.
    """
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=torch.float32) + flow[:, 0] + 0.5
    y = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None] + flow[:, 1] + 0.5
    return flow + 0.5 - torch.stack([x / width, y / height], dim=1)
