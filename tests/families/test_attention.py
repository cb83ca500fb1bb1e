"""What computes self-attention: PyTorch by default, libraries by name, and a sentence where there is none."""

from __future__ import annotations

import sys

import pytest
import torch
from family_cases import CASES
from samples import moving

from stream_diffvsr import IncompatibleInputError, load_pipeline
from stream_diffvsr.cli.main import main
from stream_diffvsr.families.wan.attention import attention, check_attention

CUDA = torch.device("cuda")


@pytest.fixture(params=["flashvsr", "swiftvr"])
def opened(request, tmp_path):
    case = CASES[request.param]
    path = case.make(tmp_path)
    return lambda **settings: load_pipeline(path, device="cpu", **settings), case.options


def run(model, options) -> torch.Tensor:
    frames = moving(model.info.first, 16, 16).split(1)
    return torch.cat([each.hq for each in model.stream(frames, model.Options(**options))])


def test_pytorchs_own_by_name_is_said(opened):
    open_model, options = opened
    usual, named = open_model(), open_model(attention="sdpa")
    assert torch.equal(run(usual, options), run(named, options))
    provenances = [each.provenance((16, 16), each.Options(**options)) for each in (usual, named)]
    assert "attention sdpa" in provenances[0].differences(provenances[1])


def test_a_librarys_way_gives_the_same(tmp_path, monkeypatch):
    """Through diffusers, with the one of its backends that runs anywhere."""
    path = CASES["swiftvr"].make(tmp_path)
    model, options = load_pipeline(path, device="cpu"), CASES["swiftvr"].options
    expected = run(model, options)
    monkeypatch.setattr("stream_diffvsr.families.wan.attention.PACKAGES", {"native": ""})
    calls = []
    for block in model.networks["transformer"].blocks:  # type: ignore[union-attr]
        block.attn1.processor.attend = lambda *x: calls.append(1) or attention("native")(*x)  # type: ignore[union-attr]
    torch.testing.assert_close(run(model, options), expected, atol=1e-5, rtol=0)
    assert calls


@pytest.mark.parametrize(
    ("name", "device", "dtype", "sentence"),
    [
        ("xformers", CUDA, torch.float16, "attention must be one of auto, sdpa, sage, flash"),
        ("sage", torch.device("cpu"), torch.float16, "a CUDA device and dtype float16 or bfloat16"),
        ("flash", CUDA, torch.float32, "a CUDA device and dtype float16 or bfloat16"),
    ],
)
def test_what_cannot_be(name, device, dtype, sentence):
    with pytest.raises(IncompatibleInputError, match=sentence):
        check_attention(name, device, dtype)


@pytest.mark.parametrize(("name", "package"), [("sage", "sageattention"), ("flash", "flash_attn")])
def test_a_missing_package(name, package):
    if package in sys.modules or __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*, or leave attention at 'auto'"):
        check_attention(name, CUDA, torch.bfloat16)


def test_only_where_there_is_one(opened, checkpoint, tmp_path, capsys):
    with pytest.raises(IncompatibleInputError, match="no large self-attention"):
        load_pipeline(checkpoint, device="cpu", attention="sage")
    model, _ = opened[0](), opened[1]
    if model.info.family == "flashvsr":
        with pytest.raises(IncompatibleInputError, match="auto or sdpa"):
            model.attend_by("sage")
    assert main(["bench", "--model", str(checkpoint), "--attention", "sage"]) == 2
    assert "no large self-attention" in capsys.readouterr().err
