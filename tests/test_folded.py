"""Convolutions behind enlargements, computed on the small picture: the same numbers, and where they apply."""

from __future__ import annotations

import pytest
import torch
from samples import moving, shift_flow
from torch import nn
from torch.nn import functional as F

from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.runtimes.torch import folded

OPTIONS = UpscaleOptions(num_inference_steps=2)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("narrow", [0, 256], ids=["four", "transposed"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 7), (16, 9)])
def test_the_same_numbers(size, narrow, bias, last, monkeypatch):
    monkeypatch.setattr(folded, "NARROW", narrow)
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(2, 6, *size)
    if last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    expected = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(folded.convolved(layer, x), expected, atol=1e-6, rtol=0)


@pytest.fixture
def own(checkpoint):
    """A pipe whose layers no other test has used."""
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow)


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "_pairs", lambda network: iter(()))


@pytest.mark.parametrize("size", [(16, 24), (21, 37)])
def test_whole_frames(own, size, monkeypatch, tmp_path):
    """Of U-Net and decoder; where the U-Net is told another size than the double, it enlarges as ever."""
    clip = moving(3, *size)
    whole, _ = own(clip, OPTIONS)
    used = [layer for network in own.stages.values() for _, layer in folded._pairs(network)]
    assert len(used) >= 3 and all(layer in folded._kept for layer in used[-2:])
    first, state = own(clip[:1], OPTIONS)
    state.save(tmp_path / "state.safetensors")
    second, _ = own(clip[1:], OPTIONS, type(state).load(tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([first, second]), whole)
    plainly(monkeypatch)
    expected, _ = own(clip, OPTIONS)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=0)
    assert not torch.equal(whole, expected)


def test_layers_are_left_as_they_were(own):
    with pytest.raises(RuntimeError), folded.folded(own.stages.values()):
        assert [each for network in own.stages.values() for each in network.modules() if own_forward(each)]
        raise RuntimeError
    assert not [each for network in own.stages.values() for each in network.modules() if own_forward(each)]


def own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module)


def test_only_in_float32_without_compilation(checkpoint, own):
    half = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none")
    half(moving(1), OPTIONS)
    own(moving(1), UpscaleOptions(num_inference_steps=1, compile_mode="auto"))
    modules = [each for pipe in (half, own) for network in pipe.stages.values() for each in network.modules()]
    assert not [each for each in modules if each in folded._kept]
