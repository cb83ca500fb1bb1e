"""The node that loads a model."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch

from ..stream_diffvsr.errors import StreamDiffVSRError
from . import files, host
from .pipes import Known, remember
from .sockets import CATEGORY, PIPE

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler
    from ..stream_diffvsr.weights.find import Candidate


class Loader:
    """Loads a model and lets ComfyUI manage its memory."""

    DESCRIPTION = (
        "Loads a model. v1 is the released Stream-DiffVSR, downloaded when first used; nano is a small "
        "model that comes with this pack and runs on a CPU; FlashVSR is for real footage on a GPU."
    )
    SEARCH_ALIASES: ClassVar = ["load stream diffvsr", "vsr model loader", "video upscale model"]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = (PIPE,)
    RETURN_NAMES = ("pipe",)
    OUTPUT_TOOLTIPS = ("The model, for the pipe input of the other nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..stream_diffvsr.flow.estimators import FLOW_MODELS
        from ..stream_diffvsr.weights.released import RELEASES

        sizes = ", ".join(f"{each.name} {each.gigabytes} GB" for each in RELEASES.values())
        return {
            "required": {
                "model_version": (
                    checkpoints(),
                    {
                        "default": "v1",
                        "tooltip": "nano is the small model that comes with this pack. The other released "
                        f"models are downloaded when first used: {sizes}. The list also includes every "
                        "complete checkpoint in the model folders, and the single-image models in "
                        "upscale_models.",
                    },
                ),
                "device": (
                    host.device_names(),
                    {
                        "default": "auto",
                        "advanced": True,
                        "tooltip": "Where the model runs. auto: the device that ComfyUI uses.",
                    },
                ),
                "dtype": (
                    ["auto", "float16", "bfloat16", "float32"],
                    {
                        "default": "auto",
                        "advanced": True,
                        "tooltip": "Number format of the networks. auto: float16 where ComfyUI would use it, "
                        "otherwise float32. Frames, motion and the state are always float32.",
                    },
                ),
            },
            "optional": {
                "flow_model": (
                    ["auto", *FLOW_MODELS],
                    {
                        "default": "auto",
                        "advanced": True,
                        "tooltip": "How motion between frames is estimated (Stream-DiffVSR only). auto: the "
                        "model's own method. raft_large, raft_small: torchvision's RAFT. "
                        "bundled: the small network that comes with this pack. dis: OpenCV's DIS, for CPUs. "
                        "none: no guidance from the previous frame, so the result flickers.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model_version: str, **_: Any) -> str:
        return source_identity(model_version)

    def execute(
        self, model_version: str, device: str, dtype: str, flow_model: str = "auto"
    ) -> tuple[Upscaler]:
        place = host.resolve_device(device)
        return (shared_pipe(model_version, place, host.resolve_dtype(dtype, place), flow_model),)


def checkpoints() -> list[str]:
    """Return the models to choose from: known names, complete checkpoint folders, and single-image models."""
    from ..stream_diffvsr.families.diffvsr.prompt import FILE
    from ..stream_diffvsr.load import family_of
    from ..stream_diffvsr.weights.find import candidates
    from ..stream_diffvsr.weights.released import RELEASES

    found = [
        each.name
        for each in candidates(host.model_folders(), family_of)
        if is_complete(each, checkpoint_stamp(each.path) + files.file_stamp(each.path / FILE))
    ]
    v1, *others = RELEASES
    return list(dict.fromkeys([v1, "nano", *others, *found, *host.image_models()]))


@lru_cache(maxsize=64)
def is_complete(candidate: Candidate, files_identity: str) -> bool:
    """Whether a folder is a complete checkpoint; it is inspected again only when its files change.

    If packages needed for the check are missing, the folder is assumed to be complete; running the model then
    reports which packages to install.
    """
    from ..stream_diffvsr.load import FAMILIES

    try:
        return FAMILIES[candidate.family].problem(candidate.path) is None
    except ImportError:
        return True


def checkpoint_stamp(folder: Path) -> str:
    """Return a short string that changes when a checkpoint's files change, except for the stored prompts."""
    from ..stream_diffvsr.families.diffvsr.prompt import FILE

    inside = [
        path for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file() and path.name != FILE
    ]
    parts = sorted(files.file_stamp(path) for path in inside)
    return hashlib.sha256("\n".join([str(folder), *parts]).encode()).hexdigest()[:16]


def source_identity(source: str) -> str:
    """Return a string that changes when a source's files do, or 'missing' if they are not on this machine."""
    from ..stream_diffvsr.load import resolve

    try:
        path = resolve(located(source), host.model_folders())
    except (StreamDiffVSRError, ImportError):  # reported when the node runs
        path = None
    if path is None:
        return "missing"
    return checkpoint_stamp(path) if path.is_dir() else files.file_stamp(path)


def located(source: str) -> str:
    """Return the path of a single-image model that ComfyUI lists; return any other source unchanged."""
    return host.image_model_path(source) or source


class Downloading:
    """Shows a download's progress on the running node: a bar, and the amount and speed as text."""

    def __init__(self, source: str) -> None:
        from ..stream_diffvsr.weights.released import RELEASES

        self._progress = host.Progress(1, host.running_node())
        release = RELEASES.get(source)
        if release and source_identity(source) == "missing":
            self._progress.say(f"{source} is not on this machine: downloading {release.gigabytes} GB")
        self._since, self._before, self._whole = time.monotonic(), 0, False

    def __call__(self, done: int, total: int) -> None:
        self._progress.count(done, total)
        seconds, whole = time.monotonic() - self._since, done >= total
        known = total > 1 and not self._whole
        if known and (whole or seconds >= host.TEXT_SECONDS):
            rate = (done - self._before) / max(seconds, 1e-3)
            self._progress.say(f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s", whole)
            self._since, self._before, self._whole = time.monotonic(), done, whole


_open: WeakValueDictionary[tuple[Any, ...], Upscaler] = WeakValueDictionary()
"""The pipes in use, so that two Loaders with equal settings share one."""


def shared_pipe(
    source: str, device: torch.device, dtype: torch.dtype, flow: str, quantize: str = "none"
) -> Upscaler:
    """Return a pipe with these settings: the one already in use, or a new one."""
    settings = (source, device, dtype, flow, quantize)
    pipe = _open.get((source_identity(source), *settings))
    if pipe is None:
        with host.install_line():
            from ..stream_diffvsr import StreamDiffVSRPipeline, load_pipeline

            pipe = load_pipeline(
                located(source),
                device="cpu",
                dtype=dtype,
                flow=flow,
                extra_folders=host.model_folders(),
                on_progress=Downloading(source),
            )
            if isinstance(pipe, StreamDiffVSRPipeline):
                pipe.device = device  # quantization depends on the device
                pipe.quantize(quantize)
        host.manage(pipe, device)
        folders = [str(folder) for folder in host.model_folders()]
        model = {"source": located(source), "dtype": str(dtype).removeprefix("torch."), "flow": flow}
        remember(pipe, Known(source, {**model, "extra_folders": folders}))
        _open[(source_identity(source), *settings)] = pipe  # a download changes the identity
    return pipe
