"""What the engine promises of sequences: continuity, causality, laziness, exact sizes."""

from __future__ import annotations

import itertools
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import moving, shift_flow

from stream_diffvsr import (
    IncompatibleInputError,
    StreamDiffVSRState,
    UpscaleOptions,
    load_pipeline,
    to_pixels,
)
from stream_diffvsr.families.diffvsr.denoise import noise
from stream_diffvsr.families.diffvsr.networks import TorchCalls
from stream_diffvsr.flow.warp import warp
from stream_diffvsr.tensors import is_finite, pad_to, padded_size

FAST = UpscaleOptions(num_inference_steps=2, seed=5)


@pytest.fixture(scope="module")
def clip():
    return moving(5)


@pytest.fixture(scope="module")
def whole(guided, clip):
    """All frames in one run: (N, 3, 4h, 4w), and the last state."""
    return guided(clip, FAST)


def same_state(a: StreamDiffVSRState, b: StreamDiffVSRState) -> bool:
    return (
        torch.equal(a.previous_hq, b.previous_hq)
        and torch.equal(a.previous_lq, b.previous_lq)
        and (a.frame_index, a.metadata) == (b.frame_index, b.metadata)
    )


@pytest.mark.parametrize("cut", range(1, 5))
def test_split_saved_and_loaded_equals_whole(guided, clip, whole, cut, tmp_path):
    first, state = guided(clip[:cut], FAST)
    state.save(tmp_path / "s.safetensors")
    second, last = guided(clip[cut:], FAST, StreamDiffVSRState.load(tmp_path / "s.safetensors"))
    assert torch.equal(torch.cat([first, second]), whole[0])
    assert same_state(last, whole[1])


@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 4)), seed=st.integers(0, 2**64 - 1))
def test_any_chunks_equal_whole(guided, clip, cuts, seed):
    options = UpscaleOptions(num_inference_steps=1, seed=seed)
    state, parts = None, []
    for part in torch.tensor_split(clip, sorted(cuts)):
        hq, state = guided(part, options, state)
        parts.append(hq)
    assert torch.equal(torch.cat(parts), guided(clip, options)[0])


def test_a_fresh_pipeline_continues_exactly(checkpoint, guided, clip, whole, tmp_path):
    _, state = guided(clip[:2], FAST)
    state.save(tmp_path / "s.safetensors")
    fresh = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
    hq, _ = fresh(clip[2:], FAST, StreamDiffVSRState.load(tmp_path / "s.safetensors"))
    assert torch.equal(hq, whole[0][2:])


def test_guidance_takes_part(guided, pipe, clip, whole):
    """The tests above would also pass if every frame stood alone; it does not."""
    alone, _ = pipe(clip, FAST)
    assert torch.equal(alone[0], whole[0][0])
    assert not torch.allclose(alone[1], whole[0][1], atol=1e-3)


@pytest.mark.parametrize("length", [1, 3])
def test_causality(guided, clip, whole, length):
    changed = clip.clone()
    changed[length:] = -changed[length:]
    assert torch.equal(guided(changed, FAST)[0][:length], whole[0][:length])


def test_stream_asks_for_a_frame_only_when_the_last_is_taken(guided, clip, whole):
    asked = []

    def many():
        for index in range(9):
            asked.append(index)
            yield clip[index % len(clip)][None]

    stream = guided.stream(many(), FAST)
    for index in range(3):
        assert torch.equal(next(stream).hq[0], whole[0][index])
        assert asked == list(range(index + 1))


def test_inputs_and_states_stay_as_they_were(guided, clip):
    _, state = guided(clip[:1], FAST)
    before = replace(state, tensors={name: x.clone() for name, x in state.tensors.items()})
    lq, flow, latents = clip[1:2].clone(), torch.ones(1, 2, 48, 64), torch.randn(1, 4, 12, 16)
    kept = [x.clone() for x in (lq, flow, latents)]
    result = guided.process_frame(lq, state, FAST, latents=latents, flow=flow)
    assert same_state(state, before)
    assert all(torch.equal(a, b) for a, b in zip((lq, flow, latents), kept, strict=True))
    lq.zero_()
    assert not torch.equal(result.state.previous_lq, lq), "the state must not be a view of the caller's frame"
    with pytest.raises(AttributeError):
        state.frame_index = 3


def test_one_state_can_be_branched(guided, clip, whole):
    _, state = guided(clip[:2], FAST)
    other = guided.process_frame(-clip[2:3], state, FAST)
    again = guided.process_frame(clip[2:3], state, FAST)
    assert torch.equal(again.hq[0], whole[0][2])
    assert not torch.equal(again.hq, other.hq)


