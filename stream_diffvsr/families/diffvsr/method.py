"""Upscale one frame with Stream-DiffVSR, following the paper's figure from top to bottom.

lq ──x4──► lq_up ─┐
previous lq ─x4───┴► flow ──► warp(previous hq) ──► warped ──┬─────────────────┐
                                                             ▼                 ▼
noise(seed, frame index), lq ──► denoise: U-Net + ControlNet ──► latents ──► decode with TPM ──► hq
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...flow import occlusion
from ...flow.warp import warp
from ...tensors import SCALE, pad_to, padded_size
from ...upscaler import OnStep, ignore_progress
from .denoise import Schedule, denoise, latent_tiles, noise
from .networks import Guidance, Networks
from .options import UpscaleOptions
from .plan import Plan
from .state import StreamDiffVSRState


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, with everything that determines how it is upscaled."""

    lq: Tensor
    state: StreamDiffVSRState
    options: UpscaleOptions
    plan: Plan
    latents: Tensor | None = None
    """Initial latents (1, C, h', w') that replace the seeded noise."""
    flow: Tensor | None = None
    """Flow passed by the caller, (1, 2, 4h, 4w) in pixels, or None if it has to be estimated."""
    estimates: bool = True
    """Whether the pipeline can estimate flow."""
    masked: bool = False
    """Whether guidance fades out where the previous frame cannot be trusted."""
    on_step: OnStep = ignore_progress

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of `lq`."""
        return self.lq.shape[-2], self.lq.shape[-1]

    def to(self, device: torch.device) -> Frame:
        """Return the same frame with its LQ frame, state and flow on `device`."""
        flow = None if self.flow is None else self.flow.to(device)
        return replace(self, lq=self.lq.to(device), state=self.state.to(device), flow=flow)


def upscale(frame: Frame, networks: Networks, schedule: Schedule, prompts: Sequence[Tensor]) -> Tensor:
    """Upscale a frame (1, 3, h, w) to hq (1, 3, 4h, 4w) float32, unclamped, on the frame's device."""
    lq, options, on_step = frame.lq, frame.options, frame.on_step
    height, width = lq.shape[-2:]
    padded = padded_size(height, width)
    large = (SCALE * padded[0], SCALE * padded[1])

    # Estimate where each pixel was in the previous frame, and warp the previous result accordingly.
    warped = None
    flow, trust = _motion(frame, networks)
    if flow is not None and frame.state.previous_hq is not None:
        warped = pad_to(warp(frame.state.previous_hq, flow), *large)
        trust = None if trust is None else pad_to(trust, *large)

    # Turn noise into latents, guided by the LQ frame and the warped result.
    guidance = None
    if warped is not None and any(schedule.control_scales(options)):
        small = None if trust is None else F.avg_pool2d(trust, SCALE)
        guidance = Guidance(networks.embed(warped), small)
        on_step("control", 1, 1)
    latents = frame.latents
    if latents is None:
        latents = noise(options.seed, frame.state.frame_index, networks.latent_channels, *padded)
    latents = denoise(
        networks,
        latents.to(lq.device) * schedule.scheduler.init_noise_sigma,
        pad_to(lq, *padded),
        guidance,
        prompts=prompts,
        schedule=schedule,
        options=options,
        tiles=latent_tiles(*padded, frame.plan.tile, frame.plan.overlap),
        on_step=on_step,
    )
    del guidance

    # Decode the latents to the picture, using features of the warped result.
    features = None
    if warped is not None and options.use_tpm:
        features = networks.features(warped)
        on_step("features", 1, 1)
    hq = networks.decode(latents, features, trust)
    on_step("decode", 1, 1)
    return hq.to(lq.device, torch.float32)[..., : SCALE * height, : SCALE * width]


def _motion(frame: Frame, networks: Networks) -> tuple[Tensor | None, Tensor | None]:
    """Return the flow to the previous frame (1, 2, 4h, 4w) and the trust in it (1, 1, 4h, 4w).

    Both are None if the sequence starts here or flow is unavailable. Unless `masked` is set, the trust is
    None and every pixel is trusted, as in the reference.
    """
    lq, previous = frame.lq, frame.state.previous_lq
    if previous is None or (frame.flow is None and not frame.estimates):
        return None, None
    flow, back, scale = frame.flow, None, frame.options.flow_scale
    if flow is None:
        flow = networks.flow(lq, previous, scale).to(lq.device)
        if frame.masked:
            back = networks.flow(previous, lq, scale).to(lq.device)
        frame.on_step("flow", 1, 1)
    return flow, occlusion.mask(lq, previous, flow, back, SCALE) if frame.masked else None
