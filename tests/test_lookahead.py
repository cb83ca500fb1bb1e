"""Flow estimated a frame ahead: the same frames to the last bit, and nothing lost if something is wrong."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import clips
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import moving, shift_flow
from test_video_job import finish, job, same_frames

from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.networks import open_model
from stream_diffvsr.families.diffvsr import choose
from stream_diffvsr.families.diffvsr.lookahead import with_next
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.jobs.run import run

OPTIONS = UpscaleOptions(num_inference_steps=1)


class BrokenError(Exception):
    pass


@pytest.fixture
def begun(guided, monkeypatch) -> list[bool]:
    """For each frame that was asked for in advance, whether its flow was."""
    found, begin = [], guided.begin_flow

    def noted(*args):
        result = begin(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(guided, "begin_flow", noted)
    return found


def upscale(pipe, frames, look_ahead, state=None, options=OPTIONS):
    return list(pipe.stream(list(frames), options, state, look_ahead=look_ahead))


def assert_same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.hq, theirs.hq)
        assert mine.state.metadata == theirs.state.metadata


@pytest.mark.parametrize("plan", ["auto", "whole", "banded", "tiled"])
def test_the_same_frames(guided, begun, plan):
    options = UpscaleOptions(num_inference_steps=1, memory_plan=plan)
    clip = moving(5).split(1)
    assert_same(upscale(guided, clip, True, options=options), upscale(guided, clip, False, options=options))
    assert begun == [False, True, True, True]


@pytest.mark.parametrize("flow", ["bundled", "dis"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_same_frames_with_nano(flow, scale):
    pipe = load_pipeline("nano", device="cpu", flow=flow)
    options = UpscaleOptions(num_inference_steps=1, flow_scale=scale)
    clip = moving(4, 24, 32).split(1)
    assert_same(upscale(pipe, clip, True, options=options), upscale(pipe, clip, False, options=options))


@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(1, 5))
def test_any_split_continues_exactly(guided, first, second):
    clip = moving(first + second).split(1)
    whole = upscale(guided, clip, False)
    head = upscale(guided, clip[:first], True)
    tail = upscale(guided, clip[first:], True, head[-1].state)
    assert_same([*head, *tail], whole)


def test_one_frame_ahead_and_no_more(guided):
    taken = []
    frames = (taken.append(index) or frame for index, frame in enumerate(moving(4).split(1)))
    results = guided.stream(frames, OPTIONS, look_ahead=True)
    for index in range(4):
        next(results)
        assert len(taken) == min(index + 2, 4)


def test_without_memory_for_both_it_waits_for_its_turn(guided, begun, monkeypatch):
    clip = moving(4).split(1)
    whole = upscale(guided, clip, False)
    monkeypatch.setattr(choose, "free_memory", lambda device: 0)
    assert_same(upscale(guided, clip, True, StreamDiffVSRState(metadata=whole[0].state.metadata)), whole)
    assert begun == [False, False, False]


def test_where_a_host_places_the_networks_it_waits_for_its_turn(guided, begun, monkeypatch):
    class Elsewhere:
        def acquire(self, stage, activation_bytes):
            return torch.device("cpu")

    monkeypatch.setattr(guided, "placement", Elsewhere())
    upscale(guided, moving(3).split(1), True)
    assert begun == [False, False]


def test_flow_that_several_frames_share_is_not_estimated_ahead(guided, begun):
    options = UpscaleOptions(num_inference_steps=1, flow_every=2)
    clip = moving(5).split(1)
    assert_same(upscale(guided, clip, True, options=options), upscale(guided, clip, False, options=options))
    assert not any(begun)


def test_what_is_wrong_with_a_flow_shows_when_its_frame_has_its_turn(checkpoint):
    def breaks(current, previous):
        if calls.append(None) or len(calls) > 2:
            raise BrokenError
        return shift_flow(current, previous)

    calls = []
    pipe = load_pipeline(checkpoint, device="cpu", flow=breaks)
    results = pipe.stream(moving(5).split(1), OPTIONS, look_ahead=True)
    assert len([next(results) for _ in range(3)]) == 3
    with pytest.raises(BrokenError):
        next(results)


def test_what_is_wrong_with_a_frame_does_not_cost_the_one_before():
    def two():
        yield from (1, 2)
        raise BrokenError

    pairs = with_next(two(), True)
    assert [next(pairs), next(pairs)] == [(1, 2), (2, None)]
    with pytest.raises(BrokenError):
        next(pairs)


@given(st.lists(st.integers(), max_size=6))
def test_each_with_the_next(items):
    assert list(with_next(items, True)) == list(zip(items, [*items, None][1:], strict=True))
    assert list(with_next(items, False)) == [(item, None) for item in items]


def test_a_video_with_scenes_is_the_same(guided, begun, tmp_path: Path):
    source = clips.write_video(tmp_path / "in.mp4", 9)
    cuts = tmp_path / "cuts.csv"
    cuts.write_text("0\n4\n")
    for name, look_ahead in (("ahead", True), ("plain", False)):
        task = job(source, tmp_path / f"{name}.mp4", look_ahead=look_ahead, scene_cut=str(cuts))
        assert finish(guided, task) == list(range(9))
    same_frames(tmp_path / "ahead.mp4", tmp_path / "plain.mp4")
    assert begun == [False, *[True] * 7]


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_job_that_was_cancelled_goes_on(guided, after, tmp_path: Path):
    source = clips.write_video(tmp_path / "in.mp4", 7)
    finish(guided, job(source, tmp_path / "whole.mp4"))
    task = job(source, tmp_path / "ahead.mp4", look_ahead=True)
    with contextlib.closing(run(guided, task)) as steps:
        for _ in range(after):
            next(steps)
    finish(guided, task)
    same_frames(tmp_path / "ahead.mp4", tmp_path / "whole.mp4")


def test_a_plan_that_was_lowered_meanwhile_has_its_own_flow(checkpoint):
    """Flow in tiles has other numbers than flow begun for the whole frame."""
    pipe = load_pipeline(checkpoint, device="cpu", flow="dis")
    clip = moving(3, 32, 40).split(1)
    states = [result.state for result in pipe.stream(clip, OPTIONS)]
    begun = pipe.begin_flow(clip[2], clip[1], states[0], OPTIONS)
    assert begun.method == "whole"
    plan = Plan.from_json(states[1].metadata["plan"])
    lowered = replace(
        states[1], metadata={**states[1].metadata, "plan": replace(plan, flow="tiled").to_json()}
    )
    wrong = replace(begun, flow=begun.flow + 5)
    alone = pipe.process_frame(clip[2], lowered, OPTIONS).hq
    assert torch.equal(pipe.process_frame(clip[2], lowered, OPTIONS, flow=wrong).hq, alone)
    assert not torch.equal(pipe.process_frame(clip[2], states[1], OPTIONS, flow=wrong).hq, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_same_frames():
    pipe = open_model("random", "cuda", "float32", "raft_large")
    clip = moving(6, 96, 128).split(1)
    assert_same(upscale(pipe, clip, True), upscale(pipe, clip, False))