def test_interleaved_pipelines_and_sequences_do_not_disturb_each_other(checkpoint, guided, clip, whole):
    other = load_pipeline(checkpoint, device="cpu", flow=lambda now, before: torch.zeros_like(now)[:, :2])
    mirrored = clip.flip(-1)
    expected = other(mirrored, UpscaleOptions(seed=9))[0]
    one = guided.stream(clip.split(1), FAST)
    two = other.stream(mirrored.split(1), UpscaleOptions(seed=9))
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        assert torch.equal(a.hq[0], whole[0][index])
        assert torch.equal(b.hq[0], expected[index])


def test_threads_may_share_a_pipeline(guided, clip, whole):
    with ThreadPoolExecutor(3) as pool:
        for hq, _ in pool.map(lambda _: guided(clip, FAST), range(3)):
            assert torch.equal(hq, whole[0])


class StopHereError(Exception):
    pass


def steps_of(pipe, clip, state) -> list[tuple[str, int, int]]:
    calls: list[tuple[str, int, int]] = []
    pipe.process_frame(clip[1:2], state, FAST, on_step=lambda *call: calls.append(call))
    return calls


def test_an_exception_at_any_step_leaves_everything_usable(guided, clip, whole):
    _, state = guided(clip[:1], FAST)
    calls = steps_of(guided, clip, state)
    assert {"flow", "denoise", "decode"} <= {stage for stage, _, _ in calls}
    assert [call[1:] for call in calls if call[0] == "denoise"] == [(1, 2), (2, 2)]
    for stop in range(len(calls)):
        countdown = itertools.count()

        def cancel(*call, countdown=countdown, stop=stop):
            if next(countdown) == stop:
                raise StopHereError

        with pytest.raises(StopHereError):
            guided.process_frame(clip[1:2], state, FAST, on_step=cancel)
        assert torch.equal(guided.process_frame(clip[1:2], state, FAST).hq[0], whole[0][1])


def test_odd_frames_are_padded_with_their_edges(pipe):
    lq, latents = moving(1, 9, 14), torch.randn(1, 4, 12, 16)
    padded = pipe.process_frame(pad_to(lq, 12, 16), latents=latents).hq
    assert torch.equal(pipe.process_frame(lq, latents=latents).hq, padded[..., :36, :56])
    assert torch.equal(pad_to(lq, 12, 16)[..., 9:, 14:], lq[..., 8:, 13:].expand(1, 3, 3, 2))


def test_a_state_holds_no_more_than_its_frames(pipe):
    """A view of the padded picture would keep all of that alive."""
    state = pipe.process_frame(moving(1, 9, 14)).state
    for tensor in (state.previous_hq, state.previous_lq):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


