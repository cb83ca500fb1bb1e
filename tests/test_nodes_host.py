"""What the nodes ask of ComfyUI and tell it; a recorder stands where ComfyUI would be."""

from __future__ import annotations

import base64
import itertools
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_clips import make_clip
from node_pack import ROOT, load_pack, part

from stream_diffvsr import UpscaleOptions
from stream_diffvsr.families.diffvsr.plan import Plan

PACK = load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
host = part(PACK, "nodes.host")
HEIGHT, WIDTH, STEPS = 12, 16, 3


@pytest.fixture(scope="module")
def pipe(checkpoint: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM_DIFFVSR_MODELS", str(checkpoint.parent))
        return NODES["StreamDiffVSR_Loader"]().execute(checkpoint.name, "cpu", "float32", "none")[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stand_in(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Have `host` find these modules of ComfyUI, named with _ for the dot, and no others."""
    monkeypatch.setattr(host, "comfy_module", lambda name: modules.get(name.replace(".", "_")))


class Bar:
    """ComfyUI's progress bar: it also cancels where the user asked for that."""

    shown: list[tuple[int, int, Any]]

    def __init__(self, total: int) -> None:
        type(self).shown = []

    def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
        self.shown.append((value, total, preview))


def test_the_bar_moves_with_each_frame_and_shows_at_most_five_pictures_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    stand_in(monkeypatch, comfy_utils=SimpleNamespace(ProgressBar=Bar))
    progress = host.Progress(100)
    for index in range(100):
        progress.show(index + 1, torch.full((4 * 300, 4 * 200, 3), index / 100))
        now[0] += 1 / 16
    assert [value for value, _, _ in Bar.shown] == list(range(1, 101))
    pictures = [(value, preview) for value, _, preview in Bar.shown if preview]
    assert [value for value, _ in pictures] == list(range(1, 101, 4))  # every quarter of a second
    for value, (kind, image, side) in pictures:
        assert (kind, side, image.size) == ("JPEG", 512, (341, 512))  # ComfyUI shows it at that side
        assert image.getpixel((0, 0)) == (round((value - 1) / 100 * 255),) * 3  # the newest frame


def test_a_small_picture_is_shown_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI enlarges to the side that it is given, and writes that beneath."""
    stand_in(monkeypatch, comfy_utils=SimpleNamespace(ProgressBar=Bar))
    host.Progress(1).show(1, torch.rand(216, 384, 3))
    ((_, _, (_, image, side)),) = Bar.shown
    assert (image.size, side) == ((384, 216), 384)


def test_a_slow_frame_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], []
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: said.append(text))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    stand_in(monkeypatch, comfy_utils=SimpleNamespace(ProgressBar=Bar))
    monkeypatch.setitem(sys.modules, "server", server)
    progress = host.Progress(10, "7")
    for step in range(4):
        progress.step("denoise", step + 1, 4)  # a second and a half each
        progress.step("flow", 1, 1)
        now[0] += 1.5
    assert said == ["frame 1: step 3 of 4", "frame 1: step 4 of 4"]
    progress.show(1)
    progress.say("1 of 10 frames")
    progress.step("denoise", 1, 4)  # as soon as that: nothing to say
    now[0] += 3
    progress.step("decode", 2, 9)
    assert said[2:] == ["1 of 10 frames", "1 of 10 frames; frame 2: decode 2 of 9"]


def test_upscale_says_how_far_it_is(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host.Progress, "_write", lambda self, text, last=False: said.append(text))
    NODES["StreamDiffVSR_Upscale"]().execute(pipe, torch.rand(2, HEIGHT, WIDTH, 3), num_inference_steps=1)
    assert [text[:13] for text in said] == ["1 of 2 frames", "2 of 2 frames"]


@pytest.mark.parametrize("name, count", [("Upscale", 2), ("Upscale", 1), ("UpscaleVideo", 2)])
def test_a_plan_that_splits_frames_is_told_on_the_node(
    pipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, count: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(host.Progress, "_write", lambda self, text, last=False: said.append(text))
    clip = str(make_clip(tmp_path / "clip.mp4", count, WIDTH, HEIGHT))
    inputs = {"images": torch.rand(count, HEIGHT, WIDTH, 3)} if name == "Upscale" else {"video_path": clip}
    for plan, told in (("whole", False), ("banded", True)):
        said.clear()
        settings = NODES["StreamDiffVSR_Settings"]().execute(memory_plan=plan)[0]
        NODES[f"StreamDiffVSR_{name}"]().execute(pipe, settings=settings, num_inference_steps=1, **inputs)
        ends = [text.endswith("memory plan: convolutions in bands of 128 rows") for text in said]
        assert ends == ([told] * count if told or count > 1 else [])


def test_a_line_on_the_node_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], []
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: said.append((text, node_id)))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    stand_in(monkeypatch, comfy_utils=SimpleNamespace(ProgressBar=Bar))
    monkeypatch.setitem(sys.modules, "server", server)
    progress = host.Progress(10, "7")
    for index in range(8):
        progress.say(f"frame {index}")
        now[0] += 0.25
    assert said == [("frame 0", "7"), ("frame 4", "7")]
    now[0] -= 0.9
    progress.say("frame 8", last=True)
    assert said[2:] == [("frame 8", "7")]


def test_a_live_picture_goes_to_our_script_five_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], []
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    instance = SimpleNamespace(client_id="tab", send_sync=lambda *event: sent.append(event))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    progress = host.Progress(10, "5:7")
    for _ in range(10):
        progress.live(torch.rand(36, 64, 3))
        now[0] += 0.0625
    (event, shown, tab), *others = sent
    assert (event, shown["node"], tab, len(others)) == ("stream_diffvsr.live", "5:7", "tab", 2)
    assert base64.b64decode(shown["jpeg"])[:3] == b"\xff\xd8\xff"
    assert event in (ROOT / "web" / "nodes.js").read_text(encoding="utf-8")


class Recorder:
    """A placement that remembers what was asked of it, with the real one behind it."""

    fixed = False

    def __init__(self, placement: Any) -> None:
        self.placement, self.asked = placement, []

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        self.asked.append((stage, activation_bytes))
        return self.placement.acquire(stage, activation_bytes)


def asked_first(pipe, monkeypatch: pytest.MonkeyPatch, name: str, **inputs: Any) -> tuple[str, int]:
    """What a node asked of the placement before the planner looked at what is free."""
    recorder = Recorder(pipe.placement)
    before_planning = []
    choose = type(pipe.planner).first_plan

    def watched(planner: Any, *arguments: Any) -> Plan:
        before_planning.extend(recorder.asked)
        return choose(planner, *arguments)

    monkeypatch.setattr(pipe, "placement", recorder)
    monkeypatch.setattr(type(pipe.planner), "first_plan", watched)
    NODES[f"StreamDiffVSR_{name}"]().execute(pipe, num_inference_steps=1, **inputs)
    return before_planning[0]


def test_upscale_makes_room_for_the_whole_frame_before_it_plans(pipe, monkeypatch) -> None:
    asked = asked_first(pipe, monkeypatch, "Upscale", images=torch.rand(1, HEIGHT, WIDTH, 3))
    assert asked == ("unet", pipe.planner.bytes_needed((HEIGHT, WIDTH), UpscaleOptions(), Plan()))


def test_upscale_video_makes_room_for_the_whole_frame_before_it_plans(pipe, monkeypatch, tmp_path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", 1, WIDTH, HEIGHT)
    asked = asked_first(pipe, monkeypatch, "UpscaleVideo", video_path=str(clip))
    assert asked == ("unet", pipe.planner.bytes_needed((HEIGHT, WIDTH), UpscaleOptions(), Plan()))


def test_process_frame_makes_room_too(pipe, monkeypatch) -> None:
    state = NODES["StreamDiffVSR_CreateState"]().execute()[0]
    asked = asked_first(pipe, monkeypatch, "ProcessFrame", image=torch.rand(1, HEIGHT, WIDTH, 3), state=state)
    assert asked == ("unet", pipe.planner.bytes_needed((HEIGHT, WIDTH), UpscaleOptions(), Plan()))


def test_a_plan_that_was_named_needs_no_room_beforehand(pipe, monkeypatch) -> None:
    recorder = Recorder(pipe.placement)
    monkeypatch.setattr(pipe, "placement", recorder)
    host.make_room(pipe, (HEIGHT, WIDTH), UpscaleOptions(memory_plan="banded"))
    assert not recorder.asked


class PlainInterruptError(Exception):
    """As ComfyUI's interrupt was until 2026."""


class BaseInterruptError(BaseException):
    """As it has been since."""


@pytest.mark.parametrize("kind", [PlainInterruptError, BaseInterruptError])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_cancelling_ends_the_run_within_a_step_and_keeps_nothing(
    pipe, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], after: int
) -> None:
    images, prompt = torch.rand(3, HEIGHT, WIDTH, 3), {"4": {"class_type": "VHS_BatchManager", "inputs": {}}}
    node = NODES["StreamDiffVSR_Upscale"]()
    run = {"num_inference_steps": STEPS, "unique_id": "4", "prompt": prompt}
    whole, _ = node.execute(pipe, images, **run)
    kept = part(PACK, "nodes.upscale")._sequences
    kept.pop(node, None)
    asked = 0

    def throw() -> None:
        nonlocal asked
        asked += 1
        if asked > after:
            raise kind

    with monkeypatch.context() as patch:
        device = SimpleNamespace(intermediate_device=lambda: torch.device("cpu"))
        device.throw_exception_if_processing_interrupted = throw
        stand_in(patch, comfy_model_management=device)
        with pytest.raises(kind):
            node.execute(pipe, images, **run)
    assert asked == after + 1  # not asked again, and nothing was computed after it
    assert node not in kept
    assert torch.equal(node.execute(pipe, images, **run)[0], whole)


def test_the_user_can_cancel_between_any_two_denoising_steps(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, calls = pipe.stages["unet"], []
    pipe.bytes_needed((HEIGHT, WIDTH))  # counted on a copy of the network, hooks included: not in this test
    handle = unet.register_forward_hook(lambda *_: calls.append("step"))
    monkeypatch.setattr(host, "check_interrupt", lambda *_: calls.append("asked"))
    try:
        NODES["StreamDiffVSR_Upscale"]().execute(
            pipe, torch.rand(2, HEIGHT, WIDTH, 3), num_inference_steps=STEPS
        )
    finally:
        handle.remove()
    assert calls.count("step") == 2 * STEPS
    assert not any(pair == ("step", "step") for pair in itertools.pairwise(calls))


@pytest.mark.parametrize(
    "fp16, wanted", [(True, torch.float16), (False, torch.float32)], ids=["float16", "float32"]
)
def test_auto_dtype_follows_comfyui(monkeypatch: pytest.MonkeyPatch, fp16: bool, wanted: torch.dtype) -> None:
    """bfloat16 never by itself, whatever the device can do."""
    mm = SimpleNamespace(should_use_fp16=lambda device: fp16, should_use_bf16=lambda device: True)
    stand_in(monkeypatch, comfy_model_management=mm)
    assert host.resolve_dtype("auto", torch.device("cuda")) == wanted
    assert host.resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    "main, names",
    [
        ("cpu", ["auto", "cpu"]),
        ("cuda:1", ["auto", "cpu", "cuda", "cuda:0", "cuda:1"]),
        ("mps", ["auto", "cpu", "mps"]),
    ],
)
def test_devices_are_comfyuis(monkeypatch: pytest.MonkeyPatch, main: str, names: list[str]) -> None:
    mm = SimpleNamespace(get_torch_device=lambda: torch.device(main))
    stand_in(monkeypatch, comfy_model_management=mm)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert host.device_names() == names
    assert host.resolve_device("auto") == torch.device(main)
    assert host.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device must be one of auto, .* not 'cuda:9'"):
        host.resolve_device("cuda:9")


def test_model_folders_in_any_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {
        "checkpoints": ["/c"],
        "streamdiffvsr": ["/one"],
        "Stream-DiffVSR": ["/two", "/three"],
        "diffusers": ["/d"],
    }
    paths = SimpleNamespace(folder_names_and_paths=known, models_dir=str(tmp_path))
    paths.get_folder_paths = lambda key: known[key]
    stand_in(monkeypatch, folder_paths=paths)
    wanted = ["/one", "/two", "/three", str(tmp_path / "StreamDiffVSR"), str(Path("/d/Stream-DiffVSR"))]
    assert host.model_folders() == [Path(path) for path in wanted]


def test_workflows_are_written_unless_the_user_forbade_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for forbidden in (False, True):
        arguments = SimpleNamespace(args=SimpleNamespace(disable_metadata=forbidden))
        stand_in(monkeypatch, comfy_cli_args=arguments)
        written = host.workflow_metadata({"1": {}}, {"workflow": {"nodes": ["ü"]}})
        assert written == ({} if forbidden else {"prompt": '{"1": {}}', "workflow": '{"nodes": ["\\u00fc"]}'})


@pytest.mark.parametrize("flavour", [PurePosixPath, PureWindowsPath])
def test_the_page_asks_for_files_with_slashes(flavour: type[PurePosixPath | PureWindowsPath]) -> None:
    root = flavour("base", "output")
    deep = flavour("base", "output", "my films", "上", "ein Film.mp4")
    assert host.page_file(deep, root, "output") == {
        "filename": "ein Film.mp4",
        "subfolder": "my films/上",
        "type": "output",
    }
    assert host.page_file(root / "x.mp4", root, "temp")["subfolder"] == ""


def test_a_video_outside_of_comfyuis_folders_is_named_but_not_shown(tmp_path: Path) -> None:
    assert host.shown_video(tmp_path / "elsewhere" / "x.mp4") == {
        "text": [str(tmp_path / "elsewhere" / "x.mp4")]
    }
