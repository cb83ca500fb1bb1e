"""Compiled blocks give the same pictures; where nothing can be compiled, it is said and everything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import moving
from test_golden import TOLERANCE, assert_near, upscale

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.runtimes.torch import compilation

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

PART = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from samples import moving
from stream_diffvsr import StreamDiffVSRState, UpscaleOptions, load_pipeline
torch.set_num_threads(1)
model, folder, start, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
pipe = load_pipeline(model, device="cpu", flow="dis")
state = StreamDiffVSRState.load(folder / str(start)) if start else None
options = UpscaleOptions(num_inference_steps=2, compile_mode=sys.argv[5])
hq, state = pipe(moving(4)[start:stop], options, state)
assert state.metadata["compilation"] == sys.argv[5]
state.save(folder / str(stop))
save_file({"hq": hq}, folder / f"{start}-{stop}")
"""

needs_compiler = pytest.mark.skipif(
    compilation.compile_problem("cpu") is not None,
    reason=f"torch.compile: {compilation.compile_problem('cpu')}",
)


@pytest.mark.long
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
    block = next(module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock")
    with torch.no_grad():
        prompt = pipe.prompts.get("")
        for positions in (48, 300):
            x = torch.randn(1, positions, block.norm1.normalized_shape[0])
            expected = block(x, encoder_hidden_states=prompt)
            with compilation.compiled([unet], "auto"):
                assert "forward" in vars(block)
                got = block(x, encoder_hidden_states=prompt)
            assert "forward" not in vars(block)
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
@pytest.mark.parametrize("name", ["A", "B", "C_resize"])
@pytest.mark.parametrize("mode", ["auto", "max"])
@pytest.mark.parametrize("blocks", ["own", "elsewhere"])
def test_golden(pipe, golden, monkeypatch, name, mode, blocks):
    """The kinds that are compiled on a CPU, and those that are on other devices."""
    if blocks == "elsewhere":
        monkeypatch.setattr(compilation, "CPU_BLOCKS", compilation.BLOCKS)
    case = load_file(golden / f"case_{name}.safetensors")
    got = upscale(pipe, case, UpscaleOptions(compile_mode=mode), len(case["init_latents"]), case["flows"])
    assert_near(got, case["hq"], TOLERANCE)
    assert not compilation._failed


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "max"])
def test_continuity(guided, tmp_path, mode):
    options, clip = UpscaleOptions(num_inference_steps=2, compile_mode=mode), moving(5)
    whole, end = guided(clip, options)
    for cut in (1, 3):
        first, state = guided(clip[:cut], options)
        state.save(tmp_path / "state.safetensors")
        second, last = guided(clip[cut:], options, type(state).load(tmp_path / "state.safetensors"))
        assert torch.equal(torch.cat([first, second]), whole)
        assert last.metadata == end.metadata
    assert end.metadata["compilation"] == mode


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "max"])
def test_continuity_across_processes(checkpoint, tmp_path, mode):
    """Three processes with one cache: the parts of two of them are what the third made at once."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parent)}
    for start, stop in ((0, 2), (2, 4), (0, 4)):
        command = [sys.executable, "-c", PART, str(checkpoint), str(tmp_path), str(start), str(stop), mode]
        subprocess.run(command, env={**os.environ, **own}, check=True)
    whole, first, second = (load_file(tmp_path / name)["hq"] for name in ("0-4", "0-2", "2-4"))
    assert torch.equal(torch.cat([first, second]), whole)