SIZES = [(8, 8), (23, 37), (9, 13), (120, 212)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_any_size_gives_exactly_four_times(guided, height, width, guidance):
    options = UpscaleOptions(num_inference_steps=1, guidance_scale=guidance)
    hq, state = guided(moving(2, height, width), options)
    assert hq.shape == (2, 3, 4 * height, 4 * width)
    assert torch.isfinite(hq).all()
    assert state.previous_hq.shape[-2:] == (4 * height, 4 * width)


@pytest.mark.parametrize("guidance", [0.0, pytest.param(2.0, marks=pytest.mark.long)])
def test_480x270_gives_1920x1080(guided, guidance):
    options = UpscaleOptions(num_inference_steps=1, guidance_scale=guidance)
    state = guided.process_frame(moving(1, 270, 480), None, options).state
    assert guided.process_frame(moving(1, 270, 480, seed=1), state, options).hq.shape == (1, 3, 1080, 1920)


@settings(max_examples=10)
@given(height=st.integers(8, 30), width=st.integers(8, 30))
def test_padding_is_replication_at_right_and_bottom(guided, height, width):
    """A frame extended by hand, with its noise, gives the same picture inside."""
    clip, full = moving(2, height, width), padded_size(height, width)
    latents = noise(0, 0, 4, *full)
    small = guided.process_frame(clip[:1], None, FAST, latents=latents)
    large = guided.process_frame(pad_to(clip[:1], *full), None, FAST, latents=latents)
    assert torch.equal(small.hq, large.hq[..., : 4 * height, : 4 * width])


def test_noise_follows_the_absolute_frame_index(pipe, clip):
    hq = pipe.process_frame(clip[:1], StreamDiffVSRState(frame_index=7), UpscaleOptions(seed=3)).hq
    same = pipe.process_frame(clip[:1], None, UpscaleOptions(seed=10)).hq
    given_noise = pipe.process_frame(clip[:1], None, latents=noise(0, 10, 4, 12, 16)).hq
    assert torch.equal(hq, same)
    assert torch.equal(hq, given_noise)


def test_seeds_wrap_at_64_bits():
    assert torch.equal(noise(2**64 - 1, 1, 4, 4, 4), noise(0, 0, 4, 4, 4))
    assert not torch.equal(noise(0, 0, 4, 4, 4), noise(0, 1, 4, 4, 4))


def test_given_flow_guides_although_none_is_estimated(pipe, clip):
    flow = torch.ones(1, 2, 48, 64)
    _, state = pipe(clip[:1], FAST)
    assert state.has_previous
    free = pipe.process_frame(clip[1:2], state, FAST).hq
    assert not torch.allclose(pipe.process_frame(clip[1:2], state, FAST, flow=flow).hq, free, atol=1e-3)


def test_the_warped_frame_is_padded_after_the_warp(pipe, monkeypatch):
    """With the flow of the true size: padding both before it would pull in other pixels at the edges."""
    clip, flow = moving(2, 13, 18), 6 * torch.randn(1, 2, 52, 72)
    embed, seen = TorchCalls.embed, []
    monkeypatch.setattr(TorchCalls, "embed", lambda own, warped: seen.append(warped) or embed(own, warped))
    _, state = pipe(clip[:1], FAST)
    pipe.process_frame(clip[1:], state, FAST, flow=flow)
    assert torch.equal(seen[0], pad_to(warp(state.previous_hq, flow), 64, 80))


def test_an_empty_state_starts_a_sequence(guided, clip):
    state = StreamDiffVSRState(frame_index=4)
    result = guided.process_frame(clip[:1], state, FAST)
    assert result.state.frame_index == 5
    assert torch.equal(result.hq, guided.process_frame(clip[:1], None, replace(FAST, seed=FAST.seed + 4)).hq)


@pytest.mark.parametrize("index", [0, 1])
def test_guidance_equals_two_separate_predictions(checkpoint, index):
    """u + g (c - u), for the first frame and for one with a ControlNet."""
    pipe = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
    clip = moving(2)
    _, before = pipe(clip[:1], UpscaleOptions(num_inference_steps=1))
    state = before if index else None
    latents = noise(1, 0, 4, 12, 16)

    def prediction(options: UpscaleOptions) -> torch.Tensor:
        """What the scheduler got, recovered from its one step."""
        seen = []
        schedule, _ = pipe.prepared(options, pipe.dtype)
        original = schedule.scheduler.step
        schedule.scheduler.step = lambda p, *a, **k: seen.append(p) or original(p, *a, **k)
        pipe.process_frame(clip[index : index + 1], state, options, latents=latents)
        return seen[0]

    one = {"num_inference_steps": 1, "timestep_spacing": "trailing"}
    unconditional = prediction(UpscaleOptions(prompt="!", **one))
    conditional = prediction(UpscaleOptions(prompt="", **one))
    assert not torch.allclose(unconditional, conditional, atol=1e-3)
    guided = prediction(UpscaleOptions(prompt="", negative_prompt="!", guidance_scale=3.5, **one))
    torch.testing.assert_close(guided, unconditional + 3.5 * (conditional - unconditional), atol=1e-5, rtol=0)


def test_control_is_embedded_once_per_frame(guided, clip):
    calls = []
    hook = guided.control.embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        guided(clip[:3], UpscaleOptions(num_inference_steps=4))
    finally:
        hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("option", [{"controlnet_conditioning_scale": 0.0}, {"use_tpm": False}])
def test_each_guidance_can_be_switched_off(guided, clip, whole, option):
    hq, _ = guided(clip[:2], replace(FAST, **option))
    assert torch.equal(hq[0], whole[0][0])
    assert not torch.allclose(hq[1], whole[0][1], atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 0.25])
def test_flow_at_a_lower_size_is_rescaled(checkpoint, scale):
    sizes = []

    def constant(current, previous):
        sizes.append(tuple(current.shape[-2:]))
        return torch.full((1, 2, *current.shape[-2:]), 4 * scale)

    from stream_diffvsr.flow import CallableFlow, FlowEstimator

    class Constant(FlowEstimator):
        name = "constant"

        def forward(self, current, previous):
            return constant(current, previous)

    pipe = load_pipeline(checkpoint, device="cpu", flow=Constant())
    clip = moving(2)
    options = replace(FAST, flow_scale=scale)
    hq, _ = pipe(clip, options)
    _, state = pipe(clip[:1], options)
    given_flow = pipe.process_frame(clip[1:2], state, options, flow=torch.full((1, 2, 48, 64), 4.0))
    assert set(sizes) == {(int(48 * scale), int(64 * scale))}
    torch.testing.assert_close(hq[1:], given_flow.hq, atol=1e-5, rtol=0)
    with pytest.raises(IncompatibleInputError, match="flow_scale"):
        load_pipeline(checkpoint, device="cpu", flow=lambda a, b: a[:, :2])(clip, options)
    assert isinstance(load_pipeline(checkpoint, flow=shift_flow).flow, CallableFlow)


