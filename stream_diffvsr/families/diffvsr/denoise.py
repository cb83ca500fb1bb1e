"""Turn noise into latents in four DDIM steps, guided by the LQ frame, the prompt and the previous frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...tensors import SCALE
from ...tiling import Tile, tiles
from ...upscaler import OnStep
from .networks import Guidance, Networks
from .options import UpscaleOptions

UNET_MULTIPLE = 8
"""Tiles of latents start at multiples of this, so that the U-Net halves them as it halves the whole frame."""


def noise(seed: int, frame_index: int, channels: int, height: int, width: int) -> Tensor:
    """Return the initial latents of one frame, (1, C, h, w) float32 on the CPU, the same on every machine.

    Any 64-bit seed is accepted, since ComfyUI uses such seeds; torch's CPU generator uses the lower 32 bits.
    """
    generator = torch.Generator().manual_seed((seed + frame_index) % 2**64)
    return torch.randn((1, channels, height, width), generator=generator)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Timesteps and update rule of one run, prepared once."""

    scheduler: Any
    """diffusers' DDIMScheduler with its timesteps set."""
    timesteps: tuple[tuple[int, Tensor], ...]
    """Each timestep, as a number and as a tensor on the networks' device."""

    @classmethod
    def prepare(
        cls, config: dict[str, Any], steps: int, spacing: str | None, device: torch.device
    ) -> Schedule:
        """Prepare a schedule from the checkpoint's configuration; if `spacing` is None, keep its spacing."""
        from diffusers import DDIMScheduler

        override = {} if spacing is None else {"timestep_spacing": spacing}
        scheduler: Any = DDIMScheduler.from_config({**config, **override})
        scheduler.set_timesteps(steps)
        return cls(scheduler, tuple((int(t), t.to(device)) for t in scheduler.timesteps))

    def control_scales(self, options: UpscaleOptions) -> list[float]:
        """Return the ControlNet's strength in each step, which is 0 for steps outside its guidance range."""
        total = len(self.timesteps)
        low, high = options.control_guidance_start, options.control_guidance_end
        guides = [i / total >= low and (i + 1) / total <= high for i in range(total)]
        return [options.controlnet_conditioning_scale * each for each in guides]

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Apply one DDIM update (eta 0) in float32."""
        return self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]


def latent_tiles(height: int, width: int, size: int | None, overlap: int) -> list[Tile]:
    """Return the tiles that cover latents (., ., height, width).

    `size` and `overlap` are in HQ pixels; if `size` is None, one tile covers everything.
    """
    if size is None:
        return tiles(height, width, max(height, width), 0)
    side = max(size // SCALE // UNET_MULTIPLE, 1) * UNET_MULTIPLE
    return tiles(height, width, side, -(-overlap // SCALE), UNET_MULTIPLE)


def denoise(
    networks: Networks,
    latents: Tensor,
    lq: Tensor,
    guidance: Guidance | None,
    *,
    prompts: Sequence[Tensor],
    schedule: Schedule,
    options: UpscaleOptions,
    tiles: Sequence[Tile],
    on_step: OnStep,
) -> Tensor:
    """Turn noise (1, C, h, w) and an LQ frame (1, 3, h, w) into latents (1, C, h, w), all float32.

    `guidance` comes from the warped previous frame, or is None if there is no such frame. `prompts` contains
    one embedding (1, 77, D) or, for classifier-free guidance, two, with the negative prompt's first. In that
    case, the prediction is u + g (c - u), where u and c come from two separate runs: this is exact and needs
    no more memory than one run. If there are several tiles, they are blended.
    """
    scales = schedule.control_scales(options)
    done, total = 0, len(scales) * len(tiles)
    for step, ((number, timestep), scale) in enumerate(zip(schedule.timesteps, scales, strict=True)):
        x = torch.cat([latents, lq], dim=1)
        prediction = torch.zeros_like(latents)
        # Tiles are meant to save memory, so nothing is kept from them for later steps.
        keep = options.control_every > 1 and len(tiles) == 1
        again = keep and step % options.control_every > 0
        now = (
            None if guidance is None or not scale else replace(guidance, scale=scale, keep=keep, again=again)
        )
        for tile in tiles:
            part = None if now is None else now.cut(tile)
            first, *second = (
                networks.predict(tile.cut(x), timestep, prompt, part, index)
                for index, prompt in enumerate(prompts)
            )
            guided = first + options.guidance_scale * (second[0] - first) if second else first
            tile.add(guided, prediction)
            done += 1
            on_step("denoise", done, total)
        latents = schedule.step(prediction, number, latents)
    return latents
