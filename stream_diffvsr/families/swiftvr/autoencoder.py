"""SwiftVR's autoencoder, which turns four frames into one latent with 1/16 of their height and width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..wan.taehv import Memory, MemoryBlock, Pool, Squash, blocks, conv, decoded, enlarging, relu

UNSHUFFLE = 2
PIXELS = 3 * UNSHUFFLE**2


class Encoder(nn.Module):
    """SwiftVR's encoder; parameter names match the published weights."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        layers = [conv(PIXELS, width, True), relu()]
        for pictures in (2, 2, 1):
            layers += [Pool(width, pictures), conv(width, width, stride=2), *blocks(width)]
        self.encoder = nn.ModuleList([*layers, conv(width, channels, True)])

    def forward(self, frames: Tensor, memory: Memory) -> Tensor:
        """Encode frames (4, 3, H, W) in [0, 1] to (1, C, H/16, W/16); `memory` is updated in place."""
        x = F.pixel_unshuffle(frames, UNSHUFFLE)
        for index, layer in enumerate(self.encoder):
            x = layer.remembering(x, memory, index) if isinstance(layer, MemoryBlock) else layer(x)
        return x


class Decoder(nn.Module):
    """SwiftVR's decoder; parameter names match the published weights, unless `converted` changes them."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        layers = [Squash(), conv(channels, widths[0], True), relu(), *enlarging(widths)]
        self.decoder = nn.ModuleList([*layers, conv(widths[-1], PIXELS, True)])

    def forward(self, latent: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Yield the 4 pictures (1, 3, H, W) of a latent (1, C, H/16, W/16).

        The values are nominally in [0, 1] but are not clamped. Latent n decodes to frames 4n - 3 to 4n.
        `memory` is updated in place.
        """
        for picture in decoded(list(self.decoder), latent, memory):
            yield F.pixel_shuffle(picture, UNSHUFFLE)


def converted(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the decoder's published weights to the names and layers used here.

    Where one picture becomes two, the published network repeats it and applies a convolution over time to
    only these two, padded with zeros. For each of the two, this is equivalent to a 1x1 convolution whose
    weights are the sum of two of its taps.
    """
    kept = {}
    for name, value in values.items():
        if name.endswith(".conv3d.weight"):
            before, now, after = value[..., 0, 0].unbind(-1)
            value = torch.cat([now + after, before + now])[..., None, None]
        kept[name.replace(".conv3d.", ".conv.").replace(".proj.", ".conv.")] = value
    return kept
