"""Load a model by its name; this is the only module that knows all families."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .devices import resolve_device, resolve_dtype
from .errors import IncompatibleInputError, ModelNotFoundError, StreamDiffVSRError
from .families.diffvsr import checkpoint as diffvsr
from .families.diffvsr import options as diffvsr_options
from .families.diffvsr.check import default_flow
from .families.diffvsr.check import problem as diffvsr_problem
from .families.diffvsr.components import NETWORKS, SCHEDULER_CONFIG, open_component
from .families.diffvsr.counted import Needs
from .families.diffvsr.fastest import fastest
from .families.diffvsr.options import UpscaleOptions
from .families.diffvsr.pipeline import StreamDiffVSRPipeline
from .families.diffvsr.plan import requested_plan
from .families.diffvsr.released import CONFIGS, untrained_flow, without_weights
from .families.flashvsr import checkpoint as flashvsr
from .families.flashvsr import options as flashvsr_options
from .families.flashvsr.options import FlashVSROptions
from .families.image import checkpoint as image
from .families.image import options as image_options
from .families.image.options import ImageOptions
from .families.swiftvr import checkpoint as swiftvr
from .families.swiftvr import options as swiftvr_options
from .families.swiftvr.options import SwiftVROptions
from .families.wan.attention import check_attention
from .files import read_json
from .flow import open_flow
from .runtimes.choose import open_runtime
from .runtimes.torch import quantized
from .upscaler import Upscaler
from .weights.fetch import OnProgress, fetch, usual_targets
from .weights.find import Candidate, candidates, hub_snapshots, inside, models_folders
from .weights.folders import NANO
from .weights.released import RELEASED, RELEASES, release_named

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """A model family: the functions that recognise and check its files, and its options."""

    recognise: Callable[[Path], bool]
    """Function that returns whether a folder or file looks like a model of this family."""
    problem: Callable[[Path], StreamDiffVSRError | None]
    """Function that returns the error that prevents a model from being opened, or None."""
    needed: Callable[[Collection[str], Path], Collection[str]]
    """Function that returns the names of the published files that a folder needs to be complete."""
    options: type
    presets: Mapping[str, Mapping[str, Any]]
    title: str
    """Display name of the family."""


FAMILIES = {
    "swiftvr": Family(
        swiftvr.recognise,
        swiftvr.problem,
        swiftvr.needed,
        SwiftVROptions,
        swiftvr_options.PRESETS,
        "SwiftVR",
    ),
    "flashvsr": Family(
        flashvsr.recognise,
        flashvsr.problem,
        flashvsr.needed,
        FlashVSROptions,
        flashvsr_options.PRESETS,
        "FlashVSR",
    ),
    "diffvsr": Family(
        diffvsr.recognise,
        diffvsr_problem,
        diffvsr.needed,
        UpscaleOptions,
        diffvsr_options.PRESETS,
        "Stream-DiffVSR",
    ),
    "image": Family(
        image.recognise,
        image.problem,
        lambda names, folder: names,
        ImageOptions,
        image_options.PRESETS,
        image_options.OWN,
    ),
}
"""The families by name, in the order in which `family_of` tries them."""


WAN = ("flashvsr", "swiftvr")
"""Families whose transformer attends to large parts of a clip."""


class Found(NamedTuple):
    """A folder that looks like a checkpoint."""

    name: str
    path: Path
    problem: str | None
    """Reason for ignoring the folder, or None if it is complete."""


@overload
def load_pipeline(
    source: Literal["nano", "v1", "mix"] = "nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    flow: str | Callable[[Tensor, Tensor], Tensor] = "auto",
    quantize: str = "none",
    attention: str = "auto",
    version: str | None = None,
    runtime: str = "torch",
    provider: str = "auto",
    loras: Iterable[tuple[str | Path, float]] = (),
    extra_folders: Iterable[str | Path] = (),
    on_progress: OnProgress | None = None,
) -> StreamDiffVSRPipeline: ...
@overload
def load_pipeline(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    flow: str | Callable[[Tensor, Tensor], Tensor] = "auto",
    quantize: str = "none",
    attention: str = "auto",
    version: str | None = None,
    runtime: str = "torch",
    provider: str = "auto",
    loras: Iterable[tuple[str | Path, float]] = (),
    extra_folders: Iterable[str | Path] = (),
    on_progress: OnProgress | None = None,
) -> Upscaler: ...
def load_pipeline(
    source: str | Path = "nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    flow: str | Callable[[Tensor, Tensor], Tensor] = "auto",
    quantize: str = "none",
    attention: str = "auto",
    version: str | None = None,
    runtime: str = "torch",
    provider: str = "auto",
    loras: Iterable[tuple[str | Path, float]] = (),
    extra_folders: Iterable[str | Path] = (),
    on_progress: OnProgress | None = None,
) -> Upscaler:
    """Load a model and prepare it to run.

    `source` is 'nano' (bundled), the name of a released model (listed in `weights.released.RELEASES`, and
    downloaded if it is not on this machine), the name or folder of a checkpoint that
    `find_checkpoints(extra_folders)` lists, or the file of a single-image model. `dtype` is the number format
    of the networks; frames, flow, warp, state and scheduler arithmetic are always float32.

    The following arguments are for Stream-DiffVSR only. `flow` is the motion estimator. Setting `quantize`
    to 'int8' or 'fp8' runs linear layers in 8 bits, which is an approximation and requires torchao ('fp8'
    also requires a GPU that supports it). `runtime` is the library that runs the networks: 'torch',
    'openvino', 'onnx', or 'auto' for the fastest exact runtime that is installed, as measured on first use.
    `provider` is the runtime's device: 'auto', 'cpu', 'gpu' or 'npu' for OpenVINO; 'auto', 'cpu', 'cuda' or
    'tensorrt' for ONNX Runtime. `loras` are (file, strength) pairs for LoRAs made by 'stream-diffvsr train',
    with strengths from -2 to 2 (1 means as trained).

    For FlashVSR only, `version` is 'v1' or 'v1.1'; it is required unless the name of the folder or of one of
    its files reveals it. For FlashVSR and SwiftVR, `attention` is 'auto' or 'sdpa' (PyTorch's own
    implementation); SwiftVR on CUDA also accepts 'sage' (an approximation) and 'flash', which require their
    packages.

    `on_progress(done_bytes, total_bytes)` is called during a download; if it raises an exception, the
    download stops, and the next download resumes from there. Raises `ModelNotFoundError`, `CheckpointError`
    or `IncompatibleInputError`.
    """
    folders, loras = list(extra_folders), tuple(loras)
    family = family_named(source, folders)
    _refuse_what_is_not_there(family, flow, quantize, version, runtime, attention, loras)
    # OpenVINO reads its frames from CPU memory.
    chosen_device = resolve_device("cpu" if (runtime, device) == ("openvino", "auto") else device)
    other = open_runtime(runtime, provider, chosen_device, dtype, quantize)
    quantized.check_quantize(quantize, chosen_device)
    chosen_dtype = resolve_dtype(dtype, chosen_device) if other is None else other.dtype
    folder = resolve(source, folders) or download(str(source), folders, on_progress=on_progress)
    if family in WAN:
        check_attention(attention, chosen_device, chosen_dtype)
    if family == "flashvsr":
        asked, named = RELEASES.get(str(source)), release_named(folder.name)
        told = (asked and asked.version) or flashvsr.version_of(folder) or (named and named.version)
        model = flashvsr.open_flashvsr(folder, version or told, chosen_device, chosen_dtype)
        model.use_attention(attention)
        return model
    if family == "swiftvr":
        model = swiftvr.open_swiftvr(folder, chosen_device, chosen_dtype)
        model.use_attention(attention)
        return model
    if family == "image":
        return image.open_image_model(folder, chosen_device, chosen_dtype)
    pipe = diffvsr.open_diffvsr(folder, chosen_device, chosen_dtype, flow, models_folders(folders))
    if loras:
        pipe = pipe.with_loras(*loras)
    pipe.quantize(quantize)
    if other is not None:
        return pipe.on(other)
    return fastest(pipe) if runtime == "auto" else pipe


def _refuse_what_is_not_there(
    family: str,
    flow: object,
    quantize: str,
    version: str | None,
    runtime: str,
    attention: str,
    loras: object,
) -> None:
    """Raise `IncompatibleInputError` for a loader setting that the family does not support."""
    if family not in WAN and attention != "auto":
        raise IncompatibleInputError(
            f"{FAMILIES[family].title} has no large self-attention: leave attention at 'auto' instead of "
            f"setting it to {attention!r}"
        )
    own = {"flow": ("diffvsr", flow, "auto"), "quantize": ("diffvsr", quantize, "none")}
    own |= {"runtime": ("diffvsr", runtime, "torch"), "loras": ("diffvsr", loras, ())}
    for name, (owner, value, usual) in {**own, "version": ("flashvsr", version, None)}.items():
        if family != owner and value != usual:
            raise IncompatibleInputError(
                f"{FAMILIES[family].title} only supports {name} {usual!r}, not {value!r}"
            )


def family_of(folder: Path) -> str | None:
    """Return the family of a folder's files, or None if the folder does not look like a checkpoint."""
    try:
        return next((name for name, family in FAMILIES.items() if family.recognise(folder)), None)
    except OSError:  # a folder without read permission, such as lost+found
        return None


