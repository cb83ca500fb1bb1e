"""Conversion between ComfyUI's IMAGE, (N, H, W, C) in [0, 1], and frames, (1, 3, h, w) in model range."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..stream_diffvsr.errors import IncompatibleInputError, VRAMError
from ..stream_diffvsr.tensors import from_pixels, to_pixels
from .host import install_line

COLOURS = 3
MEGABYTE = 2**20


def check_images(images: Tensor, minimum: int = 1) -> None:
    """Check that `images` is a batch of RGB or RGBA pictures with sides of at least `minimum` pixels."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[-1] not in (3, 4):
        got = f"{tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise IncompatibleInputError(
            f"images must have the shape (frames, height, width, 3 or 4 channels), not {got}"
        )
    count, height, width, _ = images.shape
    if not count:
        raise IncompatibleInputError("there are no images: check the loader's cap and skip settings")
    if min(height, width) < minimum:
        raise IncompatibleInputError(f"pictures must be at least {minimum}x{minimum}, not {width}x{height}")


def to_frame(image: Tensor) -> Tensor:
    """Convert (H, W, C) to (1, C, H, W) float32 without changing the values."""
    with install_line():
        from einops import rearrange

    return rearrange(image.float(), "h w c -> 1 c h w")


def to_image(frame: Tensor) -> Tensor:
    """Convert (1, C, H, W) to (H, W, C) without changing the values."""
    with install_line():
        from einops import rearrange

    return rearrange(frame, "1 c h w -> h w c")


def lq_frames(images: Tensor) -> Iterator[Tensor]:
    """Yield each image as a frame, (1, 3, h, w) float32 in model range; the input is not changed."""
    for image in images:
        yield from_pixels(to_frame(image[..., :COLOURS]))


def empty_result(images: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """Allocate the upscaled batch, (N, H, W, C) float32, for frames of `size` (H, W).

    Raise `VRAMError` if memory is short, since the system may promise memory that it does not have and later
    kill ComfyUI.
    """
    from ..stream_diffvsr.memory import free_memory

    shape = (len(images), *size, images.shape[-1])
    needed, free = math.prod(shape) * torch.float32.itemsize, free_memory(device)
    if needed > free:
        remedy = (
            "process fewer frames at once, link VideoHelperSuite's Meta Batch Manager to meta_batch, or use "
            "Stream-DiffVSR Upscale Video"
        )
        raise VRAMError(needed // MEGABYTE, free // MEGABYTE, remedy)
    return torch.empty(shape, device=device)


def write_frame(result: Tensor, index: int, rgb: Tensor, image: Tensor) -> None:
    """Write `rgb`, (1, 3, H, W) in [0, 1], as frame `index`, with the upscaled alpha of `image`, if any."""
    result[index, ..., :COLOURS] = to_image(rgb)
    if image.shape[-1] > COLOURS:
        from ..stream_diffvsr.media.sizes import enlarge

        alpha = enlarge(to_frame(image[..., COLOURS:]), (rgb.shape[-2], rgb.shape[-1]))
        result[index, ..., COLOURS:] = to_image(alpha)


def from_hq(hq: Tensor) -> Tensor:
    """Convert (1, 3, H, W) in model range to (1, H, W, 3) in [0, 1]."""
    return to_image(to_pixels(hq))[None].contiguous()


def to_model(image: Tensor) -> Tensor:
    """Convert one picture, (1, H, W, C), to a new (1, 3, H, W) float32 tensor in model range."""
    return from_pixels(to_frame(image[0, ..., :COLOURS])).contiguous()
