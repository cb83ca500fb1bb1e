"""What the engine computes per frame, for whole batches of sequences and with gradients."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from training.networks import Nano


def lq_up(lq: Tensor) -> Tensor:
    return F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False)


def to_grey(picture: Tensor) -> np.ndarray:
    """(3, H, W) in model range -> uint8 luminance."""
    array = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_RGB2GRAY)


def dis_flow(current: Tensor, previous: Tensor) -> Tensor:
    """Backward flow (N, 2, H, W): where each pixel of `current` lies in `previous`."""
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [estimator.calc(to_grey(now), to_grey(before), None)
             for now, before in zip(current, previous, strict=True)]  # fmt: skip
    return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)


def warp(previous: Tensor, flow: Tensor) -> Tensor:
    """The reference's warp: normalised as with aligned corners, sampled as without; outside is 0."""
    height, width = previous.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid_x = 2 * (x + flow[:, 0]) / (width - 1) - 1
    grid_y = 2 * (y + flow[:, 1]) / (height - 1) - 1
    return F.grid_sample(previous, torch.stack([grid_x, grid_y], -1), align_corners=False)


def true_warp(previous: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """A warp without that shift, and where it found something; for measuring, not for the networks."""
    height, width = previous.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid_x = (2 * (x + flow[:, 0]) + 1) / width - 1
    grid_y = (2 * (y + flow[:, 1]) + 1) / height - 1
    grid = torch.stack([grid_x, grid_y], -1)
    inside = (grid.abs().amax(-1) <= 1)[:, None]
    return F.grid_sample(previous, grid, padding_mode="border", align_corners=False), inside


def predict(model: Nano, timestep: Tensor, lq: Tensor, latents: Tensor, warped: Tensor | None) -> Tensor:
    """The clean latents, as the U-Net and its ControlNet see them from this step."""
    prompt = model.prompt.expand(len(lq), -1, -1)
    sample = torch.cat([latents, lq], 1)
    down, middle = None, None
    if warped is not None:
        down, middle = model.controlnet(sample, timestep, prompt, warped, return_dict=False)
    return model.unet(
        sample,
        timestep,
        prompt,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]


def denoise(
    model: Nano,
    schedule: DDIMScheduler,
    lq: Tensor,
    latents: Tensor,
    warped: Tensor | None,
    steps: int | None = None,
    learning: int = 2,
) -> Tensor:
    """`warped` None means a first frame, without ControlNet.

    After `steps` steps it stops and returns what the network then takes for the clean latents; after all
    of them the scheduler's result is just that. Only the last `learning` steps have gradients: the
    weights are the same in all, and which step is last varies.
    """
    timesteps, wanted = schedule.timesteps[:steps], torch.is_grad_enabled()
    output = latents
    for index, timestep in enumerate(timesteps):
        with torch.set_grad_enabled(wanted and index >= len(timesteps) - learning):
            output = predict(model, timestep, lq, latents, warped)
            latents = schedule.step(output, timestep, latents, return_dict=False)[0]
    return output


def decode(model: Nano, latents: Tensor, warped: Tensor | None) -> Tensor:
    """(N, 4, h, w) -> (N, 3, 4h, 4w), unclamped."""
    features = None if warped is None else model.vae.features(warped)
    return model.vae.decode(latents, features)


def pad(picture: Tensor, multiple: int) -> Tensor:
    height, width = picture.shape[-2:]
    return F.pad(picture, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@torch.no_grad()
def upscale(
    model: Nano, schedule: DDIMScheduler, frames: Tensor, *, guided: bool = True, seed: int = 0
) -> Tensor:
    """One sequence of any size, as the engine does it; (T, 3, h, w) -> (T, 3, 4h, 4w)."""
    results: list[Tensor] = []
    for index in range(len(frames)):
        lq = frames[index : index + 1]
        height, width = lq.shape[-2:]
        padded = pad(lq, 4)
        noise = torch.Generator().manual_seed(seed + index)
        latents = torch.randn(1, 4, *padded.shape[-2:], generator=noise)
        warped = None
        if guided and results:
            flow = dis_flow(lq_up(lq), lq_up(frames[index - 1 : index]))
            warped = pad(warp(results[-1], flow), 16)
        hq = decode(model, denoise(model, schedule, padded, latents, warped), warped)
        results.append(hq[..., : 4 * height, : 4 * width])
    return torch.cat(results)
