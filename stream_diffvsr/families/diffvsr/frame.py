"""One frame on its way through the pipeline, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .denoise import OnStep
from .options import UpscaleOptions
from .plan import Plan
from .state import StreamDiffVSRState


def ignore(stage: str, done: int, total: int) -> None:
    """An `on_step` that wants nothing."""


@dataclass(frozen=True, eq=False)
class FrameResult:
    """One upscaled frame, and what the next one needs."""

    hq: Tensor
    """(1, 3, 4h, 4w) float32, model range, not clamped; `to_pixels` makes a picture of it."""
    state: StreamDiffVSRState


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame to upscale, and how."""

    lq: Tensor
    state: StreamDiffVSRState
    options: UpscaleOptions
    plan: Plan
    dtype: torch.dtype
    """Of the networks."""
    latents: Tensor | None
    """Noise to begin with instead of the seeded one."""
    flow: Tensor | None
    """(1, 2, 4h, 4w) pixels: given, or taken again from the state; None: to be estimated."""
    compile_mode: str
    """The one that is in force, which is 'off' where nothing can be compiled."""
    on_step: OnStep = ignore