def family_named(source: str | Path, extra_folders: Iterable[str | Path] = ()) -> str:
    """Return the family of a source; raise `ModelNotFoundError` in the same cases as `resolve`.

    For a folder that is not a checkpoint, return Stream-DiffVSR, whose checks then report what is missing.
    """
    if str(source) in RELEASES:
        return RELEASES[str(source)].family
    folder = resolve(source, extra_folders)
    return (folder and family_of(folder)) or "diffvsr"


def find_checkpoints(extra_folders: Iterable[str | Path] = ()) -> list[Found]:
    """List all checkpoint folders on this machine as (name, path, problem or None), in search order.

    The search covers `extra_folders` (in ComfyUI, its model folders), the folders in the environment variable
    STREAM_DIFFVSR_MODELS, the user's data folder, the models folders of a ComfyUI installation that contains
    this package, and huggingface_hub's cache. Each of these folders may itself be a checkpoint or contain
    checkpoints. A released name such as 'v1' refers to the first complete folder with that name. No weights
    are loaded, and damaged folders do not raise errors.
    """
    return [
        Found(each.name, each.path, reason_ignored(each)) for each in candidates(extra_folders, family_of)
    ]


UNTOLD = "it could be version v1 or v1.1: rename the folder to flashvsr-v1 or flashvsr-v1.1."


