"""A model that takes chunks, behind the same types and in the same jobs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from chunk_family import ChunkOptions, ChunkUpscaler
from samples import moving

from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.jobs.scenes import in_scenes
from stream_diffvsr.upscaler import State, stream

MODEL = ChunkUpscaler()


@pytest.fixture(scope="module")
def clip():
    return moving(60, 8, 9)


def upscaled(frames, state=None):
    return list(MODEL.stream(frames.split(1), ChunkOptions(), state))


@pytest.mark.parametrize("count", range(1, 61))
def test_as_many_frames_come_out_as_go_in(clip, count):
    results = upscaled(clip[:count])
    assert [result.index for result in results] == list(range(count))


@pytest.mark.parametrize("border", [21, 29, 53])
def test_split_at_a_border_saved_and_loaded_equals_whole(clip, border, tmp_path):
    whole = upscaled(clip)
    session = MODEL.session(ChunkOptions())
    states = {}
    for lq in clip.split(1):
        session.push(lq)
        if (state := session.state()) is not None:
            states[state.index] = state
    assert set(states) == {21, 29, 37, 45, 53}
    states[border].save(tmp_path / "s")
    rest = upscaled(clip[border:], State.load(tmp_path / "s"))
    assert [result.index for result in rest] == list(range(border, 60))
    assert all(torch.equal(a.hq, b.hq) for a, b in zip(rest, whole[border:], strict=True))


def test_the_next_frame_is_read_only_when_the_last_was_used(clip):
    asked: list[int] = []
    frames = (asked.append(index) or clip[index : index + 1] for index in range(60))
    results = stream(MODEL.session(), frames)
    for _ in range(21):
        next(results)
        assert len(asked) == 25
    next(results)
    assert len(asked) == 33


def test_scenes_are_read_straight_on():
    asked = []
    numbers = (asked.append(n) or n for n in [1, 2, 3, 10, 11, 30])
    found = []
    for cut, scene in in_scenes(numbers, lambda now, then: now is not None and then - now > 5):
        found.append((cut, []))
        for number in scene:
            assert asked[-1] == number
            found[-1][1].append(number)
    assert found == [(False, [1, 2, 3]), (True, [10, 11]), (True, [30])]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return clips.write_video(tmp_path_factory.mktemp("source") / "in.mp4", 60)


def job(source: Path, output: Path, cuts: str) -> VideoJob:
    return VideoJob(
        source=source, output=output, options=ChunkOptions(), segment_frames=10, scene_cut=cuts, codec="ffv1"
    )


@pytest.mark.parametrize("after", [1, 24, 31, 45, 59])
@pytest.mark.parametrize("cut", [None, 34])
def test_jobs_resume_at_borders_and_at_scenes(source, tmp_path, after, cut):
    """The frames of an interrupted job are those of an uninterrupted one, and of its scenes alone."""
    rule = "off"
    if cut is not None:
        (tmp_path / "cuts.csv").write_text(f"{cut}\n")
        rule = str(tmp_path / "cuts.csv")
    whole, parts = tmp_path / "whole.mkv", tmp_path / "parts.mkv"
    steps = list(run(MODEL, job(source, whole, rule)))
    assert [step.index for step in steps] == list(range(60))
    with contextlib.closing(run(MODEL, job(source, parts, rule))) as begun:
        for _ in range(after):
            next(begun)
    assert [step.index for step in run(MODEL, job(source, parts, rule))][-1] == 59
    pairs = zip(clips.frames_of(whole), clips.frames_of(parts), strict=True)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs)
    if cut is not None:
        lq = torch.cat([2 * step.lq - 1 for step in steps[cut:]])
        alone = upscaled(lq, State(index=cut))
        hq = [(step.hq * 2 - 1) for step in steps[cut:]]
        assert all(
            torch.allclose(a.hq.clamp(-1, 1), b.clamp(-1, 1), atol=1e-6)
            for a, b in zip(alone, hq, strict=True)
        )
