"""RAFT's iterative updates for a single pair of frames, returning only the final flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .correlation import LinearCorrelation

UPDATES = 12


def estimate(network: Any, current: Tensor, previous: Tensor, *, linear: bool) -> Tensor:
    """Estimate flow (1, 2, H, W) in pixels with torchvision's RAFT `network`; H and W are multiples of 8.

    The network's own `forward` computes the same flow, but it keeps every update's flow at full size, encodes
    both frames at once and keeps its correlation volume until the next call. With `linear`, the memory
    for correlations grows linearly with the number of pixels; otherwise, the volume of all pairs is computed.
    """
    fmap1, fmap2 = network.feature_encoder(current), network.feature_encoder(previous)
    correlation = (_linear if linear else _volume)(network.corr_block, fmap1, fmap2)
    hidden, context = _context(network, current)
    start = position = _grid(fmap1)
    # On the meta device, only memory is counted, and two updates need as much memory as all of them.
    for _ in range(2 if current.is_meta else UPDATES):
        # torchvision creates its offsets on the default device; copying them from a CPU would block.
        with current.device:
            matches = correlation.index_pyramid(centroids_coords=position)
        hidden, delta = network.update_block(hidden, context, matches, position - start)
        position = position + delta
    del correlation, context
    return _enlarge(network, position - start, hidden)


def _linear(block: Any, fmap1: Tensor, fmap2: Tensor) -> LinearCorrelation:
    correlation = LinearCorrelation(block.num_levels, block.radius)
    correlation.build_pyramid(fmap1, fmap2)
    return correlation


def _volume(block: Any, fmap1: Tensor, fmap2: Tensor) -> Any:
    """Return torchvision's block with its pyramid, built without a second copy of the volume."""
    volume = type(block)(num_levels=block.num_levels, radius=block.radius)
    channels, height, width = fmap1.shape[1:]
    pairs = (fmap1 / channels**0.5).flatten(2).transpose(1, 2) @ fmap2.flatten(2)
    volume.corr_pyramid = [pairs.view(height * width, 1, height, width)]
    for _ in range(block.num_levels - 1):
        volume.corr_pyramid.append(F.avg_pool2d(volume.corr_pyramid[-1], 2))
    return volume


def _context(network: Any, current: Tensor) -> tuple[Tensor, Tensor]:
    context = network.context_encoder(current)
    state = network.update_block.hidden_state_size
    hidden, context = context.split([state, context.shape[1] - state], dim=1)
    return torch.tanh(hidden), F.relu(context)


def _grid(like: Tensor) -> Tensor:
    """Return each pixel's own position, (1, 2, h, w), x first."""
    y, x = torch.meshgrid(
        *(torch.arange(side, device=like.device) for side in like.shape[-2:]), indexing="ij"
    )
    return torch.stack([x, y])[None].float()


def _enlarge(network: Any, flow: Tensor, hidden: Tensor) -> Tensor:
    """Enlarge the flow from an eighth of the size to full size."""
    from torchvision.models.optical_flow._utils import upsample_flow

    mask = None if network.mask_predictor is None else network.mask_predictor(hidden)
    return upsample_flow(flow, mask)
