"""The pack in a real ComfyUI on a CPU.

Set COMFYUI_PATH to a checkout, COMFYUI_PYTHON to the Python with its requirements and this pack's, and
COMFYUI_VHS_PATH to a checkout of ComfyUI-VideoHelperSuite where it is not in COMFYUI_PATH's custom_nodes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from comfy_server import Server, interpolation_model, messages, missing_kinds, to_prompt, video_helper_suite
from family_cases import CASES, stand_ins
from node_clips import frames_of, make_clip, pattern
from node_pack import ROOT

from stream_diffvsr import load_pipeline, to_pixels

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
]
FRAMES, WIDTH, HEIGHT = 16, 48, 32
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
SUITE = "COMFYUI_PATH" in os.environ and video_helper_suite() is not None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    from PIL import Image

    server = Server(tmp_path_factory.mktemp("comfy"))
    make_clip(server.base / "input" / "video.mp4", FRAMES, WIDTH, HEIGHT)
    make_clip(server.base / "input" / "short.mp4", 6, WIDTH, HEIGHT)
    Image.fromarray(pattern(0, 52, 36)).save(server.base / "input" / "example.png")
    stand_ins(server.base / "models")
    interpolation_model(server.base / "models")
    server.start()
    yield server
    server.stop()


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def ours(kind: str, **inputs) -> dict:
    return node(f"StreamDiffVSR_{kind}", **inputs)


def loader(model: str) -> dict:
    return ours("Loader", model_version=model, device="auto", dtype="auto")


LOADER = loader("nano")


def pictures(prefix: str, file: str = "short.mp4", first: int = 0, count: int = 6, **upscale) -> dict:
    """Video in, frames upscaled, PNG files out."""
    return {
        "1": node("LoadVideo", file=file),
        "2": node("GetVideoComponents", video=["1", 0]),
        "3": node("ImageFromBatch", image=["2", 0], batch_index=first, length=count),
        "4": LOADER,
        "5": ours("Upscale", pipe=["4", 0], images=["3", 0], **upscale),
        "6": node("SaveImage", images=["5", 0], filename_prefix=prefix),
    }


def read_pictures(server: Server, prefix: str) -> np.ndarray:
    from PIL import Image

    files = sorted((server.base / "output").glob(f"{prefix}_*.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def file_job(**inputs) -> dict:
    return {"1": LOADER, "2": ours("UpscaleVideo", pipe=["1", 0], **inputs)}


def test_all_nodes_are_there(server: Server) -> None:
    info = server.get("/object_info")
    frozen = json.loads((Path(__file__).parent / "node_schemas.json").read_text(encoding="utf-8"))
    assert set(frozen) <= set(info)
    assert all(info[name]["output_node"] == frozen[name]["output_node"] for name in frozen)
    assert "(IMPORT FAILED)" not in server.log.read_text()  # of packs; core's own parts may lack packages


def test_help_pages_and_templates_are_served(server: Server) -> None:
    import urllib.request

    base = f"http://127.0.0.1:{server.port}"
    for name in ("StreamDiffVSR_Upscale.md", "StreamDiffVSR_Upscale.png"):
        with urllib.request.urlopen(f"{base}/extensions/ComfyUI-Stream-DiffVSR/docs/{name}") as answer:
            assert answer.status == 200 and answer.read()
    offered = server.get("/workflow_templates")["ComfyUI-Stream-DiffVSR"]
    assert sorted(offered) == sorted(path.stem for path in WORKFLOWS)


EXPECTED = {
    "simple_upscale": (FRAMES, True),
    "simple_upscale.app": (FRAMES, True),
    "simple_video": (FRAMES, True),
    "long_video_file": (FRAMES, True),
    "several_devices": (FRAMES, True),
    "vhs_video_with_audio": (FRAMES, True),
    "vhs_meta_batch": (FRAMES, True),
    "flashvsr": (FRAMES, True),
    "swiftvr": (FRAMES, True),
    "image_model_steady": (FRAMES, True),
    "save_state": (8, False),
    "resume_state": (8, False),
    "frame_loop_with_state": (3, None),
    "single_image": (1, None),
    "before_after": (0, None),
    "upscale_and_interpolate": (2 * FRAMES - 1, True),
}
"""Frames, and whether there is sound; None where pictures come out. In the order in which they run."""


@pytest.mark.parametrize("name", EXPECTED)
def test_every_example_runs_to_its_end(server: Server, name: str) -> None:
    if name.startswith("vhs") and not SUITE:
        pytest.skip("no VideoHelperSuite: set COMFYUI_VHS_PATH")
    frames, sound = EXPECTED[name]
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    if missing := missing_kinds(workflow, server):
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")
    before = server.files()
    server.run(to_prompt(workflow, server))
    new = sorted(server.files() - before)
    if sound is None:
        made = [file for file in new if file.suffix == ".png"]
        assert len(made) == frames
        return
    # VideoHelperSuite writes a silent file first, and then one with sound.
    video = max(new, key=lambda file: (file.suffix == ".mp4", "-audio" in file.name))
    height, width = (32, 48) if name == "simple_upscale.app" else (72, 128)
    assert frames_of(video).shape == (frames, 4 * height, 4 * width, 3)
    with av.open(str(video)) as container:
        assert bool(container.streams.audio) == sound
        if sound:
            assert sum(frame.samples for frame in container.decode(audio=0)) >= 0.9 * 24000 * FRAMES / 12


def suite_job(prefix: str, batch: int | None, file: str = "video.mp4") -> dict:
    load = {
        "video": file,
        "force_rate": 0,
        "custom_width": 0,
        "custom_height": 0,
        "frame_load_cap": 0,
        "skip_first_frames": 0,
        "select_every_nth": 1,
    }
    save = {
        "frame_rate": 12,
        "loop_count": 0,
        "filename_prefix": prefix,
        "format": "video/ffv1-mkv",
        "pingpong": False,
        "save_output": True,
    }
    prompt = {
        "1": node("VHS_LoadVideo", **load),
        "2": LOADER,
        "3": ours("Upscale", pipe=["2", 0], images=["1", 0], num_inference_steps=1),
        "4": node("VHS_VideoCombine", images=["3", 0], audio=["1", 2], **save),
    }
    if batch:
        prompt["5"] = node("VHS_BatchManager", frames_per_batch=batch)
        for number in ("1", "3", "4"):
            prompt[number]["inputs"]["meta_batch"] = ["5", 0]
    return prompt


@pytest.mark.skipif(not SUITE, reason="no VideoHelperSuite: set COMFYUI_VHS_PATH")
@pytest.mark.parametrize("size", [7, 10])
def test_a_meta_batch_run_equals_the_single_run(server: Server, size: int) -> None:
    before = server.files()
    server.run(suite_job("whole", None))
    server.run(suite_job("parts", size))
    new = sorted(file for file in server.files() - before if file.suffix == ".mkv")
    whole = next(file for file in new if file.name.startswith("whole"))
    parts = next(file for file in new if file.name.startswith("parts"))
    assert len(frames_of(whole)) == FRAMES
    assert np.array_equal(frames_of(whole), frames_of(parts))


CHUNKS = {"flashvsr": ("flashvsr-v1.1", 26), "swiftvr": ("swiftvr", 30)}
"""Name of the stand-in, and frames per batch."""


@pytest.mark.skipif(not SUITE, reason="no VideoHelperSuite: set COMFYUI_VHS_PATH")
@pytest.mark.parametrize("family", CHUNKS)
def test_chunks_go_on_from_batch_to_batch(server: Server, family: str) -> None:
    name, size = CHUNKS[family]
    make_clip(server.base / "input" / "chunks.mp4", 61, 32, 32)
    before = server.files()
    for prefix, batch in ((f"{family}_whole", None), (f"{family}_parts", size)):
        job = suite_job(prefix, batch, "chunks.mp4")
        job["2"] = loader(name)
        kind = {"flashvsr": "FlashVSRSettings", "swiftvr": "SwiftVRSettings"}[family]
        job["6"] = ours(kind, scale=1.0)
        job["3"]["inputs"]["settings"] = ["6", 0]
        server.run(job)
    new = sorted(file for file in server.files() - before if file.suffix == ".mkv")
    parts, whole = (frames_of(next(file for file in new if way in file.name)) for way in ("parts", "whole"))
    assert len(whole) == 61 and np.array_equal(whole, parts)


@pytest.mark.parametrize("family", CHUNKS)
def test_a_model_of_chunks_gives_the_frames_of_the_engine(server: Server, family: str) -> None:
    prompt = pictures(f"{family}_node", "video.mp4", count=FRAMES, seed=5)
    prompt["4"] = loader(CHUNKS[family][0])
    prompt["7"] = node("SaveImage", images=["3", 0], filename_prefix=f"{family}_lq")
    server.run(prompt)
    pipe = load_pipeline(CASES[family].make(server.base / "engine"), device="cpu")
    own = {"seed": 5} if family == "flashvsr" else {}
    lq = torch.from_numpy(read_pictures(server, f"{family}_lq")).movedim(-1, 1) / 127.5 - 1
    made = [to_pixels(each.hq) for each in pipe.stream(lq.split(1), pipe.Options(**own))]
    expected = (torch.cat(made).movedim(1, -1) * 255).numpy()
    found = read_pictures(server, f"{family}_node").astype(float)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1.001


def test_a_saved_state_survives_a_restart(server: Server) -> None:
    server.run(pictures("all", num_inference_steps=1))
    first = pictures("first", count=2, num_inference_steps=1)
    first["7"] = ours("SaveState", state=["5", 1], filename_prefix="restart")
    server.run(first)
    server.stop()
    server.start()
    rest = pictures("rest", first=2, count=4, num_inference_steps=1)
    rest["7"] = ours("LoadState", state_file="restart_00001_.safetensors [output]")
    rest["5"]["inputs"]["state"] = ["7", 0]
    server.run(rest)
    parts = np.concatenate([read_pictures(server, "first"), read_pictures(server, "rest")])
    assert np.array_equal(parts, read_pictures(server, "all"))


def test_interrupted_at_random_then_run_again(server: Server) -> None:
    server.free()
    server.run(pictures("calm", num_inference_steps=2))
    for attempt in range(3):
        server.free()
        prompt_id = server.queue(pictures(f"broken{attempt}", num_inference_steps=2))
        time.sleep(random.uniform(0.5, 4))
        server.post("/interrupt", {})
        done = server.wait(prompt_id)
        if done["status"]["status_str"] != "success":
            assert messages(done, "execution_interrupted") and not messages(done, "execution_error")
            assert not list((server.base / "output").glob(f"broken{attempt}_*"))
    server.run(pictures("again", num_inference_steps=2))
    assert np.array_equal(read_pictures(server, "calm"), read_pictures(server, "again"))


def test_free_between_and_during_runs_changes_nothing(server: Server) -> None:
    server.run(pictures("plain", num_inference_steps=2, seed=3))
    server.free()
    prompt_id = server.queue(pictures("freed", num_inference_steps=2, seed=3))
    for _ in range(4):
        server.free(memory=False)
    assert server.wait(prompt_id)["status"]["status_str"] == "success"
    server.free(memory=False)
    server.run(pictures("unloaded", num_inference_steps=2, seed=3))
    assert np.array_equal(read_pictures(server, "plain"), read_pictures(server, "freed"))
    assert np.array_equal(read_pictures(server, "plain"), read_pictures(server, "unloaded"))


def test_workflows_do_not_influence_each_other(server: Server) -> None:
    """The same node ids in different graphs, with one shared model."""
    server.run(pictures("one", num_inference_steps=1, seed=1))
    server.run(pictures("other", "video.mp4", count=3, num_inference_steps=3, seed=2))
    server.run(pictures("two", num_inference_steps=1, seed=1, enable_tiling=False))
    assert np.array_equal(read_pictures(server, "one"), read_pictures(server, "two"))


def test_a_cancelled_file_is_playable_and_goes_on(server: Server) -> None:
    settings: dict[str, Any] = {
        "video_path": "video.mp4",
        "output_path": "cut.mkv",
        "num_inference_steps": 16,
    }
    settings["settings"] = ["3", 0]  # without loss, since segments follow the machine's speed
    lossless = {"3": ours("Settings", codec="ffv1")}
    server.run({**file_job(**{**settings, "output_path": "warm.mkv", "seed": 1}), **lossless})
    began = time.monotonic()
    server.run({**file_job(**{**settings, "output_path": "uncut.mkv"}), **lossless})
    whole_run = time.monotonic() - began
    job = {**file_job(**settings), **lossless}
    prompt_id = server.queue(job)
    work = server.base / "output" / "cut.mkv.parts"
    while not work.exists():
        time.sleep(0.02)
    time.sleep(whole_run / 2)
    server.post("/interrupt", {})
    assert server.wait(prompt_id)["status"]["status_str"] != "success"
    cut = server.base / "output" / "cut.mkv"
    assert 0 < len(frames_of(cut)) < FRAMES
    done = server.run(job)
    assert done["outputs"]["2"]["images"] == [{"filename": "cut.mkv", "subfolder": "", "type": "output"}]
    assert np.array_equal(frames_of(cut), frames_of(server.base / "output" / "uncut.mkv"))
    assert not work.exists()
    with av.open(str(cut)) as container:
        (kept,) = (json.loads(text) for name, text in container.metadata.items() if name.lower() == "prompt")
    # ComfyUI adds to each node what its IS_CHANGED said.
    assert kept["2"]["inputs"] == job["2"]["inputs"]


def test_a_lost_file_is_made_again(server: Server) -> None:
    job = file_job(video_path="short.mp4", output_path="lost.mp4", num_inference_steps=1)
    job["3"] = node("SaveVideo", video=["2", 1], filename_prefix="saved", format="auto", codec="auto")
    server.run(job)
    lost = server.base / "output" / "lost.mp4"
    before = lost.stat().st_mtime_ns
    server.run(job)
    assert lost.stat().st_mtime_ns == before  # cached
    lost.unlink()
    server.run(job)
    assert len(frames_of(lost)) == 6


def test_a_created_video_is_upscaled_with_its_sound(server: Server) -> None:
    server.run(
        {
            "1": node("LoadVideo", file="short.mp4"),
            "2": node("GetVideoComponents", video=["1", 0]),
            "3": node("CreateVideo", images=["2", 0], audio=["2", 1], fps=12.0),
            "4": ours("SimpleUpscale", video=["3", 0], model="nano", quality="fast", size="2x"),
            "5": node("SaveVideo", video=["4", 0], filename_prefix="created", format="auto", codec="auto"),
        }
    )
    (made,) = (server.base / "output").glob("created*.mp4")
    assert frames_of(made).shape == (6, 2 * HEIGHT, 2 * WIDTH, 3)
    with av.open(str(made)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


@pytest.mark.parametrize("held", ["in_file", "in_memory"])
def test_a_video_that_core_trimmed_is_upscaled_where_it_was_left(server: Server, held: str) -> None:
    trim = node("Video Slice", video=["3", 0], start_time=0.5, duration=0.5, strict_duration=True)
    if trim["class_type"] not in server.get("/object_info"):
        pytest.skip("this ComfyUI trims no videos")
    make_clip(server.base / "input" / "second.mp4", 12, WIDTH, HEIGHT, crf=1)
    settings = ours("Settings", codec="ffv1", scene_cut="off")
    whole = file_job(video_path="second.mp4", start_frame=6, num_inference_steps=1)
    trimmed = file_job(video=["4", 0], num_inference_steps=1, seed=0 if held == "in_file" else 6)
    for name, job in (("spanned", whole), (f"trimmed_{held}", trimmed)):
        job["5"] = settings
        job["2"]["inputs"].update(settings=["5", 0], output_path=f"{name}.mkv")
    trimmed["3"] = loaded = node("LoadVideo", file="second.mp4")
    if held == "in_memory":
        trimmed["6"], trimmed["7"] = loaded, node("GetVideoComponents", video=["6", 0])
        trimmed["3"] = node("CreateVideo", images=["7", 0], audio=["7", 1], fps=12.0)
    trimmed["4"] = trim
    server.run(whole)
    server.run(trimmed)
    spanned, cut = (
        frames_of(server.base / "output" / f"{name}.mkv").astype(int)
        for name in ("spanned", f"trimmed_{held}")
    )
    assert spanned.shape == cut.shape == (6, 4 * HEIGHT, 4 * WIDTH, 3)
    if held == "in_file":
        assert np.array_equal(spanned, cut)
    else:  # core encodes what lies in memory before it trims it
        errors = [np.abs(cut - np.roll(spanned, shift, 0)).mean() for shift in range(6)]
        assert np.argmin(errors) == 0


def test_live_goes_on_from_run_to_run(server: Server) -> None:
    """Fifty frames, all queued at once."""
    make_clip(server.base / "input" / "fifty.mp4", 50, 32, 24)
    server.run(pictures("batch", "fifty.mp4", count=50, num_inference_steps=1))
    frames = []
    for index in range(50):
        frame = pictures("live", "fifty.mp4", first=index, count=1)
        frame["5"] = ours("Live", pipe=["4", 0], image=["3", 0], num_inference_steps=1)
        frames.append(server.queue(frame))
    server.wait(frames[-1])
    assert np.array_equal(read_pictures(server, "batch"), read_pictures(server, "live"))


def test_a_lora_makes_another_model_beside_the_first(server: Server) -> None:
    server.run(pictures("plain_model", count=2, num_inference_steps=1, seed=6))
    prompt = pictures("with_lora", count=2, num_inference_steps=1, seed=6)
    prompt["7"] = ours("LoRA", pipe=["4", 0], lora="old_film.safetensors", strength=1.0)
    prompt["8"] = {**prompt["5"], "inputs": {**prompt["5"]["inputs"], "pipe": ["7", 0]}}
    prompt["6"]["inputs"]["images"] = ["8", 0]
    prompt["9"] = node("SaveImage", images=["5", 0], filename_prefix="beside_lora")
    server.free()
    server.run(prompt)
    assert np.array_equal(read_pictures(server, "plain_model"), read_pictures(server, "beside_lora"))
    assert not np.array_equal(read_pictures(server, "plain_model"), read_pictures(server, "with_lora"))
    prompt["7"]["inputs"]["strength"] = 0.0
    prompt["6"]["inputs"]["filename_prefix"] = "without_lora"
    server.run(prompt)
    assert np.array_equal(read_pictures(server, "plain_model"), read_pictures(server, "without_lora"))


def needs(package: str) -> None:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"ComfyUI's Python has no {package}")


@pytest.mark.parametrize("name, package", [("openvino", "openvino"), ("onnx", "onnxscript")])
def test_another_runtime_in_comfyui(server: Server, name: str, package: str) -> None:
    needs(package)
    server.run(pictures(f"torch_{name}", count=2, num_inference_steps=1, seed=5))
    prompt = pictures(f"with_{name}", count=2, num_inference_steps=1, seed=5)
    prompt["7"] = ours("Runtime", pipe=["4", 0], runtime=name, **RUNTIME)
    prompt["5"]["inputs"]["pipe"] = ["7", 0]
    server.run(prompt)
    one, two = (read_pictures(server, f"{way}_{name}").astype(int) for way in ("torch", "with"))
    assert np.abs(one - two).max() <= 1


RUNTIME = {"provider": "auto", "compile_mode": "off", "quantize": "none"}


def two_scenes(index: int, width: int, height: int) -> np.ndarray:
    picture = pattern(index, width, height)
    return picture if index < 8 else 255 - picture[::-1]


def test_scenes_are_spread_over_workers(server: Server) -> None:
    """By Ray, as several GPUs would be: the same video as on one device."""
    needs("ray")
    make_clip(server.base / "input" / "scenes.mp4", 16, WIDTH, HEIGHT, draw=two_scenes)
    lossless = {"3": ours("Settings", codec="ffv1")}
    run = {"video_path": "scenes.mp4", "num_inference_steps": 1, "settings": ["3", 0]}
    server.run({**file_job(output_path="one.mkv", **run), **lossless})
    many = {**file_job(output_path="many.mkv", **run), **lossless}
    many["4"] = ours("Runtime", pipe=["1", 0], runtime="torch", devices="cpu:2", **RUNTIME)
    many["2"]["inputs"]["pipe"] = ["4", 0]
    server.run(many)
    one, two = (frames_of(server.base / "output" / name) for name in ("one.mkv", "many.mkv"))
    # Threads per worker differ, and so may the last bits.
    assert one.shape == two.shape and np.abs(one.astype(int) - two).max() <= 1
    log = server.log.read_text()
    assert "worker 1: cpu" in log and "worker 2: cpu" in log


def test_the_finished_file_goes_on_as_path_and_as_video(server: Server) -> None:
    job = file_job(video_path="short.mp4", output_path="on.mp4", num_inference_steps=1)
    job["3"] = node("SaveVideo", video=["2", 1], filename_prefix="remuxed", format="auto", codec="auto")
    job["4"] = node("PreviewAny", source=["2", 0])
    done = server.run(job)
    written, again = server.base / "output" / "on.mp4", server.base / "output" / "remuxed_00001_.mp4"
    assert done["outputs"]["4"]["text"] == [str(written.resolve())]
    assert np.array_equal(frames_of(written), frames_of(again))
    with av.open(str(again)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


def test_an_error_reaches_the_page_with_its_remedy(server: Server) -> None:
    prompt = pictures("bad")
    prompt["3"] = node("ImageCrop", image=["2", 0], width=6, height=4, x=0, y=0)
    done = server.wait(server.queue(prompt))
    (error,) = messages(done, "execution_error")
    assert "pictures must be at least 8x8, not 6x4" in error["exception_message"]
    assert error["node_type"] == "StreamDiffVSR_Upscale"
    assert error["exception_type"] == "stream_diffvsr.IncompatibleInputError"


@pytest.mark.parametrize(
    "prompt, said",
    [
        (file_job(video_path="gone.mp4"), "video_path must be a file"),
        (file_job(video_path="video.mp4", output_path="x.gif"), "output_path must end in one of"),
        (pictures("bad", enable_tiling=True, tile_size=256, tile_overlap=256), "below half of tile_size 256"),
        (file_job(video_path="video.mp4", output_path="../x.mp4"), "outputs must be inside"),
        (
            {
                "1": ours("LoadState", state_file="gone.safetensors [output]"),
                "2": ours("SaveState", state=["1", 0], filename_prefix="x"),
            },
            "Save State first",
        ),
    ],
)
def test_bad_paths_are_refused_before_the_run(server: Server, prompt: dict, said: str) -> None:
    answer = server.post("/prompt", {"prompt": prompt})
    reports = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert [said in error["details"] for error in reports if "inner" not in error["type"]] in ([True], [])
    assert said in json.dumps(answer["node_errors"])
