"""State nodes, Settings, and where nodes may write."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from node_pack import load_pack, part

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
CREATE = NODES["StreamDiffVSR_CreateState"]
EXTRACT = NODES["StreamDiffVSR_ExtractState"]
SAVE = NODES["StreamDiffVSR_SaveState"]
LOAD = NODES["StreamDiffVSR_LoadState"]
SETTINGS = NODES["StreamDiffVSR_Settings"]
files = part(PACK, "nodes.files")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ComfyUI the output and input folders are those below the working folder."""
    monkeypatch.chdir(tmp_path)


def filled_state():
    return CREATE().execute(torch.rand(1, 32, 48, 3))[0]


def test_an_empty_state() -> None:
    (state,) = CREATE().execute()
    frame, index, has_previous, info = EXTRACT().execute(state)
    assert torch.equal(frame, torch.zeros(1, 8, 8, 3))
    assert (index, has_previous) == (0, False)
    assert "black" in info


def test_a_state_from_a_frame() -> None:
    image = torch.rand(1, 32, 48, 4)
    (state,) = CREATE().execute(image)
    frame, index, has_previous, info = EXTRACT().execute(state)
    assert (index, has_previous) == (1, True)
    assert torch.allclose(frame, image[..., :3], atol=1e-6)
    assert "12x8" in info and "48x32" in info
    squares = (image[..., :3] * 2 - 1).reshape(8, 4, 12, 4, 3).mean((1, 3))
    assert torch.allclose(state.previous_lq[0].movedim(0, -1), squares, atol=1e-6)
    assert "model" not in state.metadata


def test_a_state_with_its_own_lq() -> None:
    small = torch.rand(1, 8, 12, 3)
    (state,) = CREATE().execute(torch.rand(1, 32, 48, 3), small)
    assert torch.equal(state.previous_lq, small.movedim(-1, 1) * 2 - 1)


@pytest.mark.parametrize(
    "frame, lq, said",
    [
        (None, (1, 8, 8, 3), "initial_lq can only be used together with initial_frame"),
        ((1, 30, 48, 3), None, "48x30"),
        ((2, 32, 48, 3), None, "a batch of 2"),
        ((1, 32, 48, 3), (1, 9, 12, 3), "previous_hq"),
    ],
)
def test_what_makes_no_state_is_refused(frame, lq, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        CREATE().execute(*(None if size is None else torch.rand(size) for size in (frame, lq)))
    assert said in str(refusal.value)


def test_creating_and_extracting_leave_their_inputs_alone() -> None:
    image = torch.rand(1, 32, 48, 3)
    before = image.clone()
    (state,) = CREATE().execute(image)
    frame, *_ = EXTRACT().execute(state)
    frame.zero_()
    assert torch.equal(image, before) and state.previous_hq.abs().sum() > 0


def test_saved_and_loaded_is_the_same() -> None:
    state = filled_state()
    done = SAVE().execute(state, "stream_diffvsr/state")
    (path,) = done["result"]
    assert done["ui"]["text"] == [path]
    assert Path(path) == Path.cwd() / "output" / "stream_diffvsr" / "state_00001_.safetensors"
    name = "stream_diffvsr/state_00001_.safetensors [output]"
    assert LOAD.INPUT_TYPES()["required"]["state_file"][0] == [name]
    for given_name in (name, path):
        assert LOAD.VALIDATE_INPUTS(given_name) is True
        (loaded,) = LOAD().execute(given_name)
        assert torch.equal(loaded.previous_hq, state.previous_hq)
        assert torch.equal(loaded.previous_lq, state.previous_lq)
        assert (loaded.frame_index, loaded.metadata) == (state.frame_index, state.metadata)


def test_saving_never_overwrites() -> None:
    names = [Path(SAVE().execute(filled_state(), "mine")["result"][0]).name for _ in range(3)]
    assert names == [f"mine_0000{number}_.safetensors" for number in (1, 2, 3)]


def test_newest_state_first_and_nothing_else_is_listed() -> None:
    for prefix in ("a", "b"):
        SAVE().execute(filled_state(), prefix)
    os.utime("output/a_00001_.safetensors", (2e9, 2e9))
    Path("input").mkdir()
    Path("input/other.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    assert files.saved_states() == ["a_00001_.safetensors [output]", "b_00001_.safetensors [output]"]


def test_a_missing_state_names_the_remedy() -> None:
    said = LOAD.VALIDATE_INPUTS("gone.safetensors [output]")
    assert "Save State first" in said and "gone.safetensors" in said


def test_loading_notices_a_changed_file() -> None:
    (path,) = SAVE().execute(filled_state(), "x")["result"]
    before = LOAD.IS_CHANGED(path)
    assert LOAD.IS_CHANGED(path) == before
    os.utime(path, (1e9, 1e9))
    assert LOAD.IS_CHANGED(path) != before


@pytest.mark.parametrize("prefix", ["../out", "/somewhere/else", "a/../../b"])
def test_nothing_is_written_outside_the_output_folder(prefix: str) -> None:
    with pytest.raises(ValueError, match="outputs must be inside"):
        SAVE().execute(filled_state(), prefix)


def test_links_out_of_the_output_folder_are_followed_and_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outputs must be inside"):
        files.writable("link/x")


def test_the_user_may_allow_any_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_DIFFVSR_ALLOW_ANY_OUTPUT", "1")
    assert files.writable(tmp_path / "else" / "where") == tmp_path / "else" / "where"


def test_prefixes_are_filled_in() -> None:
    assert (
        files.fill_in("%year%-%month%-%day%_%hour%%minute%%second%")
        .replace("-", "")
        .replace("_", "")
        .isdigit()
    )


names = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters='/\\<>:"|?*'), min_size=1
)