def bad_frames():
    good = moving(1)
    nan, infinite = good.clone(), good.clone()
    nan[0, 0, 0, 0], infinite[0, 1, 2, 3] = float("nan"), float("inf")
    return {
        "nan": nan,
        "infinite": infinite,
        "batch": moving(2),
        "grey": good[:, :1],
        "no batch": good[0],
        "small": good[..., :7, :],
        "whole numbers": (good * 127).to(torch.uint8),
        "half": good.half(),
        "list": good.tolist(),
    }


@pytest.mark.parametrize("kind", bad_frames())
def test_what_is_no_frame_is_refused(pipe, kind):
    with pytest.raises(IncompatibleInputError) as caught:
        pipe.process_frame(bad_frames()[kind])
    assert re.search(r"must be .*, not |has \d+ values that are NaN", str(caught.value))
    assert isinstance(caught.value, ValueError)


def test_finite_values_outside_the_range_pass_unclamped(pipe, clip):
    bright = pipe.process_frame(clip[:1] * 3, None, FAST)
    assert torch.equal(bright.state.previous_lq, clip[:1] * 3)
    assert not torch.equal(bright.hq, pipe.process_frame((clip[:1] * 3).clamp(-1, 1), None, FAST).hq)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", torch.zeros(1, 4, 12, 15)),
        ("latents", torch.full((1, 4, 12, 16), float("nan"))),
        ("flow", torch.zeros(1, 2, 12, 16)),
        ("flow", torch.full((1, 2, 48, 64), float("inf"))),
    ],
)
def test_given_tensors_are_checked(pipe, clip, name, value):
    with pytest.raises(IncompatibleInputError, match=name):
        pipe.process_frame(clip[:1], None, FAST, **{name: value})


def test_a_callable_flow_is_checked(checkpoint, clip):
    pipe = load_pipeline(checkpoint, device="cpu", flow=lambda now, before: now[:, :2, ::2])
    with pytest.raises(IncompatibleInputError, match="callable"):
        pipe(clip[:2], FAST)


def test_a_state_of_another_size_or_model_is_refused(pipe, clip):
    _, state = pipe(clip[:1], FAST)
    with pytest.raises(IncompatibleInputError, match=r"16x12.*20x12"):
        pipe.process_frame(moving(1, 12, 20), state, FAST)
    with pytest.raises(IncompatibleInputError, match="another"):
        pipe.process_frame(clip[1:2], replace(state, metadata={"model": "another"}), FAST)
    pipe.process_frame(clip[1:2], replace(state, metadata={}), FAST)


def test_changed_settings_are_said_once(guided, clip, caplog):
    _, state = guided(clip[:1], FAST)
    with caplog.at_level(logging.WARNING):
        guided(clip[1:4], replace(FAST, seed=6), state)
    said = [record for record in caplog.records if "settings changed" in record.message]
    assert len(said) == 1
    assert "seed: 5 -> 6" in said[0].message
    caplog.clear()
    guided(clip[1:3], FAST, state)
    assert not caplog.records


def test_placement_is_asked_before_each_stage(checkpoint, clip):
    pipe = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
    asked = []

    class Ask:
        fixed = False

        def acquire(self, stage, activation_bytes):
            assert isinstance(activation_bytes, int)
            asked.append(stage)
            return torch.device("cpu")

    pipe.placement = Ask()
    pipe(clip[:2], FAST)
    assert set(asked) == set(pipe.stages) == {"flow", "unet", "controlnet", "vae"}


def test_batch_call_checks_what_it_gets(pipe):
    with pytest.raises(IncompatibleInputError):
        pipe(torch.zeros(3, 8, 8))


def test_empty_batch_gives_the_state_back(pipe):
    hq, state = pipe(torch.zeros(0, 3, 8, 8))
    assert hq.shape == (0, 3, 32, 32)
    assert not state.has_previous


def test_zero_flow_is_no_identity():
    """The reference's shift: -0.5 px at the left edge, +0.5 at the right, outside is grey."""
    ramp = torch.arange(9.0).expand(1, 1, 5, 9)
    middle = warp(ramp, torch.zeros(1, 2, 5, 9))[0, 0, 2]
    positions = torch.arange(9.0) * 9 / 8 - 0.5
    torch.testing.assert_close(middle[1:-1], positions[1:-1], atol=1e-5, rtol=0)
    assert torch.equal(warp(ramp, torch.full((1, 2, 5, 9), 50.0)), torch.zeros(1, 1, 5, 9))


def test_to_pixels_and_back():
    hq = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert to_pixels(hq).tolist() == [0, 0, 0.5, 1, 1]


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=70),
    st.booleans(),
)
def test_finite_or_not(values, strided):
    x = torch.tensor(values)
    x = torch.stack([x, x.flip(0)]).T if strided else x
    assert is_finite(x) == bool(torch.isfinite(x).all())
