"""Presets and what they are made of: named approximations, each off by default and exactly continuous."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from samples import moving

from stream_diffvsr import IncompatibleInputError, UpscaleOptions, load_pipeline
from stream_diffvsr.families.diffvsr.options import PRESETS
from stream_diffvsr.options import with_preset


def control_calls(pipe, options: UpscaleOptions, clip: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How often the ControlNet ran for a clip, and the result."""
    calls = []
    handle = pipe.control.body.register_forward_hook(lambda *_: calls.append(1))
    try:
        hq, _ = pipe(clip, options)
    finally:
        handle.remove()
    return len(calls), hq


@pytest.mark.parametrize(("every", "calls"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_control_every(guided, every, calls):
    count, hq = control_calls(guided, UpscaleOptions(control_every=every), moving(2))
    assert count == calls
    exact, _ = guided(moving(2), UpscaleOptions())
    assert torch.equal(hq, exact) == (every == 1)


def test_control_every_with_guidance_by_prompts_and_late_control(guided):
    options = UpscaleOptions(control_every=2, guidance_scale=2.0, control_guidance_start=0.25)
    assert control_calls(guided, options, moving(2))[0] == 4  # steps 2 and 3, for both prompts


def test_tiles_keep_nothing(guided):
    tiled = {"memory_plan": "tiled", "tile_size": 64, "tile_overlap": 16}
    clip = moving(2, 24, 24)
    kept, _ = guided(clip, UpscaleOptions(control_every=4, **tiled))
    assert torch.equal(kept, guided(clip, UpscaleOptions(**tiled))[0])


@pytest.mark.parametrize("preset", PRESETS)
def test_continuity(pipe_with_dis, preset, tmp_path):
    options, clip = UpscaleOptions(**with_preset(PRESETS, preset, {"num_inference_steps": 2})), moving(4)
    whole, _ = pipe_with_dis(clip, options)
    first, state = pipe_with_dis(clip[:2], options)
    state.save(tmp_path / "state.safetensors")
    second, _ = pipe_with_dis(clip[2:], options, type(state).load(tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.fixture(scope="module")
def pipe_with_dis(checkpoint):
    return load_pipeline(checkpoint, device="cpu", flow="dis")


def test_what_is_given_wins_over_a_preset():
    assert with_preset(PRESETS, "exact", {}) == {}
    assert with_preset(PRESETS, "fast", {"flow_scale": 0.25, "seed": 3}) == {
        "flow_scale": 0.25,
        "seed": 3,
        "control_every": PRESETS["fast"]["control_every"],
    }
    assert UpscaleOptions(**with_preset(PRESETS, "fast", {"flow_scale": 1.0})).flow_scale == 1.0
    with pytest.raises(IncompatibleInputError, match="exact, balanced, fast"):
        with_preset(PRESETS, "best", {})
    for fields in PRESETS.values():
        UpscaleOptions(**fields)


def test_the_node_and_the_command_know_the_same_presets():
    from node_pack import load_pack

    settings = load_pack().NODE_CLASS_MAPPINGS["StreamDiffVSR_Settings"]
    names, _ = settings.INPUT_TYPES()["optional"]["preset"]
    assert names == list(PRESETS)
    for name, fields in PRESETS.items():
        (value,) = settings().execute(preset=name)
        options = json.loads(value.options().to_json())
        assert {key: options[key] for key in fields} == fields
    help_text = subprocess.run(
        [sys.executable, "-m", "stream_diffvsr.cli.main", "upscale", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(name in help_text for name in PRESETS) and "--compile-mode" in help_text
