"""The interface to ComfyUI. Only this module talks to ComfyUI, and every function also works without it."""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..stream_diffvsr import devices
from ..stream_diffvsr.errors import IncompatibleInputError

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler

PREVIEW_SIDE = 512
PREVIEW_SECONDS = 0.2
TEXT_SECONDS = 1.0
LIVE_EVENT = "stream_diffvsr.live"
"""The event that web/nodes.js listens for."""
SLOW_SECONDS = 2.0
"""If a frame takes longer than this, the node shows progress within the frame."""
STEP_WORDS = {"denoise": "step"}
"""Names shown to users for stages of the engine, where they differ from the engine's own."""
MODEL_KEY = "streamdiffvsr"


def comfy_module(module: str) -> Any:
    """Import a ComfyUI module; return None if the pack runs without ComfyUI."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


def memory_management() -> Any:
    """Return ComfyUI's memory management module, or None without ComfyUI."""
    return comfy_module("comfy.model_management")


REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


@contextmanager
def install_line() -> Generator[None, None, None]:
    """If the code in the `with` block needs a missing package, explain how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        raise ModuleNotFoundError(
            f'the Python package {error.name!r} is missing: run python -m pip install -r "{REQUIREMENTS}" '
            "with ComfyUI's Python, then restart ComfyUI"
        ) from error


# Devices


def device_names() -> list[str]:
    """Return 'auto' and the names of the devices that ComfyUI may use."""
    mm = memory_management()
    if mm is None:
        found = devices.available()
        return ["auto", "cpu", *(["cuda"] if "cuda:0" in found else []), *found[:-1]]
    main = mm.get_torch_device()
    if main.type == "cuda":
        return ["auto", "cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return ["auto", "cpu"] + ([main.type] if main.type != "cpu" else [])


def resolve_device(name: str) -> torch.device:
    """Return the device with a given name; 'auto' means the one that ComfyUI was started with."""
    mm = memory_management()
    if mm is None:
        return devices.resolve_device(name)
    if name not in device_names():
        raise IncompatibleInputError(f"device must be one of {', '.join(device_names())}, not {name!r}")
    main = mm.get_torch_device()
    return main if name in ("auto", main.type) else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the named number format; 'auto' means float16 if ComfyUI would use it, otherwise float32."""
    mm = memory_management()
    if mm is None or name != "auto":
        return devices.resolve_dtype(name, device)
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def intermediate_device() -> torch.device:
    """Return the device on which ComfyUI keeps the outputs of nodes."""
    mm = memory_management()
    return mm.intermediate_device() if mm else torch.device("cpu")


# Memory


class ManagedPlacement:
    """A placement that lets ComfyUI load the networks of each stage and unload them between stages."""

    fixed = False

    def __init__(self, patchers: Mapping[str, Any]) -> None:
        self._patchers = dict(patchers)

    def acquire(self, stage: str, activation_bytes: int) -> torch.device:
        """Load the networks of `stage`, freeing memory for its activations, and return their device."""
        patcher = self._patchers[stage]
        memory_management().load_models_gpu([patcher], memory_required=activation_bytes, force_full_load=True)
        if any(weight.device.type != patcher.load_device.type for weight in patcher.model.parameters()):
            patcher.model.to(patcher.load_device)
            patcher.model.model_loaded_weight_memory = patcher.model_size()
        return patcher.load_device


def manage(pipe: Upscaler, device: torch.device) -> None:
    """Let ComfyUI's memory management take over the networks of `pipe`, which are on the CPU."""
    pipe.device = device
    mm = memory_management()
    if mm is None:
        for network in pipe.networks.values():
            network.to(device)
        return
    # When memory is short, each stage is loaded separately, except that the U-Net and the ControlNet are
    # loaded together, since they alternate in every step.
    short = mm.vram_state in (mm.VRAMState.LOW_VRAM, mm.VRAMState.NO_VRAM)
    names, together = list(pipe.networks), ("unet", "controlnet")
    apart = [together, *((name,) for name in names if name not in together)]
    groups = [group for group in apart if group[0] in names] if short else [tuple(names)]
    patchers = {}
    for names in groups:
        patcher = _patcher({name: pipe.networks[name] for name in names}, device)
        patchers |= dict.fromkeys(names, patcher)
    pipe.placement = ManagedPlacement(patchers)


def make_room(pipe: Upscaler, size: tuple[int, int], options: Any) -> None:
    """Have ComfyUI unload other models before a run, so that the memory plan can use their memory.

    `size` is the height and width of a frame before upscaling.
    """
    if getattr(options, "memory_plan", "auto") == "auto":
        largest = "unet" if "unet" in pipe.networks else next(iter(pipe.networks))
        pipe.placement.acquire(largest, pipe.bytes_needed(size, options))


