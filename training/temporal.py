"""Loss of the temporal stage: all steps and several frames, on the model's own results."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from training.losses import charbonnier, fidelity
from training.networks import Nano, scheduler
from training.rollout import decode, denoise, dis_flow, lq_up, true_warp, warp

COLOUR = 0.2
ENCODER = 0.1
VISIBLE = 0.15
"""Where the truth itself, moved along the flow, is farther off than this, something was covered."""


def sampling(rng: np.random.Generator) -> tuple[DDIMScheduler, int]:
    """Mostly the checkpoint's own four steps; else other counts and spacings that a user may choose.

    The second value says after which step the result is looked at, so that early steps learn directly.
    """
    schedule, count = scheduler(), 4
    if rng.random() < 0.3:
        schedule = scheduler(timestep_spacing=str(rng.choice(["leading", "trailing"])))
        count = int(rng.integers(1, 4))
    schedule.set_timesteps(count)
    return schedule, count if rng.random() < 0.6 else int(rng.integers(1, count + 1))


def spoiled_previous(truth: Tensor, lq: Tensor, rng: np.random.Generator) -> Tensor:
    """A previous frame that the model might have made, or worse: how errors are kept from piling up."""
    mix = rng.uniform(0, 1)
    frame = mix * truth + (1 - mix) * lq_up(lq)
    kind = rng.random()
    if kind < 0.25:
        frame = frame + torch.randn_like(frame) * rng.uniform(0, 0.1)
    elif kind < 0.45:
        frame = frame + torch.randn(len(frame), 3, 1, 1) * 0.05
    elif kind < 0.6:
        frame = F.avg_pool2d(frame, 5, 1, 2)
    elif kind < 0.7:
        frame = frame + 0.5 * (frame - F.avg_pool2d(frame, 5, 1, 2))
    elif kind < 0.8:
        frame = frame.roll(1, 0)
    return frame


def unsteadiness(result: Tensor, previous: Tensor, truth: Tensor, before: Tensor, flow: Tensor) -> Tensor:
    """What is seen as flicker.

    How far this frame's error is from the previous one's, moved along; and, to half, how far the frame
    itself is from the previous one, moved along.
    """
    moved, inside = true_warp(before, flow)
    seen = inside & ((moved - truth).abs().amax(1, keepdim=True) < VISIBLE)
    shown, _ = true_warp(previous, flow)
    return charbonnier((result - truth - shown + moved) * seen) + 0.5 * charbonnier((result - shown) * seen)


def frame_loss(result: Tensor, truth: Tensor) -> Tensor:
    shift = (result - truth).mean((2, 3)).abs().mean()
    return fidelity(result, truth) + COLOUR * shift


def encoder_loss(model: Nano, truth: Tensor, latents: Tensor) -> Tensor:
    """The encoder is to find, from the truth, the latents that the U-Net finds from the LQ picture."""
    return ENCODER * charbonnier(model.vae.encode(truth) - latents.detach())


def temporal_loss(
    model: Nano, batch: tuple[Tensor, Tensor], rng: np.random.Generator, steadiness: float
) -> Tensor:
    """Mean loss over the frames of a batch of sequences; gradients stay within each frame."""
    lqs, truths = batch
    begins_spoiled = rng.random() < 0.5
    previous = spoiled_previous(truths[0], lqs[0], rng) if begins_spoiled else None
    losses: list[Tensor] = []
    for index in range(int(begins_spoiled), len(lqs)):
        lq, truth, warped, flow = lqs[index], truths[index], None, None
        if previous is not None:
            flow = dis_flow(lq_up(lq), lq_up(lqs[index - 1]))
            warped = warp(previous, flow)
        schedule, steps = sampling(rng)
        latents = denoise(model, schedule, lq, torch.randn(len(lq), 4, *lq.shape[-2:]), warped, steps)
        result = decode(model, latents, warped)
        loss = frame_loss(result, truth)
        if previous is not None and losses:
            loss = loss + steadiness * unsteadiness(result, previous, truth, truths[index - 1], flow)
        if index == 1:
            loss = loss + encoder_loss(model, truth, latents)
        losses.append(loss)
        previous = result.detach()
    return torch.stack(losses).mean()
