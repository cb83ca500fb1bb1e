"""ComfyUI's IMAGE, (N, H, W, C) float in [0, 1], and the engine's frames, (1, 3, h, w) in model range."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..stream_diffvsr import IncompatibleInputError, from_pixels, to_pixels
from ..stream_diffvsr.tensors import SCALE, upsample

COLOURS = 3


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of RGB or RGBA pictures."""
    fits = isinstance(images, Tensor) and images.ndim == 4 and len(images) and images.shape[-1] in (3, 4)
    if not fits:
        got = f"{tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise IncompatibleInputError("images (frames, height, width, 3 or 4 channels), at least one", got)


def lq_frames(images: Tensor) -> Iterator[Tensor]:
    """Frame after frame, (1, 3, h, w) float32 in model range; the input stays as it is."""
    for image in images:
        yield from_pixels(rearrange(image[..., :COLOURS].float(), "h w c -> 1 c h w"))


def empty_result(images: Tensor, device: torch.device) -> Tensor:
    """Room for the upscaled batch, (N, 4H, 4W, C) float32."""
    count, height, width, channels = images.shape
    return torch.empty((count, SCALE * height, SCALE * width, channels), device=device)


def put(result: Tensor, index: int, hq: Tensor, image: Tensor) -> None:
    """Write frame `index` of a result: colours from `hq`, alpha (if there is one) enlarged from `image`."""
    result[index, ..., :COLOURS] = rearrange(to_pixels(hq), "1 c h w -> h w c")
    if image.shape[-1] > COLOURS:
        alpha = upsample(rearrange(image[..., COLOURS:].float(), "h w c -> 1 c h w"))
        result[index, ..., COLOURS:] = rearrange(alpha.clamp(0, 1), "1 c h w -> h w c")


def from_hq(hq: Tensor) -> Tensor:
    """(1, 3, H, W) in model range -> (1, H, W, 3) in [0, 1]."""
    return rearrange(to_pixels(hq), "1 c h w -> 1 h w c").contiguous()


def to_model(image: Tensor) -> Tensor:
    """One picture (1, H, W, C) -> (1, 3, H, W) float32 in model range, in memory of its own."""
    return from_pixels(rearrange(image[..., :COLOURS].float(), "1 h w c -> 1 c h w")).contiguous()