@given(names.filter(lambda name: name.strip(". ") == name))
def test_a_state_name_means_the_same_on_every_system(name: str) -> None:
    """Spaces, letters of any script; written with / in workflows, whoever saved them."""
    for flavour in (PurePosixPath, PureWindowsPath):
        shown = files.listed_name(
            flavour("output", "sub folder", f"{name}.safetensors"), flavour("output"), "output"
        )
        assert shown == f"sub folder/{name}.safetensors [output]"
        assert flavour(shown.removesuffix(" [output]")).name == f"{name}.safetensors"


def test_settings_defaults_are_the_engines() -> None:
    (settings,) = SETTINGS().execute()
    options = type(settings.options())
    assert settings.options() == options()


def test_settings_reach_the_options() -> None:
    (settings,) = SETTINGS().execute(
        guidance_scale=2.0, flow_scale="0.5", timestep_spacing="trailing", control_guidance_end=0.5
    )
    options = settings.options(seed=4)
    assert (options.guidance_scale, options.flow_scale) == (2.0, 0.5)
    assert (options.timestep_spacing, options.control_guidance_end, options.seed) == ("trailing", 0.5, 4)


@pytest.mark.parametrize(
    "preset, own, control_every, flow_scale",
    [
        ("exact", {}, 1, 1.0),
        ("balanced", {}, 2, 1.0),
        ("fast", {}, 4, 0.5),
        ("fast", {"flow_scale": 0.25}, 4, 0.25),
        ("exact", {"flow_scale": 0.5}, 1, 0.5),
    ],
)
def test_presets_reach_the_options(preset: str, own: dict, control_every: int, flow_scale: float) -> None:
    options = SETTINGS().execute(preset=preset, **own)[0].options()
    assert (options.control_every, options.flow_scale) == (control_every, flow_scale)


def test_presets_and_compile_modes_are_the_engines() -> None:
    module, widgets = (
        part(PACK, "stream_diffvsr.families.diffvsr.options"),
        SETTINGS.INPUT_TYPES()["optional"],
    )
    assert widgets["preset"][0] == list(module.PRESETS)
    for name in ("compile_mode", "memory_plan", "flow_scale"):
        assert widgets[name][0] == list(
            part(PACK, "stream_diffvsr.options").rules(module.UpscaleOptions)[name].choices
        )


def test_settings_of_files_stay_apart() -> None:
    (settings,) = SETTINGS().execute(codec="ffv1", crf=3, scene_cut="off")
    assert settings.file == {
        "scene_cut": "off",
        "scene_cut_threshold": 27.0,
        "codec": "ffv1",
        "crf": 3,
        "pix_fmt": "auto",
    }


@pytest.mark.parametrize(
    "name", ["guidance_scale", "controlnet_conditioning_scale", "control_guidance_start"]
)
def test_wrong_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SETTINGS().execute(**{name: -1.0})


def test_a_saved_state_that_is_gone_is_saved_again() -> None:
    state, node = CREATE().execute()[0], SAVE()
    (path,) = node.execute(state, "gone", unique_id="9")["result"]
    before = SAVE.IS_CHANGED(filename_prefix="gone", unique_id="9")
    Path(path).unlink()
    assert SAVE.IS_CHANGED(filename_prefix="gone", unique_id="9") != before
