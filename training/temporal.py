"""The loss of the temporal stage: several consecutive frames, each building on the model's own results."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from stream_diffvsr.flow.warp import centred, warp
from training.losses import charbonnier, distance, fidelity
from training.networks import Nano, scheduler
from training.rollout import bundled_flow, decode, denoise, dis_flow, lq_up, true_warp

COLOUR = 0.2
VISIBLE = 0.15
"""Difference between the truth and its warped predecessor above which a pixel is taken to be occluded."""
GUIDED = 0.75
"""Share of later frames that are guided; the others keep the model usable without guidance."""
TPM = 0.5
"""Share of guided frames decoded with TPM; the others are decoded without, as a user may turn it off."""
ALONE = 0.3
"""Weight of steadiness for unguided frames, which flicker where results depend on pixel alignment."""
BEGINNING = 8.0
"""Weight of steadiness from an unguided frame to a guided one, a change that every sequence begins with."""
LEARNING = 0.6
"""Share of frames with gradients; the others only produce the results that guide later frames."""


def sampling(rng: np.random.Generator) -> tuple[DDIMScheduler, int]:
    """Return a schedule and the step to train, mostly the last one, whose result is used.

    The schedule is mostly the checkpoint's own with four steps, else another that a user may choose.
    """
    schedule, count = scheduler(), 4
    if rng.random() < 0.2:
        schedule = scheduler(timestep_spacing=str(rng.choice(["leading", "trailing"])))
        count = int(rng.integers(1, 6))
    schedule.set_timesteps(count)
    return schedule, count - 1 if rng.random() < 0.6 else int(rng.integers(count))


def spoiled_previous(truth: Tensor, lq: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a previous frame such as the model might produce, or worse, to keep errors from accumulating."""
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


def guiding_flow(lq: Tensor, before: Tensor, true: Tensor, rng: np.random.Generator) -> Tensor:
    """Return flow for guidance: mostly from DIS or nano's network, else true flow, exact or disturbed."""
    kind = rng.random()
    if kind < 0.3:
        return dis_flow(lq_up(lq), lq_up(before))
    if kind < 0.7:
        return bundled_flow(lq_up(lq), lq_up(before))
    if kind < 0.85:
        return true
    coarse = torch.randn(*true.shape[:2], 5, 5) * rng.uniform(0, 1)
    return true + F.interpolate(coarse, size=true.shape[-2:], mode="bicubic", align_corners=False)


def unsteadiness(result: Tensor, previous: Tensor, truth: Tensor, before: Tensor, flow: Tensor) -> Tensor:
    """Return the visible flicker: the distance of a frame to the previous one moved along the true motion.

    Only pixels where the truth itself does not change are included.
    """
    moved, inside = true_warp(before, flow)
    seen = inside & ((moved - truth).abs().amax(1, keepdim=True) < VISIBLE)
    shown, _ = true_warp(previous, flow)
    return distance((result - shown) * seen)


def emphasis(guided: bool, guided_before: bool) -> float:
    """Return the weight of the change from one frame to the next."""
    if not guided:
        return ALONE
    return 1.0 if guided_before else BEGINNING


def control_loss(model: Nano, batch: tuple[Tensor, Tensor, Tensor], rng: np.random.Generator) -> Tensor:
    """Return the distance between the ControlNet's embedding of the warped previous result and the LQ frame.

    This stage comes before guidance is trained as a whole: otherwise, guidance would start with the errors of
    an untrained reduction, and training would turn it off. Only the embedding is trained.
    """
    lqs, truths, flows = batch
    schedule, _ = sampling(rng)
    with torch.no_grad():
        latents = denoise(model, schedule, lqs[0], torch.randn(len(lqs[0]), 4, *lqs.shape[-2:]), None, 0)
        warped, inside = true_warp(decode(model, latents, None), flows[0])
        moved, _ = true_warp(truths[0], flows[0])
        seen = inside & ((moved - truths[1]).abs().amax(1, keepdim=True) < VISIBLE)
    shown = model.controlnet.controlnet_cond_embedding(warped)[:, :6].unflatten(1, (3, 2))
    wanted = torch.stack([lqs[1], -lqs[1]], 2)
    return charbonnier((shown - wanted) * F.avg_pool2d(seen.float(), 4)[:, :, None])


def frame_loss(result: Tensor, truth: Tensor) -> Tensor:
    shift = (result - truth).mean((2, 3)).abs().mean()
    return fidelity(result, truth) + COLOUR * shift


def temporal_loss(
    model: Nano, batch: tuple[Tensor, Tensor, Tensor], rng: np.random.Generator, steadiness: float
) -> Tensor:
    """Return the mean loss over the frames of a batch of sequences; gradients stay within each frame."""
    lqs, truths, flows = batch
    spoiled = rng.random() < 0.3
    previous = spoiled_previous(truths[0], lqs[0], rng) if spoiled else None
    losses: list[Tensor] = []
    made, guided_before = not spoiled, False
    for index in range(int(spoiled), len(lqs)):
        lq, truth, warped = lqs[index], truths[index], None
        if previous is not None and rng.random() < GUIDED:
            flow = guiding_flow(lq, lqs[index - 1], flows[index - 1], rng)
            warped = warp(previous, centred(flow) if rng.random() < 0.95 else flow)
        last = index == len(lqs) - 1
        with torch.set_grad_enabled(last or rng.random() < LEARNING):
            schedule, step = sampling(rng)
            latents = denoise(model, schedule, lq, torch.randn(len(lq), 4, *lq.shape[-2:]), warped, step)
            result = decode(model, latents, warped if rng.random() < TPM else None)
            loss = frame_loss(result, truth)
            if previous is not None and made:
                weight = steadiness * emphasis(warped is not None, guided_before)
                flow = flows[index - 1]
                loss = loss + weight * unsteadiness(result, previous, truth, truths[index - 1], flow)
        if loss.requires_grad:
            losses.append(loss)
        previous, made, guided_before = result.detach(), True, warped is not None
    return torch.stack(losses).mean()