def make_all_room() -> None:
    """Have ComfyUI unload all models, because other processes are about to use the devices."""
    mm = memory_management()
    if mm:
        mm.unload_all_models()
        mm.soft_empty_cache()


def _patcher(networks: Mapping[str, nn.Module], device: torch.device) -> Any:
    """Return a patcher that moves whole networks, since ComfyUI can stream only its own layer classes."""
    from comfy.model_patcher import ModelPatcher

    class WholePatcher(ModelPatcher):  # pyright: ignore[reportUntypedBaseClass]
        def partially_load(self, device_to: Any, extra_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
            return super().partially_load(device_to, 1e32, *args, **kwargs)

        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            return 0  # makes ComfyUI unload the whole model

    # The patcher gets a wrapper module, since it sets attributes that are read-only in diffusers' classes.
    root = nn.Module()
    for name, network in networks.items():
        root.add_module(name, network)
    offload = memory_management().unet_offload_device() if device.type != "cpu" else torch.device("cpu")
    return WholePatcher(root, load_device=device, offload_device=offload)


# Progress and cancelling


class Progress:
    """The progress bar, preview and cancel button of the running node."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self._done, self._line, self._since = 0, "", time.monotonic()
        self._utils = comfy_module("comfy.utils")
        self._bar = self._utils.ProgressBar(total) if self._utils else None
        self._node_id = node_id
        self._total = total
        self._next_picture = 0.0
        self._next_text = 0.0

    def show(self, done: int, image: Tensor | None = None) -> None:
        """Update the bar, and show the newest frame (H, W, C) at most five times a second."""
        self._done, self._since = done, time.monotonic()
        if self._bar is None:
            return
        preview = None
        if image is not None and self._since >= self._next_picture:
            small = preview_picture(image)
            preview = ("JPEG", small, max(small.size))
            self._next_picture = self._since + PREVIEW_SECONDS
        self._bar.update_absolute(done, self._total, preview)

    def count(self, done: int, total: int) -> None:
        """Set the bar to `done` of `total`, which may differ from the previous total."""
        self._total = total
        self.show(done)

    def live(self, image: Tensor) -> None:
        """Show the newest frame (H, W, C) through this pack's script, at most five times a second.

        Nodes that show a video when they finish need this: if they used ComfyUI's own preview, newer
        frontends might not show the video.
        """
        instance, now = _page(), time.monotonic()
        if instance and self._node_id and now >= self._next_picture:
            packed = io.BytesIO()
            preview_picture(image).save(packed, "JPEG")
            shown = {"node": self._node_id, "jpeg": base64.b64encode(packed.getvalue()).decode()}
            instance.send_sync(LIVE_EVENT, shown, instance.client_id)
            self._next_picture = now + PREVIEW_SECONDS

    def step(self, stage: str, done: int, total: int) -> None:
        """Check for cancellation and show the progress of a slow frame; used as the engine's `on_step`."""
        check_interrupt()
        if total > 1 and time.monotonic() - self._since >= SLOW_SECONDS:
            now = f"frame {self._done + 1}: {STEP_WORDS.get(stage, stage)} {done} of {total}"
            self._write(f"{self._line}; {now}" if self._line else now)

    def say(self, text: str, last: bool = False) -> None:
        """Show a line of text on the node: at most once a second, except the `last` line, which stays."""
        self._line = text
        self._write(text, last)

    def _write(self, text: str, last: bool = False) -> None:
        instance, now = _page(), time.monotonic()
        if instance and self._node_id and (last or now >= self._next_text):
            instance.send_progress_text(text, self._node_id)
            self._next_text = now + TEXT_SECONDS


def _page() -> Any:
    """Return ComfyUI's server, which sends messages to the page, or None if it is not running."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def frames_done(done: int, total: int | None, fps: float) -> str:
    """Return progress as text, such as '120 of 300 frames, 2.50 per second, 1:12 left'."""
    of = f" of {total}" if total else ""
    left = int(max(0, total - done) / fps) if total and fps > 0 else None
    time_left = "" if left is None else f", {left // 60}:{left % 60:02} left"
    return f"{done}{of} frames, {fps:.2f} per second{time_left}"


def running_node() -> str | None:
    """Return the id of the node that ComfyUI is executing, or None if it is unknown."""
    execution = comfy_module("comfy_execution.utils")
    context = execution.get_executing_context() if execution else None
    return context.node_id if context else None


def check_interrupt(*_: Any) -> None:
    """Raise ComfyUI's interrupt exception if the user has cancelled; `on_step`'s arguments are ignored."""
    mm = memory_management()
    if mm:
        mm.throw_exception_if_processing_interrupted()


def preview_picture(image: Tensor) -> Any:
    """Convert a picture (H, W, 3 or 4) in [0, 1] to a small Pillow image."""
    from PIL import Image

    colours = image[..., :3].movedim(-1, 0)[None]
    shrink = max(1.0, max(colours.shape[-2:]) / PREVIEW_SIDE)
    size = [max(1, round(side / shrink)) for side in colours.shape[-2:]]
    small = F.interpolate(colours, size=size, mode="area")[0].movedim(0, -1)
    return Image.fromarray((small * 255).round().to(torch.uint8).cpu().numpy())


# Prompts


def meta_batch_number(prompt: Mapping[str, Any] | None, node_id: str | None) -> int | None:
    """Return VideoHelperSuite's current meta-batch number, counted from 0; None without a batch manager."""
    seen, waiting = set(), [node_id]
    while prompt and waiting:
        current = waiting.pop()
        node = prompt.get(current or "", {})
        if current in seen or not node:
            continue
        seen.add(current)
        if node.get("class_type") == "VHS_BatchManager":
            return int(node["inputs"].get("requeue", 0))
        links = [value for value in node.get("inputs", {}).values() if isinstance(value, list)]
        waiting += [str(value[0]) for value in links if len(value) == 2]
    return None


def workflow_metadata(prompt: Any, extra: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the workflow metadata as ComfyUI's own nodes save it, or {} if the user has disabled it."""
    arguments = getattr(comfy_module("comfy.cli_args"), "args", None)
    if getattr(arguments, "disable_metadata", False):
        return {}
    content = {**({"prompt": prompt} if prompt else {}), **(extra or {})}
    return {name: json.dumps(value) for name, value in content.items()}


# Videos


def is_file_video(video: Any) -> bool:
    """Whether a VIDEO is just a file, or the bytes of a file, with no pending edits."""
    implementations = comfy_module("comfy_api.input_impl")
    known = implementations is None or isinstance(video, implementations.VideoFromFile)
    return known and not getattr(video, "has_pending_frame_edits", bool)()


def trim_window(video: Any) -> tuple[float, float]:
    """Return the start and length of a VIDEO's trimmed range in seconds; length 0 means up to the end."""
    # Older ComfyUI versions cannot trim.
    return getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()


def video_file(path: Path) -> Any:
    """Return a VIDEO that refers to a file; without ComfyUI, return the path as text."""
    implementations = comfy_module("comfy_api.input_impl")
    return implementations.VideoFromFile(str(path)) if implementations else str(path)


def shown_video(path: Path) -> dict[str, Any]:
    """Return UI data that shows a video on the node, or just its path if it is outside ComfyUI's folders."""
    for kind in ("output", "temp"):
        root = folder(kind).resolve()
        if path.is_relative_to(root):
            shown = page_file(path, root, kind)
            return {"images": [shown], "animated": (True,), "text": [str(path)]}
    return {"text": [str(path)]}


def page_file(path: PurePath, root: PurePath, kind: str) -> dict[str, str]:
    """Describe a file in ComfyUI's folders in the page's format, with / as the separator on every system."""
    inside = path.relative_to(root)
    subfolder = "" if len(inside.parts) == 1 else inside.parent.as_posix()
    return {"filename": inside.name, "subfolder": subfolder, "type": kind}


# Files


def folder(kind: str) -> Path:
    """Return the 'output', 'temp' or 'input' folder of ComfyUI or, without ComfyUI, of the working folder."""
    paths = comfy_module("folder_paths")
    return Path(getattr(paths, f"get_{kind}_directory")()) if paths else Path.cwd() / kind


def image_models() -> list[str]:
    """Return the names of the single-image models that ComfyUI lists."""
    paths = comfy_module("folder_paths")
    return paths.get_filename_list("upscale_models") if paths else []


def image_model_path(name: str) -> str | None:
    """Return the path of a single-image model that ComfyUI lists, or None for any other name."""
    paths = comfy_module("folder_paths")
    return paths.get_full_path("upscale_models", name) if paths and name in image_models() else None


def lora_files() -> list[tuple[str, Path]]:
    """Return the name and path of every LoRA that ComfyUI lists, whichever model it is for."""
    paths = comfy_module("folder_paths")
    names = paths.get_filename_list("loras") if paths else []
    found = ((name, paths.get_full_path("loras", name)) for name in names)
    return [(name, Path(path)) for name, path in found if path]


def model_folders() -> list[Path]:
    """Return the folders in which ComfyUI users may keep checkpoints; downloads go to the first.

    Folders registered under the key StreamDiffVSR (ignoring case, - and _) come before the usual folders.
    """
    paths = comfy_module("folder_paths")
    if paths is None:
        return []
    known = paths.folder_names_and_paths
    keys = [key for key in known if key.lower().replace("-", "").replace("_", "") == MODEL_KEY]
    registered = [Path(path) for key in keys for path in paths.get_folder_paths(key)]
    shared = [Path(path, "Stream-DiffVSR") for path in paths.get_folder_paths("diffusers")]
    return [*registered, Path(paths.models_dir, "StreamDiffVSR"), *shared]
