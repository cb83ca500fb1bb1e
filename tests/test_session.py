"""Sessions: what every family promises of a sequence, for Stream-DiffVSR."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from samples import moving

from stream_diffvsr import FrameResult, IncompatibleInputError, UpscaleOptions
from stream_diffvsr.upscaler import Provenance, State, Upscaled, stream

FAST = UpscaleOptions(num_inference_steps=2, seed=5)


@pytest.fixture(scope="module")
def clip():
    return moving(4)


@pytest.fixture(scope="module")
def whole(guided, clip):
    return guided(clip, FAST)[0]


def test_a_session_gives_each_frame_at_once(guided, clip, whole):
    session = guided.session(FAST, State(index=0))
    for index, lq in enumerate(clip.split(1)):
        (result,) = session.push(lq)
        assert isinstance(result, Upscaled) and isinstance(result, FrameResult)
        assert result.index == index and session.state().index == index + 1
        assert torch.equal(result.hq[0], whole[index])
    assert session.finish() == []


def test_sessions_of_one_pipeline_interleave(guided, clip, whole):
    """With other options, sizes and starting points between the frames."""
    others = [
        guided.session(replace(FAST, seed=9, guidance_scale=2.0)),
        guided.session(UpscaleOptions(num_inference_steps=1, occlusion="mask"), State(index=40)),
    ]
    wide = moving(4, 16, 20)
    session = guided.session(FAST)
    for index in range(4):
        (result,) = session.push(clip[index : index + 1])
        assert torch.equal(result.hq[0], whole[index])
        for other in others:
            other.push(wide[index : index + 1])


def test_threads_with_other_options_wait_for_each_other(guided, clip, whole):
    """Other seeds and prompts in each thread: nothing of one shows in another."""
    results: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        results[seed] = guided(clip, replace(FAST, seed=seed))[0]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (5, 6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[5], whole)
    assert torch.equal(results[7], guided(clip, replace(FAST, seed=7))[0])
    assert not torch.backends.cudnn.deterministic


def test_a_fixed_provenance_starts_every_scene_alike(guided, clip, whole):
    fixed = guided.provenance((12, 16), FAST)
    assert fixed.model == guided.model and fixed.details["plan"] and fixed.options["seed"] == 5
    start = State(index=2, provenance=fixed)
    scene = list(stream(guided.session(FAST, start), clip[2:].split(1)))
    alone = list(stream(guided.session(FAST, State(index=2)), clip[2:].split(1)))
    assert [result.index for result in scene] == [2, 3]
    assert all(torch.equal(a.hq, b.hq) for a, b in zip(scene, alone, strict=True))


def test_a_state_comes_back_from_a_file_as_any_state(guided, clip, whole, tmp_path):
    session = guided.session(FAST)
    for lq in clip[:2].split(1):
        session.push(lq)
    session.state().save(tmp_path / "s")
    rest = list(stream(guided.session(FAST, State.load(tmp_path / "s")), clip[2:].split(1)))
    assert torch.equal(torch.cat([result.hq for result in rest]), whole[2:])


def test_given_noise_is_of_the_frames_in_order(pipe, clip):
    noise = torch.randn(2, 4, 12, 16)
    results = list(pipe.stream(clip[:2].split(1), FAST, noise=noise))
    state = None
    for index, result in enumerate(results):
        expected = pipe.process_frame(clip[index : index + 1], state, FAST, latents=noise[index : index + 1])
        assert torch.equal(result.hq, expected.hq)
        state = expected.state


def test_info(guided):
    info = guided.info
    assert (info.family, info.scales, info.first, info.chunk, info.look_ahead) == ("diffvsr", (4.0,), 1, 1, 0)
    assert info.frame_by_frame and info.model == guided.model and info.minimum == 8
    assert guided.bytes_needed((270, 480), FAST) > 4 * guided.bytes_needed((90, 160), FAST)


def test_a_state_of_another_family_is_refused(guided):
    other = State("chunks", 3, {"cache": torch.zeros(1)}, Provenance("x"))
    with pytest.raises(IncompatibleInputError, match=r"chunks.*diffvsr"):
        guided.session(FAST, other)
