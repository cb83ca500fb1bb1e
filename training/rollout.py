"""The engine's computation of a frame, for whole batches of sequences and with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.flow import BundledFlow
from stream_diffvsr.flow.open import open_bundled
from stream_diffvsr.flow.warp import centred, warp
from training.networks import Nano


def lq_up(lq: Tensor) -> Tensor:
    return F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False)


def to_grey(picture: Tensor) -> np.ndarray:
    """Convert a picture (3, H, W) in model range to uint8 luminance."""
    array = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_RGB2GRAY)


def dis_flow(current: Tensor, previous: Tensor) -> Tensor:
    """Return the backward flow (N, 2, H, W) by DIS: where each pixel of `current` was in `previous`."""
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [estimator.calc(to_grey(now), to_grey(before), None)
             for now, before in zip(current, previous, strict=True)]  # fmt: skip
    return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)


@cache
def flow_network() -> BundledFlow:
    return BundledFlow(open_bundled())


@torch.no_grad()
def bundled_flow(current: Tensor, previous: Tensor) -> Tensor:
    """Return the backward flow (N, 2, H, W) by nano's own network."""
    pairs = zip(current.split(1), previous.split(1), strict=True)
    return torch.cat([flow_network()(now, before) for now, before in pairs])


def true_warp(previous: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return frames moved along true flow, and a mask of where it points inside the picture.

    For losses and measurements; unlike in `warp`, zero flow is the identity.
    """
    height, width = previous.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid_x = (2 * (x + flow[:, 0]) + 1) / width - 1
    grid_y = (2 * (y + flow[:, 1]) + 1) / height - 1
    grid = torch.stack([grid_x, grid_y], -1)
    inside = (grid.abs().amax(-1) <= 1)[:, None]
    return F.grid_sample(previous, grid, padding_mode="border", align_corners=False), inside


def predict(model: Nano, timestep: Tensor, lq: Tensor, latents: Tensor, warped: Tensor | None) -> Tensor:
    """Return the clean latents that the U-Net and its ControlNet predict in this step."""
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
    step: int | None = None,
) -> Tensor:
    """Return the clean latents that the network predicts in one step of the schedule.

    With `step` None, all steps are computed, and the last prediction is returned. Otherwise, only that step
    has gradients; its input is computed from the first step alone, as predictions hardly change in between.
    `warped` None means a first frame, without ControlNet.
    """
    if step is None:
        return list(predictions(model, schedule, lq, latents, warped))[-1]
    if step:
        first = schedule.timesteps[0]
        with torch.no_grad():
            latents = jump(schedule, predict(model, first, lq, latents, warped), latents, step)
    return predict(model, schedule.timesteps[step], lq, latents, warped)


def predictions(
    model: Nano, schedule: DDIMScheduler, lq: Tensor, latents: Tensor, warped: Tensor | None
) -> Iterator[Tensor]:
    """Yield the clean latents that each step predicts; the last of them is the scheduler's result."""
    for timestep in schedule.timesteps:
        output = predict(model, timestep, lq, latents, warped)
        latents = schedule.step(output, timestep, latents, return_dict=False)[0]
        yield output


def jump(schedule: DDIMScheduler, clean: Tensor, latents: Tensor, step: int) -> Tensor:
    """Return DDIM's update (eta 0) from the first step of the schedule to a later one."""
    here, there = (schedule.alphas_cumprod[schedule.timesteps[index]] for index in (0, step))
    noise = (latents - here.sqrt() * clean) / (1 - here).sqrt()
    return there.sqrt() * clean + (1 - there).sqrt() * noise


def decode(model: Nano, latents: Tensor, warped: Tensor | None) -> Tensor:
    """Decode latents (N, 4, h, w) to unclamped frames (N, 3, 4h, 4w).

    The encoder that computes the features of `warped` is not trained. `warped` None means without TPM.
    """
    with torch.no_grad():
        features = None if warped is None else model.vae.features(warped)
    return model.vae.decode(latents, features)


def pad(picture: Tensor, multiple: int) -> Tensor:
    height, width = picture.shape[-2:]
    return F.pad(picture, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@torch.no_grad()
def upscale(
    model: Nano, schedule: DDIMScheduler, frames: Tensor, *, guided: bool = True, seed: int = 0
) -> Tensor:
    """Upscale one sequence of any size as the engine does; (T, 3, h, w) -> (T, 3, 4h, 4w)."""
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
            warped = pad(warp(results[-1], centred(flow)), 16)
        hq = decode(model, denoise(model, schedule, padded, latents, warped), warped)
        results.append(hq[..., : 4 * height, : 4 * width])
    return torch.cat(results)
