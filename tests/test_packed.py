"""Packed linear layers: the same numbers, only where they pay, and never those of other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import moving, shift_flow
from test_golden import assert_near, upscale
from torch import nn

from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.families.diffvsr.plan import Plan
from stream_diffvsr.runtimes.torch import folded, packed

OPTIONS = UpscaleOptions(num_inference_steps=2)


@pytest.fixture
def paying(monkeypatch):
    """As on a processor where it pays, and for the tiny layers of the tests."""
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(packed, "is_faster_here", lambda: True)
    monkeypatch.setattr(packed, "SMALLEST", 1)


@pytest.fixture
def own(checkpoint):
    """A pipe that no other test has packed."""
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow)


def layers(pipe) -> list[nn.Linear]:
    named = pipe.stages["unet"].named_modules()
    return [each for name, each in named if isinstance(each, nn.Linear) and ".attentions." in name]


def test_same_numbers_and_exact_continuity(own, guided, paying, tmp_path):
    clip = moving(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "is_faster_here", lambda: False)
        expected, _ = guided(clip, OPTIONS)
    whole, _ = own(clip, OPTIONS)
    assert all(layer in packed._kept and "forward" not in vars(layer) for layer in layers(own))
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=0)
    first, state = own(clip[:1], OPTIONS)
    state.save(tmp_path / "state.safetensors")
    second, _ = own(clip[1:], OPTIONS, type(state).load(tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("case", ["A", "B"])
def test_recorded_numbers(own, paying, golden: Path, case):
    recorded = load_file(golden / f"case_{case}.safetensors")
    count = len(recorded["init_latents"])
    assert_near(upscale(own, recorded, UpscaleOptions(), count, recorded["flows"]), recorded["hq"])


@pytest.mark.parametrize("change", ["in place", "another tensor", "other data"])
def test_other_weights_are_packed_anew(own, paying, change):
    clip = moving(1)
    before, _ = own(clip, OPTIONS)
    with torch.no_grad():
        for layer in layers(own):
            if change == "in place":
                layer.weight.mul_(1.5)
            elif change == "another tensor":
                layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
            else:
                layer.weight.data = layer.weight.data * 1.5
    after, _ = own(clip, OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "is_faster_here", lambda: False)
        expected, _ = own(clip, OPTIONS)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=0)


def test_memory_is_counted(own, paying):
    """What is packed takes room of its own, before and after; so do folded convolutions, in both."""
    size = (16, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "is_faster_here", lambda: False)
        plain, least = own.needs(size, OPTIONS, Plan()), own.needs.most(size)
    to_come = own.needs(size, OPTIONS, Plan())
    extra = to_come["peak"] - plain["peak"]
    assert extra >= sum(layer.weight.nbytes for layer in layers(own)) > 0
    assert to_come["weights"] == plain["weights"] and own.needs.most(size) == least + extra
    own(moving(2), OPTIONS)
    there, folds = own.needs(size, OPTIONS, Plan()), folded.bytes_beside(own.stages.values())[0]
    assert there["peak"] == to_come["peak"] and folds > 0
    assert there["weights"] == plain["weights"] + extra + folds
    assert own.needs.most(size) == least - folds


def test_other_number_formats_and_compiled_blocks_are_left_alone(checkpoint, own, paying):
    half = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none")
    half(moving(1), OPTIONS)
    own(moving(1), UpscaleOptions(num_inference_steps=1, compile_mode="auto"))
    assert not [layer for layer in (*layers(half), *layers(own)) if layer in packed._kept]


@pytest.mark.parametrize(("amd", "avx512", "pays"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_where_it_pays(monkeypatch, amd, avx512, pays):
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    monkeypatch.setattr(packed, "_is_amd", lambda: bool(amd))
    monkeypatch.setattr(packed, "_has_avx512", lambda: bool(avx512))
    assert packed.is_faster_here.__wrapped__() is pays
