"""nano: better than interpolation, steadier with guidance than without, and steady for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_diffvsr import UpscaleOptions, from_pixels, load_pipeline, to_pixels
from stream_diffvsr.cli.demo import draw
from stream_diffvsr.flow.warp import centred, warp
from stream_diffvsr.media.sizes import enlarge, resize
from stream_diffvsr.quality.measures import luma, psnr, sample_zero_outside, warping_error

ROOT = Path(__file__).parents[1]
FRAMES = 5
STEP = 3
"""Pixels of the truth from frame to frame: not a whole number of the LQ frame's."""


@pytest.fixture(scope="module")
def nano():
    return load_pipeline("nano", device="cpu")


@pytest.fixture(scope="module")
def truth():
    """Text, spokes and texture of the demo's clip, under a camera that goes to the right."""
    picture = draw(0.0)[..., 100:356, 280:]
    return torch.cat([picture[..., index * STEP : index * STEP + 256] for index in range(FRAMES)])


@pytest.fixture(scope="module")
def lq(truth):
    return (resize(truth, (64, 64)).clamp(0, 1) * 255).round() / 255


def upscale(nano, lq, **options):
    hq, _ = nano(from_pixels(lq), UpscaleOptions(**options))
    return to_pixels(hq)


@pytest.fixture(scope="module")
def guided(nano, lq):
    return upscale(nano, lq)


@pytest.fixture(scope="module")
def unguided(nano, lq):
    return upscale(nano, lq, controlnet_conditioning_scale=0.0, use_tpm=False)


def lanczos(lq):
    arrays = (cv2.resize(frame.permute(1, 2, 0).numpy(), None, fx=4, fy=4, interpolation=cv2.INTER_LANCZOS4)
              for frame in lq)  # fmt: skip
    return torch.from_numpy(np.stack(list(arrays))).permute(0, 3, 1, 2).clamp(0, 1)


def mean_psnr(result, truth):
    values = [psnr(luma(a), luma(b)) for a, b in zip(result.split(1), truth.split(1), strict=True)]
    return sum(values) / len(values)


def unsteadiness(result):
    """Warping error along the true motion."""
    flow = torch.zeros(1, 2, *result.shape[-2:])
    flow[:, 0] = STEP
    seen = sample_zero_outside(torch.ones_like(flow[:, :1]), flow)
    pairs = zip(result[1:].split(1), result[:-1].split(1), strict=True)
    return sum(warping_error(now, before, flow, seen) for now, before in pairs)


def test_better_than_interpolation(guided, unguided, lq, truth):
    classic = max(mean_psnr(each, truth) for each in (enlarge(lq, truth.shape[-2:]).clamp(0, 1), lanczos(lq)))
    assert mean_psnr(guided, truth) > classic + 0.8
    assert mean_psnr(unguided, truth) > classic + 0.4


def test_guidance_makes_it_steadier(guided, unguided, truth):
    assert unsteadiness(truth) == pytest.approx(0, abs=1e-9)
    assert unsteadiness(guided) < 0.85 * unsteadiness(unguided)


def test_a_still_stays_as_it_is(nano, lq):
    hq = upscale(nano, lq[:1].expand(12, -1, -1, -1)) * 255
    assert (hq.mean((2, 3)) - hq[0].mean((1, 2))).abs().max() < 0.5
    change = (hq[1:] - hq[:-1]).abs().mean((1, 2, 3))
    assert change[-1] < change[0] + 0.05 and change[-1] < 0.3


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31))
def test_centred_flow_undoes_the_shift_of_the_warp(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    frame = torch.rand((1, 3, height, width), generator=generator)
    flow = 2 * torch.randn((1, 2, height, width), generator=generator)
    inside = sample_zero_outside(torch.ones(1, 1, height, width), flow) > 0.999
    difference = (warp(frame, centred(flow)) - sample_zero_outside(frame, flow)) * inside
    assert difference.abs().max() < 1e-4
    still = torch.zeros(1, 2, height, width)
    assert torch.allclose(warp(frame, centred(still)), frame, atol=1e-4)


def test_only_estimates_are_centred(nano, lq):
    """Flow that is handed in means what the reference's warp makes of it, whatever the checkpoint."""
    assert nano.traits.centred_flow
    first = nano.process_frame(from_pixels(lq[:1]))
    # nano's guidance shows in the picture, so that two kinds of flow can be told apart.
    flow = torch.full((1, 2, *first.hq.shape[-2:]), 1.5)
    # Without the mask, which knows a way back of estimated flow alone.
    second = partial(nano.process_frame, from_pixels(lq[1:2]), first.state, UpscaleOptions(occlusion="off"))
    constant = load_pipeline("nano", device="cpu", flow=lambda now, before: flow)
    handed = constant.process_frame(from_pixels(lq[1:2]), first.state, UpscaleOptions(occlusion="off"))
    assert torch.equal(handed.hq, second(flow=flow).hq)
    own = second().hq
    estimated = nano.flow.between(*(from_pixels(lq[i : i + 1]) for i in (1, 0)), 4, "whole")
    assert torch.equal(own, second(flow=centred(estimated)).hq)
    assert not torch.equal(own, second(flow=estimated).hq)


def test_other_checkpoints_keep_the_reference_s_warp(pipe):
    assert not pipe.traits.centred_flow


@pytest.mark.long
def test_five_hundred_frames():
    """Errors do not pile up: the command says so itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "training.stability"], cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0