def reason_ignored(candidate: Candidate) -> str | None:
    """Return why a folder is ignored, or None if it is not; the reason may be an `ImportError`'s message."""
    try:
        error = FAMILIES[candidate.family].problem(candidate.path)
    except ImportError as missing:
        return str(missing)
    if error is None and candidate.family == "flashvsr" and candidate.name not in RELEASES:
        return None if flashvsr.version_of(candidate.path) else UNTOLD
    return str(error) if error else None


def resolve(source: str | Path, extra_folders: Iterable[str | Path] = ()) -> Path | None:
    """Return the folder or file of a source, or None for released weights that have to be downloaded.

    Raises `ModelNotFoundError` for an unknown name and for a folder that contains several checkpoints.
    """
    if source == "nano":
        return NANO
    if Path(source).is_dir() and source not in RELEASES:
        if among := inside(Path(source), family_of):
            named = " or ".join(map(str, among))
            raise ModelNotFoundError(
                "checkpoint", Path(source), f"This folder contains several checkpoints: choose {named}."
            )
        return Path(source)
    if image.recognise(Path(source)):
        return Path(source)
    found = [each for each in candidates(extra_folders, family_of) if each.name == str(source)]
    if source in RELEASES:
        return next((each.path for each in found if not _is_damaged(each)), None)
    if not found:
        known = [each.name for each in candidates(extra_folders, family_of)]
        names = ", ".join(dict.fromkeys(["nano", *RELEASES, *known]))
        raise ModelNotFoundError(
            f"checkpoint {str(source)!r}",
            Path(source).absolute(),
            f"Choose a folder, a model file ({', '.join(image.SUFFIXES)}), or one of {names}.",
        )
    return found[0].path


