"""ComfyUI's IMAGE, (N, H, W, C) float in [0, 1], and the engine's frames, (1, 3, h, w) in model range."""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
        yield from_pixels(image[..., :COLOURS].float()).movedim(-1, 0)[None]


def empty_result(images: Tensor, device: torch.device) -> Tensor:
    """Room for the upscaled batch, (N, 4H, 4W, C) float32."""
    count, height, width, channels = images.shape
    return torch.empty((count, SCALE * height, SCALE * width, channels), device=device)


def put(result: Tensor, index: int, hq: Tensor, image: Tensor) -> None:
    """Write frame `index` of a result: colours from `hq`, alpha (if there is one) enlarged from `image`."""
    result[index, ..., :COLOURS] = to_pixels(hq)[0].movedim(0, -1)
    if image.shape[-1] > COLOURS:
        alpha = upsample(image[..., COLOURS:].float().movedim(-1, 0)[None])
        result[index, ..., COLOURS:] = alpha[0].clamp(0, 1).movedim(0, -1)


def from_hq(hq: Tensor) -> Tensor:
    """(1, 3, H, W) in model range -> (1, H, W, 3) in [0, 1]."""
    return to_pixels(hq).movedim(1, -1).contiguous()


def to_model(image: Tensor) -> Tensor:
    """One picture (1, H, W, C) -> (1, 3, H, W) float32 in model range, in memory of its own."""
    return from_pixels(image[..., :COLOURS].float()).movedim(-1, 1).contiguous()
