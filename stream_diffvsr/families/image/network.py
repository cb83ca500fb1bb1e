"""A uniform way to call all single-image models, regardless of the sizes and channels that each supports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...tensors import from_pixels, pad_to, to_pixels
from ...tiling import tiles
from ...upscaler import OnStep

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

CHANNELS = ((3, 3), (1, 1), (4, 3), (4, 4))
"""Pairs of input and output channels that `ImageNetwork` supports."""


class ImageNetwork(nn.Module):
    """Wrapper around spandrel's descriptor of a model, with the model's network as the only submodule.

    A greyscale model processes the red, green and blue channels one at a time. A model with an alpha channel
    is given an opaque alpha channel, and its alpha output is discarded.
    """

    def __init__(self, descriptor: ImageModelDescriptor[nn.Module]) -> None:
        super().__init__()
        self.model, self.descriptor, self.scale = descriptor.model, descriptor, descriptor.scale

    def upscale(self, lq: Tensor, tile: int | None, overlap: int, on_step: OnStep) -> Tensor:
        """Upscale (1, 3, h, w) float32 in model range to (1, 3, scale h, scale w) float32 within [-1, 1].

        `tile` and `overlap` are in pixels of the result; if `tile` is None, the whole frame is computed at
        once. Input values outside the range are clamped first, as these models require.
        """
        if tile is None:
            hq = self(lq)
            on_step("upscale", 1, 1)
            return hq
        need, scale = self.descriptor.size_requirements, self.scale
        multiple = need.multiple_of * scale
        size = max(tile // multiple * multiple, need.minimum * scale, multiple)
        height, width = (side * scale for side in lq.shape[-2:])
        parts = tiles(height, width, size, min(overlap, (size - 1) // 2), scale)
        hq = lq.new_zeros((1, 3, height, width))
        for index, part in enumerate(parts):
            rows, columns = (
                slice(span.start // scale, span.stop // scale) for span in (part.rows, part.columns)
            )
            part.add(self(lq[..., rows, columns]), hq)
            on_step("upscale", index + 1, len(parts))
        return hq

    def forward(self, lq: Tensor) -> Tensor:
        """Upscale a frame: repeat its last row and column to reach a supported size, and crop the result."""
        height, width = lq.shape[-2:]
        right, down = self.descriptor.size_requirements.get_padding(width, height)
        dtype = next(self.model.parameters()).dtype
        pixels = to_pixels(pad_to(lq, height + down, width + right)).to(dtype)
        if self.descriptor.input_channels == 1:
            made = torch.cat([self.descriptor(channel) for channel in pixels.split(1, 1)], 1)
        else:
            opaque = [torch.ones_like(pixels[:, :1])] * (self.descriptor.input_channels - 3)
            made = self.descriptor(torch.cat([pixels, *opaque], 1))[:, :3]
        # spandrel works in inference mode; this conversion creates ordinary tensors again.
        return from_pixels(made[..., : height * self.scale, : width * self.scale].float())
