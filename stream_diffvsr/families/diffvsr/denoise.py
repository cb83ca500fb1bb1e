"""From noise to latents: four steps of DDIM, guided by the LQ frame, the prompt and the previous frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...tensors import SCALE
from ...tiling import Tile, tiles
from .control import Control, Residuals
from .options import UpscaleOptions

OnStep = Callable[[str, int, int], None]
"""Called as (stage, parts done, parts in all) between the parts of a frame; may raise to cancel."""

UNET_MULTIPLE = 8
"""Tiles of the latents begin where the U-Net's three halvings of the whole frame would sample, too."""


def noise(seed: int, frame_index: int, height: int, width: int) -> Tensor:
    """Initial latents of one frame, (1, 4, h, w) float32 on the CPU: the same on every machine."""
    generator = torch.Generator().manual_seed((seed + frame_index) % 2**64)
    return torch.randn((1, 4, height, width), generator=generator)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Timesteps and update rule of one run, prepared once."""

    scheduler: Any
    """diffusers' DDIMScheduler with its timesteps set."""
    timesteps: tuple[tuple[int, Tensor], ...]
    """Each timestep as a number, and as a tensor on the networks' device."""

    @classmethod
    def prepare(cls, config: dict[str, Any], options: UpscaleOptions, device: torch.device) -> Schedule:
        """From the checkpoint's scheduler configuration."""
        from diffusers import DDIMScheduler

        override = {} if options.timestep_spacing is None else {"timestep_spacing": options.timestep_spacing}
        scheduler: Any = DDIMScheduler.from_config({**config, **override})
        scheduler.set_timesteps(options.num_inference_steps)
        return cls(scheduler, tuple((int(t), t.to(device)) for t in scheduler.timesteps))

    def control_scales(self, options: UpscaleOptions) -> list[float]:
        """Strength of the ControlNet in each step: 0 outside the part of the run where it guides."""
        total = len(self.timesteps)
        return [
            options.controlnet_conditioning_scale
            * (
                i / total >= options.control_guidance_start
                and (i + 1) / total <= options.control_guidance_end
            )
            for i in range(total)
        ]

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """One DDIM update (eta 0), float32."""
        return self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What each network takes of one prompt: keys and values, (1, 77, .), or the prompt itself."""

    unet: Tensor
    control: Tensor


def latent_tiles(height: int, width: int, size: int | None, overlap: int) -> list[Tile]:
    """Tiles of latents (., ., height, width), `size` and `overlap` in HQ pixels; no size: one tile of all."""
    if size is None:
        return tiles(height, width, max(height, width), 0)
    side = max(size // SCALE // UNET_MULTIPLE, 1) * UNET_MULTIPLE
    return tiles(height, width, side, -(-overlap // SCALE), UNET_MULTIPLE)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The networks and the conditions that stay the same over the steps of a frame."""

    unet: nn.Module
    control: Control
    prompts: Sequence[Prompt]
    """One, or with guidance two: the negative prompt first."""
    schedule: Schedule
    options: UpscaleOptions
    tiles: Sequence[Tile]
    """Of the latents; one for the whole frame."""

    def __call__(self, latents: Tensor, lq: Tensor, embedding: Tensor | None, on_step: OnStep) -> Tensor:
        """Noise (1, 4, h, w) and LQ frame (1, 3, h, w) -> latents (1, 4, h, w), all float32.

        `embedding` is the ControlNet's of the warped frame; None without a previous frame.
        """
        scales = self.schedule.control_scales(self.options)
        done, total = 0, len(scales) * len(self.tiles)
        kept: dict[int, Residuals] = {}
        for step, ((number, timestep), scale) in enumerate(zip(self.schedule.timesteps, scales, strict=True)):
            x = torch.cat([latents, lq], dim=1)
            prediction = torch.zeros_like(latents)
            for tile in self.tiles:
                part = None if embedding is None else tile.cut(embedding)
                # Tiles are there to save memory: they keep nothing for later steps.
                if step % self.options.control_every == 0 or len(self.tiles) > 1:
                    kept.clear()
                tile.add(self.predict(tile.cut(x), timestep, part, scale, kept), prediction)
                done += 1
                on_step("denoise", done, total)
            latents = self.schedule.step(prediction, number, latents)
        return latents

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        embedding: Tensor | None,
        scale: float,
        kept: dict[int, Residuals],
    ) -> Tensor:
        """The U-Net's prediction for (1, 7, h, w), guidance included, float32.

        With guidance, u + g (c - u) of two separate runs, so that it is exactly that of the parts, and
        needs no more memory than one. `kept` are residuals of an earlier step, by prompt.
        """
        x = x.to(self.prompts[0].unet.dtype)
        unconditional, *conditional = (
            self.predict_one(
                x, timestep, prompt.unet, self._residuals(x, timestep, index, embedding, scale, kept)
            )
            for index, prompt in enumerate(self.prompts)
        )
        if not conditional:
            return unconditional
        return unconditional + self.options.guidance_scale * (conditional[0] - unconditional)

    def _residuals(
        self,
        x: Tensor,
        timestep: Tensor,
        index: int,
        embedding: Tensor | None,
        scale: float,
        kept: dict[int, Residuals],
    ) -> Residuals | tuple[None, None]:
        """The ControlNet's for one prompt: kept ones, or new ones, kept if later steps want them."""
        if embedding is None or not scale:
            return None, None
        if index in kept:
            return kept[index]
        residuals = self.control(x, timestep, self.prompts[index].control, embedding, scale)
        if self.options.control_every > 1:
            kept[index] = residuals
        return residuals

    def predict_one(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, residuals: Residuals | tuple[None, None]
    ) -> Tensor:
        """The prediction for one prompt, as the U-Net takes it."""
        prediction = self.unet(
            x,
            timestep,
            encoder_hidden_states=prompt,
            down_block_additional_residuals=residuals[0],
            mid_block_additional_residual=residuals[1],
            return_dict=False,
        )
        return prediction[0].float()
