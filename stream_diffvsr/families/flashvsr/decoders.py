"""From latents to pictures, one latent after another and, within it, one picture after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONDITION = 8
"""The condition's frames are unshuffled by this factor."""

Memory = dict[int, Tensor]
"""By place in the network, what its layers saw of the latents before; empty at the start."""


class MemoryBlock(nn.Module):
    """Three convolutions over a picture's features and those of the picture before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = 2 * channels, channels, channels
        convs = [nn.Conv2d(size, channels, 3, padding=1) for size in sizes]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """One picture's features become those of several: channels, earlier pictures first."""

    def __init__(self, channels: int, out: int, pictures: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out * pictures, 1, bias=False)
        self.pictures = pictures

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return self.conv(x).chunk(self.pictures, 1)


class Squash(nn.Module):
    """Keep values within 3 of 0, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyDecoder(nn.Module):
    """FlashVSR's small decoder, which sees the LQ frames, too; parameters as in the published file."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        a, b, c, d = channels
        into = 16 + 3 * 4 * CONDITION**2

        def conv(n: int, out: int, bias: bool = False) -> nn.Module:
            return nn.Conv2d(n, out, 3, padding=1, bias=bias)

        def blocks(n: int) -> list[nn.Module]:
            return [MemoryBlock(n) for _ in range(3)]

        twice = nn.Upsample(scale_factor=2)
        layers = [Squash(), conv(into, a, True), nn.ReLU(), conv(a, a), nn.ReLU(), *blocks(a)]
        layers += [twice, Grow(a, a, 1), conv(a, b), *blocks(b)]
        layers += [twice, Grow(b, b, 2), conv(b, c), *blocks(c)]
        layers += [twice, Grow(c, c, 2), conv(c, d), nn.ReLU(), conv(d, d), nn.ReLU(), conv(d, 3, True)]
        self.decoder = nn.ModuleList(layers)

    def forward(self, latent: Tensor, frames: Tensor, memory: Memory) -> Iterator[Tensor]:
        """The 4 pictures (1, 3, H, W) of a latent (1, 16, 1, H/8, W/8) in model range, not clamped.

        `frames`: (4, 3, H, W), the low-quality ones of these pictures. `memory` is brought up to date.
        """
        n, c, h, w = frames.shape
        condition = F.pixel_unshuffle(frames.transpose(0, 1).reshape(1, c * n, h, w), CONDITION)
        for picture in self._from(0, torch.cat([condition, latent[:, :, 0]], 1), memory):
            yield 2 * picture - 1

    def _from(self, start: int, x: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Depth first: the earlier of two pictures is finished before the later one is begun."""
        for index, layer in enumerate(self.decoder[start:], start):
            if isinstance(layer, Grow):
                for part in layer(x):
                    yield from self._from(index + 1, part, memory)
                return
            if isinstance(layer, MemoryBlock):
                before = memory.get(index)
                memory[index] = x
                x = layer(x, torch.zeros_like(x) if before is None else before)
            else:
                x = layer(x)
        yield x


def decode_full(vae: Any, latent: Tensor, memory: Memory) -> Iterator[Tensor]:
    """The pictures (1, 3, H, W), clamped, of a latent (1, 16, 1, h, w) by Wan's own decoder.

    The first latent of a sequence, with an empty `memory`, gives 1, each later one 4.
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
