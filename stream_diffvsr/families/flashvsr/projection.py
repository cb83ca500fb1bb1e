"""Projection of low-quality frames to the values that are added to the transformer's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNSHUFFLE = 16
KERNEL = (4, 3, 3)
FRAMES = 4
"""Frames per push; each push yields the tokens of one latent."""

V1, V11 = "v1", "v1.1"
VERSIONS = (V1, V11)

Past = tuple[Tensor, ...]
"""The last two time steps of each convolution's input; empty at the start, and always empty for v1."""


class ChannelNorm(nn.Module):
    """Root mean square normalisation over channels, with a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=1) * x.shape[1] ** 0.5 * self.gamma.float()).type_as(x)


class Projection(nn.Module):
    """Two convolutions over time and space, then a linear layer; parameter names match the published weights.

    Each convolution's input is preceded by two extra time steps. In v1, these are the last two of the same
    push, so nothing is carried over; in v1.1, they are the last two of the previous push.
    """

    def __init__(self, first: int, second: int, width: int, version: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3 * UNSHUFFLE**2, first, KERNEL, (2, 1, 1))
        self.norm1 = ChannelNorm(first)
        self.conv2 = nn.Conv3d(first, second, KERNEL, (2, 1, 1))
        self.norm2 = ChannelNorm(second)
        self.linear_layers = nn.ModuleList([nn.Linear(second, width)])
        self.version = version

    def forward(self, frames: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Project a push (4, 3, H, W) to the tokens (H/16, W/16, width) of one latent.

        Also return the `past` for the next push.
        """
        x = F.pixel_unshuffle(frames, UNSHUFFLE).transpose(0, 1)[None]
        kept = []
        for index, (conv, norm) in enumerate(((self.conv1, self.norm1), (self.conv2, self.norm2))):
            if self.version == V1:
                before = x[:, :, -2:]
            else:
                before = past[index] if past else x[:, :, :1].expand(-1, -1, 2, -1, -1)
                kept.append(x[:, :, -2:].contiguous())
            x = F.pad(torch.cat([before, x], 2), (1, 1, 1, 1, 0, 0), mode="replicate")
            x = F.silu(norm(conv(x)))
        return self.linear_layers[0](x[0, :, 0].permute(1, 2, 0)), tuple(kept)
