"""States: frozen values, saved whole or not at all, refused with a clear sentence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import moving

from stream_diffvsr import (
    CheckpointError,
    IncompatibleInputError,
    ModelNotFoundError,
    StreamDiffVSRState,
    UpscaleOptions,
)
from stream_diffvsr.jobs.prepare import state_key
from stream_diffvsr.tensors import upsample
from stream_diffvsr.upscaler import Provenance, State


@pytest.fixture
def state() -> StreamDiffVSRState:
    lq = moving(1, 8, 11)
    return StreamDiffVSRState(
        previous_hq=upsample(lq), previous_lq=lq, frame_index=7, metadata={"model": "x", "ü": "ß"}
    )


def test_saved_and_loaded(state, tmp_path):
    path = tmp_path / "with spaces and ü.safetensors"
    state.save(path)
    loaded = StreamDiffVSRState.load(str(path))
    assert torch.equal(loaded.previous_hq, state.previous_hq)
    assert torch.equal(loaded.previous_lq, state.previous_lq)
    assert (loaded.frame_index, loaded.metadata) == (7, {"model": "x", "ü": "ß"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file stays"


def test_older_files_load_and_their_flow_is_ignored(state, tmp_path):
    tensors = {**state.tensors, "flow": torch.zeros(1, 2, 32, 44)}
    texts = {"model": "x", "options": '{"seed": 3}', "plan": "{}", "format": "stream-diffvsr-state-1"}
    save_file(tensors, tmp_path / "s", {**texts, "frame_index": "7"})
    loaded = StreamDiffVSRState.load(tmp_path / "s")
    assert torch.equal(loaded.previous_hq, state.previous_hq) and loaded.frame_index == 7
    assert loaded.provenance == Provenance("x", options={"seed": 3}, details={"plan": "{}"})
    assert set(State.load(tmp_path / "s").tensors) == {"previous_hq", "previous_lq"}


def test_a_state_can_be_saved_over_the_file_it_came_from(state, tmp_path):
    state.save(tmp_path / "s")
    loaded = StreamDiffVSRState.load(tmp_path / "s")
    before = loaded.previous_hq.clone()
    replace(loaded, frame_index=8).save(tmp_path / "s")
    (tmp_path / "s").write_bytes(b"x" * 4096)
    assert torch.equal(loaded.previous_hq, before)


@pytest.mark.parametrize(
    "texts", [{"options": "no JSON"}, {"options": "[]"}, {"frame_index": "9" * 5000}, {"family": "flashvsr"}]
)
def test_invalid_contents_are_one_sentence(state, texts, tmp_path):
    texts = {"format": "stream-diffvsr-state-2", "frame_index": "7", **texts}
    save_file(dict(state.tensors), tmp_path / "s", texts)
    with pytest.raises(CheckpointError, match=r"invalid|not a saved"):
        StreamDiffVSRState.load(tmp_path / "s")


def test_any_family_saves_and_loads(tmp_path):
    made = Provenance("m", "bfloat16", "torch", {"steps": 1}, {"phase": "2"})
    state = State("chunks", 12, {"cache": torch.arange(6.0).view(2, 3)}, made)
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    assert (loaded.family, loaded.index, loaded.provenance) == ("chunks", 12, made)
    assert torch.equal(loaded.tensors["cache"], state.tensors["cache"]) and loaded.nbytes == 24
    with pytest.raises(IncompatibleInputError, match=r"chunks.*diffvsr"):
        StreamDiffVSRState.of(state)


def test_an_empty_state_is_saved_too(tmp_path):
    StreamDiffVSRState(frame_index=2**40).save(tmp_path / "s")
    loaded = StreamDiffVSRState.load(tmp_path / "s")
    assert (loaded.has_previous, loaded.frame_index) == (False, 2**40)


def test_a_failed_save_leaves_the_old_file(state, tmp_path):
    path = tmp_path / "s.safetensors"
    state.save(path)
    before = path.read_bytes()
    broken = replace(state, metadata={"model": 5})
    with pytest.raises(Exception, match=r"metadata|str|convert"):
        broken.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_copies_and_devices(state):
    assert torch.equal(copy.deepcopy(state).previous_hq, state.previous_hq)
    assert torch.equal(state.to("cpu").previous_hq, state.previous_hq)
    assert StreamDiffVSRState().to("cpu").previous_hq is None


def test_metadata_is_the_states_own():
    given_metadata = {"a": "b"}
    state = StreamDiffVSRState(metadata=given_metadata)
    given_metadata["a"] = "c"
    assert state.metadata == {"a": "b"}


@given(cut=st.floats(0, 0.999))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "s.safetensors"
    lq = moving(1, 8, 8)
    StreamDiffVSRState(previous_hq=upsample(lq), previous_lq=lq).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CheckpointError, match=r"s\.safetensors"):
        StreamDiffVSRState.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="missing"):
        StreamDiffVSRState.load(tmp_path / "missing")
    save_file({"weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors is not a saved"):
        StreamDiffVSRState.load(tmp_path / "lora.safetensors")


LQ = torch.zeros(1, 3, 8, 8)
HQ = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"previous_hq": HQ},
        {"previous_lq": LQ},
        {"previous_hq": HQ[..., :31], "previous_lq": LQ},
        {"previous_hq": HQ.half(), "previous_lq": LQ},
        {"previous_hq": HQ, "previous_lq": LQ.double()},
        {"previous_hq": HQ * float("nan"), "previous_lq": LQ},
        {"previous_hq": HQ, "previous_lq": LQ[0]},
        {"frame_index": -1},
        {"frame_index": 1.5},
        {"frame_index": True},
    ],
    ids=str,
)
def test_impossible_states_are_refused(wrong):
    with pytest.raises(IncompatibleInputError):
        StreamDiffVSRState(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": 4.0},
        {"num_inference_steps": True},
        {"seed": 2**64},
        {"seed": "1"},
        {"guidance_scale": -1},
        {"guidance_scale": float("nan")},
        {"controlnet_conditioning_scale": float("inf")},
        {"control_guidance_start": 1.5},
        {"control_guidance_end": -0.1},
        {"timestep_spacing": "middle"},
        {"flow_scale": 0.3},
        {"memory_plan": "small"},
        {"compile_mode": "on"},
        {"tile_size": 512, "tile_overlap": 256},
        {"tile_overlap": -1},
        {"prompt": None},
        {"use_tpm": "yes"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(IncompatibleInputError, match=next(reversed(wrong)) if len(wrong) == 1 else "tile"):
        UpscaleOptions(**wrong)


def test_options_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        UpscaleOptions(4)
    with pytest.raises(AttributeError):
        UpscaleOptions().seed = 1


def test_the_journal_tells_states_apart_by_every_tensor():
    """A run that went on from another state must not be resumed with this one."""
    state = StreamDiffVSRState(previous_hq=HQ, previous_lq=LQ, frame_index=3)
    others = [{"previous_hq": HQ + 1}, {"previous_lq": LQ + 1}, {"frame_index": 4}]
    assert state_key(state) == state_key(replace(state, previous_hq=HQ.clone()))
    assert len({state_key(state), *(state_key(replace(state, **other)) for other in others)}) == 4
