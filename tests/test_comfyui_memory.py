"""The pack under ComfyUI's own memory management: loaded, pushed out by another model, and back.

Set COMFYUI_PATH and COMFYUI_PYTHON as for test_comfyui_server. With a CUDA device the modes of a GPU run
too; without one the same code runs on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
]
SCRIPT = Path(__file__).parent / "comfy_memory.py"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def report(*options: str) -> dict:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(SCRIPT), *options],
        cwd=os.environ["COMFYUI_PATH"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("apart", ["", "1"])
def test_on_a_cpu_models_come_and_go(apart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGES_APART", apart)
    seen = report("--cpu")
    count = 3 if apart else 1
    assert (seen["patchers"], seen["patchers_evicted"], seen["patchers_returned"]) == (count, 0, count)
    assert seen["equal_after_return"] and seen["continued"]
    assert seen["shared_left"] == 0 and seen["models_left"] == 0


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("options", [(), ("--lowvram",), ("--novram",)])
def test_on_a_gpu_memory_is_given_back(options: tuple[str, ...]) -> None:
    seen = report(*options)
    print(seen)
    assert set(seen["places_before"].values()) <= {"cpu", "none"}
    assert "cuda" in seen["places_after_run"].values()
    assert set(seen["places_evicted"].values()) <= {"cpu", "none"} and seen["patchers_evicted"] == 0
    assert seen["evicted"] < seen["after_run"] and seen["returned"] > seen["evicted"]
    assert seen["equal_after_return"] and seen["continued"]
    assert seen["end"] <= seen["start"] + 2**20
    assert seen["shared_left"] == 0 and seen["models_left"] == 0
