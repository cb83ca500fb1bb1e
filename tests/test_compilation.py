"""Compiled blocks give the same pictures; where nothing can be compiled, it is said and everything runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from samples import moving
from test_golden import TOLERANCE, assert_near, upscale

from stream_diffvsr import UpscaleOptions, compilation
from stream_diffvsr.models.prompted import PromptedBlock, keys_and_values

WITHOUT_COMPILER = """
import logging, sys, torch
from stream_diffvsr import UpscaleOptions, load_pipeline
logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
pipe = load_pipeline(sys.argv[1], device="cpu", flow="none")
clip = torch.zeros(2, 3, 8, 8)
hq, state = pipe(clip, UpscaleOptions(num_inference_steps=1, compile_mode="auto"))
assert torch.equal(hq, pipe(clip, UpscaleOptions(num_inference_steps=1))[0])
print(state.metadata["compilation"])
"""

needs_compiler = pytest.mark.skipif(
    compilation.problem("cpu") is not None, reason=f"torch.compile: {compilation.problem('cpu')}"
)


def test_without_a_compiler_frames_are_the_same(checkpoint, tmp_path):
    nowhere = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_COMPILER, str(checkpoint)]
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "off"
    said = [line for line in done.stderr.splitlines() if line.startswith("stream_diffvsr")]
    assert len(said) == 1 and "compile_mode 'auto' has no effect here" in said[0]


@needs_compiler
def test_blocks_are_compiled_only_inside(pipe):
    unet = pipe.stages["unet"]
    prompted = next(module for module in unet.modules() if isinstance(module, PromptedBlock))
    with torch.no_grad():
        prompt = keys_and_values(unet, pipe.prompts.get(""))
        for positions in (48, 300):
            x = torch.randn(1, positions, prompted.block.norm1.normalized_shape[0])
            expected = prompted(x, encoder_hidden_states=prompt)
            with compilation.compiled([unet], "auto"):
                assert "forward" in vars(prompted.block)
                got = prompted(x, encoder_hidden_states=prompt)
            assert "forward" not in vars(prompted.block)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert not compilation._failed


def test_one_that_cannot_be_compiled_runs_by_itself(caplog, monkeypatch):
    class BasicTransformerBlock(torch.nn.Module):  # the name counts
        def forward(self, x):
            return x + 1

    def refuse(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(compilation, "_compile", lambda *_: refuse)
    block = BasicTransformerBlock()
    with compilation.compiled([block], "auto"):
        assert [float(block(torch.ones(()))) for _ in range(3)] == [2, 2, 2]
    assert caplog.messages == ["BasicTransformerBlock is not compiled: RuntimeError: no"]


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "max"])
def test_golden(pipe, golden, mode):
    case = load_file(golden / "case_A.safetensors")
    got = upscale(pipe, case, UpscaleOptions(compile_mode=mode), len(case["init_latents"]), case["flows"])
    assert_near(got, case["hq"], TOLERANCE)
    assert not compilation._failed


@pytest.mark.long
@needs_compiler
def test_continuity(guided, tmp_path):
    options, clip = UpscaleOptions(num_inference_steps=2, compile_mode="auto"), moving(5)
    whole, end = guided(clip, options)
    for cut in (1, 3):
        first, state = guided(clip[:cut], options)
        state.save(tmp_path / "state.safetensors")
        second, last = guided(clip[cut:], options, type(state).load(tmp_path / "state.safetensors"))
        assert torch.equal(torch.cat([first, second]), whole)
        assert last.metadata == end.metadata
    assert end.metadata["compilation"] == "auto"
