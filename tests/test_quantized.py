"""Linear layers in 8 bits: asked for, said in the state, continuous, and close."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from samples import moving, shift_flow

from stream_diffvsr import IncompatibleInputError, UpscaleOptions, load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.models.precision import in_float32

OPTIONS = UpscaleOptions(num_inference_steps=2)

WITHOUT = """
import sys
sys.modules["torchao"] = sys.modules["torchao.quantization"] = None
from stream_diffvsr.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def quantized(checkpoint):
    pytest.importorskip("torchao")
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow, quantize="int8")


def test_close_and_not_the_same(quantized, guided):
    exact, approximated = (pipe(moving(3), OPTIONS)[0] for pipe in (guided, quantized))
    assert not torch.equal(approximated, exact)
    torch.testing.assert_close(approximated, exact, atol=0.2, rtol=0)


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
    assert "dtype was float32, linear layers int8, is float32" in caplog.text


def test_half_precision_falls_back_and_comes_back(checkpoint):
    pytest.importorskip("torchao")
    pipe = load_pipeline(checkpoint, device="cpu", dtype="bfloat16", flow="none", quantize="int8")
    unet = pipe.stages["unet"]
    layer = next(layer for name, layer in unet.named_modules() if name.endswith(".ff.net.2"))
    before, _ = pipe(moving(1), OPTIONS)
    with in_float32([unet], torch.bfloat16):
        assert layer(torch.randn(1, 4, layer.in_features)).dtype == torch.float32
    assert torch.equal(pipe(moving(1), OPTIONS)[0], before)


def test_convolutions_and_prompts_stay(quantized, guided):
    theirs, ours = (dict(pipe.stages["unet"].named_parameters()) for pipe in (guided, quantized))
    changed = {name for name in theirs if type(ours[name].data) is not torch.Tensor}
    assert changed and all(".attentions." in name and theirs[name].ndim == 2 for name in changed)
    assert not any(".linear." in name for name in changed)


def test_without_torchao_one_sentence_says_it(checkpoint, tmp_path):
    command = ["bench", "--model", str(checkpoint), "--device", "cpu", "--quantize", "int8", "--size", "8x8"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *command, "--flow", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("quantize 'int8' needs torchao: pip install torchao, or leave quantize at 'none'")
    )
    assert "Traceback" not in done.stderr


def test_other_names_are_refused(checkpoint):
    with pytest.raises(IncompatibleInputError, match="none, int8"):
        load_pipeline(checkpoint, quantize="int4")
    with pytest.raises(SystemExit):
        main(["bench", "--quantize", "int4"])
