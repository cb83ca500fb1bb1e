"""Linear layers in 8 bits: asked for, said in the state, continuous, and close."""

from __future__ import annotations

import sys

import pytest
import torch
from samples import moving, shift_flow

from stream_diffvsr import IncompatibleInputError, UpscaleOptions, load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.runtimes.torch import quantized as models_quantized
from stream_diffvsr.runtimes.torch.precision import in_float32
from stream_diffvsr.runtimes.torch.quantized import QUANTIZATIONS, multiplies_fp8

OPTIONS = UpscaleOptions(num_inference_steps=2)

KINDS = [kind for kind in QUANTIZATIONS if kind != "none"]


@pytest.fixture(scope="module")
def anywhere():
    """fp8 without a GPU: torch computes it on a CPU, too, only slowly, so that we and torchao refuse."""
    pytest.importorskip("torchao")
    from torchao.float8 import inference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_quantized, "multiplies_fp8", lambda device: True)
        patch.setattr(inference, "is_MI300", lambda: True)
        yield


@pytest.fixture(scope="module", params=KINDS)
def quantized(checkpoint, anywhere, request):
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow, quantize=request.param)


def test_close_and_not_the_same(quantized, guided):
    exact, approximated = (pipe(moving(3), OPTIONS)[0] for pipe in (guided, quantized))
    assert not torch.equal(approximated, exact)
    limit = 0.2 if "int8" in quantized.number_format else 1.0  # random weights amplify
    torch.testing.assert_close(approximated, exact, atol=limit, rtol=0)


@pytest.mark.parametrize("cut", [1, 2])
def test_continuity(quantized, cut, tmp_path):
    clip = moving(3)
    whole, _ = quantized(clip, OPTIONS)
    first, state = quantized(clip[:cut], OPTIONS)
    state.save(tmp_path / "state.safetensors")
    second, _ = quantized(clip[cut:], OPTIONS, type(state).load(tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([first, second]), whole)


def test_the_state_tells(quantized, guided, caplog):
    _, state = quantized(moving(1), OPTIONS)
    guided(moving(2)[1:], OPTIONS, state)
    assert f"dtype: {quantized.number_format} -> float32" in caplog.text
    assert quantized.number_format in [f"float32, linear layers {kind}" for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_falls_back_and_comes_back(checkpoint, anywhere, kind):
    pipe = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none", quantize=kind)
    unet = pipe.stages["unet"]
    layer = next(layer for name, layer in unet.named_modules() if name.endswith(".ff.net.2"))
    before, _ = pipe(moving(1), OPTIONS)
    with in_float32([unet], torch.bfloat16):
        assert layer(torch.randn(1, 4, layer.in_features)).dtype == torch.float32
    assert torch.equal(pipe(moving(1), OPTIONS)[0], before)


def test_its_memory_is_counted(quantized, guided):
    assert quantized.bytes_needed((16, 24)) == pytest.approx(guided.bytes_needed((16, 24)), rel=0.1)


def test_convolutions_and_prompts_stay(quantized, guided):
    theirs, ours = (dict(pipe.stages["unet"].named_parameters()) for pipe in (guided, quantized))
    changed = {name for name in theirs if type(ours[name].data) is not torch.Tensor}
    assert changed and all(".attentions." in name and theirs[name].ndim == 2 for name in changed)
    assert not any(".linear." in name for name in changed)


def test_without_torchao_one_sentence_says_it(checkpoint, monkeypatch, capsys):
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    options = ["--device", "cpu", "--quantize", "int8", "--size", "8x8", "--flow", "none"]
    assert main(["bench", "--model", str(checkpoint), *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("quantize 'int8' needs torchao: pip install torchao, or leave quantize at 'none'")


@pytest.mark.skipif(torch.cuda.is_available() and multiplies_fp8(torch.device("cuda")), reason="has fp8")
def test_fp8_needs_a_device_that_has_it(checkpoint, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(models_quantized, "multiplies_fp8", multiplies_fp8)
    with pytest.raises(IncompatibleInputError, match=r"'fp8' needs .* capability 8\.9 or more, not cpu"):
        load_pipeline(checkpoint, device="cpu", flow="none", quantize="fp8")


def test_none_is_none(checkpoint):
    pipe = load_pipeline(checkpoint, device="cpu", flow="none")
    pipe.quantize("none")
    assert pipe.number_format == "float32"


def test_other_names_are_refused(checkpoint):
    with pytest.raises(IncompatibleInputError, match="none, int8, fp8"):
        load_pipeline(checkpoint, quantize="int4")
    with pytest.raises(SystemExit):
        main(["bench", "--quantize", "int4"])
