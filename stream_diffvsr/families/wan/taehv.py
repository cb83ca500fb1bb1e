"""Blocks of TAEHV, a small autoencoder for video (github.com/madebyollin/taehv), and code to run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Memory = dict[int, Tensor]
"""The last input of each layer with memory, by the layer's position in the network; empty at the start."""


class MemoryBlock(nn.Module):
    """Three convolutions over the features of a picture and of the previous picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = 2 * channels, channels, channels
        convs = [nn.Conv2d(size, channels, 3, padding=1) for size in sizes]
        self.conv = nn.Sequential(convs[0], relu(), convs[1], relu(), convs[2])

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.conv(torch.cat([x, before], 1)).add_(x).relu_()

    def remembering(self, x: Tensor, memory: Memory, index: int) -> Tensor:
        """Process consecutive pictures, given as one tensor (pictures, C, h, w).

        `memory[index]` contains the features of the previous picture and is updated.
        """
        before = memory.get(index)
        earlier = torch.zeros_like(x[:1]) if before is None else before
        memory[index] = x[-1:].clone() if len(x) > 1 else x
        return self(x, torch.cat([earlier, x[:-1]]) if len(x) > 1 else earlier)


class Pool(nn.Module):
    """Merges the features of several consecutive pictures, the oldest first, into those of one picture."""

    def __init__(self, channels: int, pictures: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * pictures, channels, 1, bias=False)
        self.pictures = pictures

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(len(x) // self.pictures, -1, *x.shape[2:]))


class Grow(nn.Module):
    """Splits the features of one picture into those of several pictures, the earliest first.

    Each is enlarged by a factor of 2 afterwards. The published networks enlarge first, which gives the same
    results but takes four times as much computation.
    """

    def __init__(self, channels: int, out: int, pictures: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out * pictures, 1, bias=False)
        self.pictures = pictures

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the features of each picture, before enlargement."""
        return self.conv(x).chunk(self.pictures, 1)


class Squash(nn.Module):
    """Limits values smoothly to the range from -3 to 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def conv(channels: int, out: int, bias: bool = False, stride: int = 1) -> nn.Module:
    """Return a 3x3 convolution, by default without a bias."""
    return nn.Conv2d(channels, out, 3, padding=1, bias=bias, stride=stride)


def relu() -> nn.Module:
    """Return a ReLU that works in place, since the last convolutions' outputs are the largest tensors."""
    return nn.ReLU(inplace=True)


def blocks(channels: int) -> list[nn.Module]:
    """Return three memory blocks."""
    return [MemoryBlock(channels) for _ in range(3)]


def enlarging(channels: Sequence[int]) -> list[nn.Module]:
    """Return the middle layers of a decoder, which turn one picture into 4, each 8 times as wide and high.

    `channels` contains the number of channels at each of the decoder's four sizes.
    """
    layers: list[nn.Module] = []
    for now, then, pictures in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
        layers += [*blocks(now), nn.Identity(), Grow(now, now, pictures), conv(now, then)]
    return [*layers, relu()]


def decoded(layers: Sequence[nn.Module], x: Tensor, memory: Memory, start: int = 0) -> Iterator[Tensor]:
    """Decode (1, C, h, w), yielding each picture before computing the next; `memory` is updated in place."""
    for index, layer in enumerate(layers[start:], start):
        if isinstance(layer, Grow):
            x = layer(x)
            for part in x:
                yield from decoded(layers, F.interpolate(part, scale_factor=2), memory, index + 1)
            return
        x = layer.remembering(x, memory, index) if isinstance(layer, MemoryBlock) else layer(x)
    yield x
