"""From noise to latents: four steps of DDIM, guided by the LQ frame, the prompt and the previous frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models.control import Control
from .options import UpscaleOptions

OnStep = Callable[[str, int, int], None]
"""Called as (stage, parts done, parts in all) between the parts of a frame; may raise to cancel."""


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
        scheduler = DDIMScheduler.from_config({**config, **override})
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
class Denoiser:
    """The networks and the conditions that stay the same over the steps of a frame."""

    unet: nn.Module
    control: Control
    prompt: Tensor
    """(1, 77, D), or (2, 77, D) with guidance: the negative prompt first."""
    schedule: Schedule
    options: UpscaleOptions

    def __call__(self, latents: Tensor, lq: Tensor, embedding: Tensor | None, on_step: OnStep) -> Tensor:
        """Noise (1, 4, h, w) and LQ frame (1, 3, h, w) -> latents (1, 4, h, w), all float32.

        `embedding` is the ControlNet's of the warped frame; None without a previous frame.
        """
        scales = self.schedule.control_scales(self.options)
        for index, ((number, timestep), scale) in enumerate(
            zip(self.schedule.timesteps, scales, strict=True)
        ):
            prediction = self.predict(torch.cat([latents, lq], dim=1), timestep, embedding, scale)
            latents = self.schedule.step(prediction, number, latents)
            on_step("denoise", index + 1, len(scales))
        return latents

    def predict(self, x: Tensor, timestep: Tensor, embedding: Tensor | None, scale: float) -> Tensor:
        """The U-Net's prediction for (1, 7, h, w), guidance included, float32.

        With guidance, u + g (c - u) of two separate runs, so that it is exactly that of the parts, and
        needs no more memory than one.
        """
        x = x.to(self.prompt.dtype)
        unconditional, *conditional = (
            self.predict_one(x, timestep, prompt, embedding, scale) for prompt in self.prompt.split(1)
        )
        if not conditional:
            return unconditional
        return unconditional + self.options.guidance_scale * (conditional[0] - unconditional)

    def predict_one(
        self, x: Tensor, timestep: Tensor, prompt: Tensor, embedding: Tensor | None, scale: float
    ) -> Tensor:
        """The prediction for one prompt, (1, 77, D)."""
        down, middle = None, None
        if embedding is not None and scale:
            down, middle = self.control(x, timestep, prompt, embedding, scale)
        prediction = self.unet(
            x,
            timestep,
            encoder_hidden_states=prompt,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )
        return prediction[0].float()
