"""Runtime: another pipe of the same model, computed otherwise, and the one that came in left alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import random_lora
from local_pool import LocalPool
from node_clips import frames_of, make_clip, pattern
from node_pack import load_pack, part

from stream_diffvsr.jobs.cluster import cards

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
RUNTIME = NODES["StreamDiffVSR_Runtime"]
UPSCALE = NODES["StreamDiffVSR_Upscale"]
VIDEO = NODES["StreamDiffVSR_UpscaleVideo"]
known = part(PACK, "nodes.pipes").how_made


@pytest.fixture(scope="module")
def pipe(checkpoint: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
        return NODES["StreamDiffVSR_Loader"]().execute(checkpoint.name, "cpu", "float32", "dis")[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))


def upscaled(pipe: Any, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return UPSCALE().execute(pipe, images, num_inference_steps=1)


@pytest.mark.long  # graphs are built
@pytest.mark.parametrize("name, package", [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_another_runtime_gives_the_same_pixels_but_for_rounding(pipe, name: str, package: str) -> None:
    pytest.importorskip(package)
    images = torch.rand(2, 12, 16, 3)
    expected, before = upscaled(pipe, images)
    other = RUNTIME().execute(pipe, runtime=name)[0]
    with torch.inference_mode():  # as ComfyUI runs its nodes
        found, state = upscaled(other, images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (state.provenance.runtime, before.provenance.runtime) == (name, "torch")
    assert (pipe.info.runtime, other.info.runtime) == ("torch", name)
    back = RUNTIME().execute(other)[0]  # the last of two in a row counts
    assert back.info.runtime == "torch" and torch.equal(upscaled(back, images)[0], expected)


def test_it_wins_over_settings_and_leaves_the_pipe_alone(pipe) -> None:
    settings = NODES["StreamDiffVSR_Settings"]().execute(compile_mode="max", guidance_scale=2.0)[0]
    other = RUNTIME().execute(pipe, compile_mode="auto")[0]
    assert other is not pipe and other.networks["unet"] is pipe.networks["unet"]
    assert settings.options(other).compile_mode == "auto"
    assert settings.options(other, "fast").compile_mode == "auto"
    assert settings.options(RUNTIME().execute(other)[0]).compile_mode == "off"
    options = settings.options(pipe)
    assert (options.compile_mode, options.guidance_scale) == ("max", 2.0)


def test_8_bits_are_a_model_of_their_own(pipe) -> None:
    pytest.importorskip("torchao")
    images = torch.rand(2, 12, 16, 3)
    expected, _ = upscaled(pipe, images)
    other = RUNTIME().execute(pipe, quantize="int8")[0]
    found, state = upscaled(other, images)
    assert not torch.equal(found, expected) and (found - expected).abs().max() < 0.2
    assert "int8" in state.provenance.number_format
    assert torch.equal(upscaled(pipe, images)[0], expected)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"runtime": "openvino", "quantize": "int8"}, "runtime openvino needs quantize none"),
        ({"provider": "cuda"}, "runtime torch needs provider auto"),
        ({"runtime": "onnx", "provider": "npu"}, "one that this ONNX Runtime supports"),
        ({"devices": "cpu"}, "must name more than one device"),
        ({"devices": "gpu7"}, "devices must be all, a list such as cuda:0,cuda:1"),
    ],
)
def test_what_cannot_be_is_refused(pipe, asked: dict[str, str], message: str) -> None:
    if asked.get("runtime"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(asked["runtime"], asked["runtime"]))
    with pytest.raises(ValueError, match=message):
        RUNTIME().execute(pipe, **asked)


@pytest.fixture
def with_lora(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    path = random_lora(tmp_path / "film.safetensors", pipe)
    monkeypatch.setattr(part(PACK, "nodes.host"), "lora_files", lambda: [(path.name, path)])
    return lambda to: NODES["StreamDiffVSR_LoRA"]().execute(to, path.name, 0.5)[0]


def test_a_lora_after_it_keeps_what_it_said(pipe, with_lora) -> None:
    images = torch.rand(2, 12, 16, 3)
    before = RUNTIME().execute(pipe, compile_mode="auto")[0]
    after = with_lora(before)
    assert known(after).compile_mode == "auto" and "loras" not in known(before).model
    expected, _ = upscaled(with_lora(pipe), images)
    assert torch.equal(upscaled(RUNTIME().execute(after)[0], images)[0], expected)
    assert not torch.equal(upscaled(pipe, images)[0], expected)
    with pytest.raises(ValueError, match="a model with a LoRA cannot run in 8 bits"):
        RUNTIME().execute(after, quantize="int8")


def test_widgets_are_checked_before_anything_runs() -> None:
    assert RUNTIME.VALIDATE_INPUTS(runtime="onnx", provider=None, compile_mode="auto", devices=" all ")
    with pytest.raises(ValueError, match="runtime must be one of torch, openvino"):
        RUNTIME.VALIDATE_INPUTS(runtime="tflite")
    with pytest.raises(ValueError, match="must name more than one device"):
        RUNTIME.VALIDATE_INPUTS(devices="cpu:1")


def test_without_ray_it_says_what_to_install(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    if importlib.util.find_spec("ray"):
        monkeypatch.setattr(part(PACK, "nodes.runtime"), "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='pip install "ray"'):
        RUNTIME().execute(pipe, devices="cpu:2")


def test_cards_are_numbered_as_this_process_sees_them() -> None:
    assert cards(["cuda:0", "cuda:2"], None) == "0,2"
    assert cards(["cuda:0", "cuda:1"], "3,5,7") == "3,5"


def two_scenes(index: int, width: int, height: int):
    picture = pattern(index, width, height)
    return picture if index < 3 else 255 - picture[::-1]


@pytest.mark.parametrize("lora", ["", "before", "after"])
def test_scenes_spread_over_workers_are_the_same_video(
    pipe, with_lora, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By workers in threads; tests/test_ray.py and test_comfyui_server.py have Ray's."""
    source = make_clip(Path("input/clip.mp4").absolute(), 6, 32, 24, draw=two_scenes)
    run = {"video_path": str(source), "num_inference_steps": 1}
    pools = []

    @contextmanager
    def workers(model: dict[str, Any], devices: Any, on_wait: Any) -> Iterator[LocalPool]:
        pools.append(LocalPool({**model, "device": "cpu"}, len(devices.names)))
        yield pools[-1]

    monkeypatch.setattr(part(PACK, "nodes.runtime"), "find_spec", lambda name: object())
    here = with_lora(pipe) if lora else pipe
    other = RUNTIME().execute(here if lora != "after" else pipe, devices="cpu:2")[0]
    assert known(other).model["source"] == known(pipe).source and not known(pipe).devices
    other = with_lora(other) if lora == "after" else other
    monkeypatch.setattr(part(PACK, "stream_diffvsr.jobs.cluster"), "workers", workers)
    one = Path(VIDEO().execute(here, **run)["result"][0])
    many = Path(VIDEO().execute(other, **run)["result"][0])
    assert sorted(first for _, first in pools[0].given) == [0, 3]
    assert (frames_of(one) == frames_of(many)).all()
    assert one.name == "clip_4x_00001_.mp4" and many.name == "clip_4x_00002_.mp4"