def _is_damaged(candidate: Candidate) -> bool:
    """Return whether a folder has a problem; if so, log the problem, since the search skips the folder."""
    error = FAMILIES[candidate.family].problem(candidate.path)
    if error is not None:
        log.info("%s cannot be used as %s: %s", candidate.path, candidate.name, error)
    return error is not None


def download(
    name: str,
    extra_folders: Iterable[str | Path] = (),
    *,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download a released model to the first registered folder or the user's data folder; return its path.

    Raises `ModelNotFoundError`, whose message explains how to install the files manually.
    """
    release, family, folders = RELEASES[name], FAMILIES[RELEASES[name].family], list(extra_folders)
    folder = fetch(
        release,
        download_targets(name, folders),
        family.needed,
        lambda folder: family.recognise(folder) and family.problem(folder) is None,
        revision=revision,
        on_progress=on_progress,
    )
    if error := family.problem(folder):
        raise error
    return folder


def download_targets(name: str, extra_folders: Iterable[str | Path] = ()) -> list[Path]:
    """Return the folders that a released model can be downloaded to, in order of preference.

    A folder that lacks only Stream-DiffVSR's text encoder or tokenizer is completed in place, unless it is in
    the hub's cache, which only huggingface_hub may write to.
    """
    release, folders = RELEASES[name], list(extra_folders)
    cached = hub_snapshots(release.repository)
    there = [each.path for each in candidates(folders, family_of) if each.name == name]
    nearly = [path for path in there if path not in cached and diffvsr.lacks_text_only(path)]
    usual = usual_targets(release, folders)
    return [*(path.resolve() for path in nearly if release.family == "diffvsr"), *usual]


def estimate_memory(
    height: int,
    width: int,
    options: UpscaleOptions | None = None,
    dtype: torch.dtype = torch.float16,
    model: str | Path = "v1",
) -> dict[str, int]:
    """Return the bytes that each stage needs for an LQ frame of `height` x `width`, without reading weights.

    The keys are 'weights' and 'frames'; 'flow', 'controlnet', 'unet' and 'vae' for the activations of these
    stages; and 'peak' for the maximum needed at any moment. In float32, 'peak' includes the copies of weights
    that are kept for faster computation on a CPU. With `memory_plan` 'auto', the estimate assumes
    that the frame is not split. `model` is 'v1', 'nano' or a checkpoint folder of Stream-DiffVSR.
    """
    options = options or UpscaleOptions()
    configs, flow = CONFIGS, "raft_large"
    folder = None if model == RELEASED else resolve(model)
    if folder is not None:
        configs = {name: open_component(folder, name).config for name in NETWORKS}
        configs["scheduler"], flow = read_json(folder / SCHEDULER_CONFIG), default_flow(folder)
    estimator = open_flow(flow, untrained_flow)
    needs = Needs(
        without_weights(configs, estimator, dtype), configs["scheduler"], dtype, torch.device("cpu")
    )
    return needs((height, width), options, requested_plan(options, estimator.methods))
