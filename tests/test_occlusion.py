"""Guidance that fades where the previous frame cannot be believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import moving, shift_flow

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, load_pipeline
from stream_diffvsr.families.diffvsr import bands, method
from stream_diffvsr.flow import occlusion
from stream_diffvsr.tensors import upsample

MASKED = UpscaleOptions(num_inference_steps=2, occlusion="mask")
OFF = replace(MASKED, occlusion="off")


@given(st.integers(8, 40), st.integers(8, 40), st.booleans())
def test_a_still_pair_is_trusted_everywhere(height, width, both_ways):
    lq, flow = moving(1, height, width), torch.zeros(1, 2, 4 * height, 4 * width)
    trust = occlusion.mask(lq, lq, flow, flow if both_ways else None, 4)
    assert trust.shape == (1, 1, 4 * height, 4 * width) and bool((trust == 1).all())


def test_another_picture_is_trusted_nowhere():
    lq, flow = moving(1, 40, 48), torch.zeros(1, 2, 160, 192)
    assert float(occlusion.mask(lq, -lq, flow, None, 4).mean()) < 0.05


def test_flow_that_does_not_come_back_is_not_trusted():
    lq, there = torch.zeros(1, 3, 40, 48), torch.full((1, 2, 160, 192), 8.0)
    assert float(occlusion.mask(lq, lq, there, -there, 4)[..., 40:-60, 40:-60].min()) == 1
    assert float(occlusion.mask(lq, lq, there, there, 4).max()) == 0


def test_what_comes_in_from_outside_is_not_trusted():
    lq, flow = torch.zeros(1, 3, 40, 48), torch.zeros(1, 2, 160, 192)
    flow[:, 0] = 60
    trust = occlusion.mask(lq, lq, flow, None, 4)
    assert float(trust[..., -60:].max()) == 0 and float(trust[..., :90].min()) == 1


@given(st.integers(0, 9))
def test_trust_is_a_share_of_one(seed):
    torch.manual_seed(seed)
    lq, flow = torch.randn(2, 1, 3, 12, 17), 20 * torch.randn(2, 1, 2, 48, 68)
    trust = occlusion.mask(lq[0], lq[1], flow[0], flow[1], 4)
    assert torch.isfinite(trust).all() and 0 <= float(trust.min()) <= float(trust.max()) <= 1


@pytest.fixture(scope="module")
def two(guided):
    clip = moving(2, 24, 28)
    return clip, guided.process_frame(clip[:1], None, OFF).state


@pytest.mark.parametrize(("value", "like"), [(1.0, "off"), (0.0, "first")])
@pytest.mark.parametrize("plan", ["whole", "banded", "tiled"])
def test_ones_are_the_reference_and_zeros_a_first_frame(guided, two, monkeypatch, value, like, plan):
    """Bit for bit, with the same noise, in every plan."""
    clip, state = two
    options = replace(MASKED, memory_plan=plan, tile_size=64 if plan == "tiled" else None, tile_overlap=16)
    monkeypatch.setattr(method.occlusion, "mask", lambda *_: torch.full((1, 1, 96, 112), value))
    masked = guided.process_frame(clip[1:], state, options)
    before = state if like == "off" else StreamDiffVSRState(frame_index=1)
    expected = guided.process_frame(clip[1:], before, replace(options, occlusion="off"))
    assert torch.equal(masked.hq, expected.hq)


@pytest.mark.parametrize("rows", [8, 16])
def test_bands_fade_as_the_whole_does(pipe, rows):
    torch.manual_seed(3)
    latents, warped, trust = torch.randn(1, 4, 24, 20), torch.randn(1, 3, 96, 80), torch.rand(1, 1, 96, 80)
    with torch.no_grad():
        features = pipe.vae.features(warped)
        whole = pipe.vae.decode(latents, features, trust)
        banded = bands.decode(pipe.vae, latents, features, trust, rows)
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, pipe.vae.decode(latents, features), atol=1e-4)


def test_the_way_back_is_estimated(checkpoint):
    asked = []

    def flow(current, previous):
        asked.append((current, previous))
        return shift_flow(current, previous)

    pipe = load_pipeline(checkpoint, device="cpu", flow=flow)
    pipe(moving(2), MASKED)
    (there, back) = asked
    assert torch.equal(there[0], back[1]) and torch.equal(there[1], back[0])
    pipe(moving(2), OFF)
    assert len(asked) == 3


def test_continuity_with_the_mask(checkpoint, tmp_path):
    """The second half of the clip is another picture, so that the mask has something to do."""
    pipe = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
    clip = torch.cat([moving(2, 24, 28), moving(2, 24, 28, seed=7)])
    whole, last = pipe(clip, MASKED)
    first, state = pipe(clip[:3], MASKED)
    state.save(tmp_path / "s")
    second, end = pipe(clip[3:], MASKED, StreamDiffVSRState.load(tmp_path / "s"))
    assert torch.equal(torch.cat([first, second]), whole) and end.metadata == last.metadata
    assert not torch.equal(whole, pipe(clip, OFF)[0])


def test_given_flow_is_checked_by_the_frames_alone(pipe, two):
    clip, state = two
    flow = torch.zeros(1, 2, 96, 112)
    masked = pipe.process_frame(-clip[1:], state, MASKED, flow=flow)
    alone = pipe.process_frame(-clip[1:], StreamDiffVSRState(frame_index=1), OFF)
    trust = occlusion.mask(-clip[1:], clip[:1], flow, None, 4)
    close = (masked.hq - alone.hq).abs().amax(1, keepdim=True) < 1e-5
    assert float(trust.mean()) < 0.5 and close.any()
    assert upsample(clip[1:]).shape == masked.hq.shape
