"""Importing costs little and shows nothing; layers point downwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stream_diffvsr

ROOT = Path(__file__).parent.parent
HEAVY = ("diffusers", "transformers", "torchvision", "cv2", "av", "huggingface_hub", "accelerate", "PIL")

ENGINE = "import stream_diffvsr, stream_diffvsr.cli.main"
PACK = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("a_pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["a_pack"] = module
spec.loader.exec_module(module)
assert module.NODE_CLASS_MAPPINGS
"""


def imported_by(code: str) -> tuple[set[str], str]:
    """Names of all modules after `code` ran alone, and what it printed."""
    ask = code + "\nimport sys; print('MODULES', *sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    printed, _, modules = done.stderr.rpartition("MODULES")
    return set(modules.split()), done.stdout + printed


@pytest.mark.parametrize("code", [ENGINE, PACK], ids=["engine", "pack"])
def test_importing_is_light_and_silent(code):
    modules, printed = imported_by(code)
    assert not modules & set(HEAVY)
    assert printed == ""
    if code == ENGINE:  # which knows no ComfyUI
        assert not {name for name in modules if name.split(".")[0] in ("comfy", "folder_paths", "nodes")}


def test_the_test_above_can_fail():
    modules, printed = imported_by("import cv2; print('hello')")
    assert modules & set(HEAVY)
    assert printed


def test_public_names_exist_and_are_sorted():
    assert list(stream_diffvsr.__all__) == sorted(stream_diffvsr.__all__)
    promised = {
        "load_pipeline find_checkpoints StreamDiffVSRPipeline StreamDiffVSRState UpscaleOptions FrameResult "
        "to_pixels from_pixels estimate_memory"
    }
    assert set(" ".join(promised).split()) <= set(stream_diffvsr.__all__)
    assert all(hasattr(stream_diffvsr, name) for name in stream_diffvsr.__all__)
