"""Decoders, which turn one latent at a time into pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..wan.taehv import Memory, Squash, conv, decoded, enlarging, relu

CONDITION = 8
"""Factor by which the LQ frames that condition the decoder are pixel-unshuffled."""


class TinyDecoder(nn.Module):
    """FlashVSR's small decoder, which also takes LQ frames; parameter names match the published weights."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        first, last = channels[0], channels[-1]
        into = 16 + 3 * 4 * CONDITION**2
        layers = [Squash(), conv(into, first, True), relu(), conv(first, first), relu()]
        layers += [*enlarging(channels), conv(last, last), relu(), conv(last, 3, True)]
        self.decoder = nn.ModuleList(layers)

    def forward(self, latent: Tensor, frames: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Yield the 4 pictures (1, 3, H, W) of a latent (1, 16, 1, H/8, W/8), in model range but not clamped.

        `frames` (4, 3, H, W) are the LQ frames for these pictures; `memory` is updated in place.
        """
        n, c, h, w = frames.shape
        condition = F.pixel_unshuffle(frames.transpose(0, 1).reshape(1, c * n, h, w), CONDITION)
        for picture in decoded(list(self.decoder), torch.cat([condition, latent[:, :, 0]], 1), memory):
            yield 2 * picture - 1


def decode_full(vae: Any, latent: Tensor, memory: Memory) -> Iterator[Tensor]:
    """Yield the clamped pictures (1, 3, H, W) that Wan's own decoder makes from a latent (1, 16, 1, h, w).

    The first latent of a sequence, for which `memory` is empty, yields 1 picture; each later one yields 4.
    """
    mean, std = (
        torch.tensor(values, device=latent.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    x = vae.post_quant_conv((latent.float() * std + mean).to(latent.dtype))
    convolutions = sum(isinstance(module, nn.Conv3d) for module in vae.decoder.modules())
    features: list[Any] = [memory.get(index) for index in range(convolutions)]
    pictures = vae.decoder(x, feat_cache=features, feat_idx=[0], first_chunk=not memory)
    memory.update({index: value for index, value in enumerate(features) if value is not None})
    yield from pictures.clamp(-1, 1).unbind(2)
