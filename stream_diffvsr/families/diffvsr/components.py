"""Find a checkpoint's files, build its networks without weights, and load the weights strictly."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelNotFoundError
from ...files import read_json, read_shapes, read_weights
from ...weights.networks import Network, Shapes, check_keys, empty, move_weight, shapes_of
from .vae import TemporalAutoencoderTiny

NETWORKS = ("unet", "controlnet", "vae")
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
CONFIG = "config.json"
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")
INDEX = "model_index.json"

STEMS = {TEXT_ENCODER: ("model", "pytorch_model")}
NETWORK_STEMS = ("diffusion_pytorch_model",)
FORMS = (
    "{stem}.safetensors",
    "{stem}.safetensors.index.json",
    "{stem}.fp16.safetensors",
    "{stem}.safetensors.index.fp16.json",
    "{stem}.bf16.safetensors",
    "{stem}.bin",
    "{stem}.bin.index.json",
    "{stem}.fp16.bin",
    "{stem}.pth",
)
"""File names of published weights, best first: full precision before half, and one file before several."""

REMEDY = "Copy it there, or get the released folder with 'stream-diffvsr download'."


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint folder, as stored on disk."""

    name: str
    config: dict[str, Any]
    config_path: Path
    path: Path
    """The weights file, or the index of several weights files."""
    files: tuple[Path, ...]
    """All weights files."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights by name; raises `CheckpointError` for a damaged file."""
        return {key: shape for path in self.files for key, shape in read_shapes(path).items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, memory-mapped from their files."""
        return {key: value for path in self.files for key, value in read_weights(path).items()}


def open_component(folder: Path, name: str) -> Component:
    """Return a network's configuration and files.

    Raises `ModelNotFoundError`, which names the missing file, or `CheckpointError` for a damaged file.
    """
    config_path = folder / name / CONFIG
    require(config_path, name)
    present = [path.name for path in (folder / name).iterdir()]
    chosen = choose(present, name)
    if chosen is None:
        stem = STEMS.get(name, NETWORK_STEMS)[0]
        raise ModelNotFoundError(f"weights of {name}", folder / name / f"{stem}.safetensors", REMEDY)
    path = folder / name / chosen
    require(path, name)
    return Component(name, read_json(config_path), config_path, path, _files(path, name))


def choose(present: Collection[str], name: str) -> str | None:
    """Return the best of a part's weights files among the names in its folder, or None if there are none."""
    stems = STEMS.get(name, NETWORK_STEMS)
    names = [form.format(stem=stem) for form in FORMS for stem in stems]
    return next((candidate for candidate in names if candidate in present), None)


def shards(present: Collection[str], index: str) -> list[str]:
    """Return the file names that belong to an index; they look like stem-00001-of-00002.safetensors."""
    stem, kind, variant = re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\..+)?\.json", index).groups()  # type: ignore[union-attr]
    pattern = re.compile(rf"{re.escape(stem)}{re.escape(variant or '')}-\d+-of-\d+\.{kind}")
    return sorted(name for name in present if pattern.fullmatch(name))


def require(path: Path, name: str) -> None:
    """Raise `ModelNotFoundError` unless the file exists."""
    if path.is_file():
        return
    where = f" (a link to {path.readlink()}, which does not exist)" if path.is_symlink() else ""
    raise ModelNotFoundError(f"checkpoint part {name}{where}", path, REMEDY)


def _files(path: Path, name: str) -> tuple[Path, ...]:
    if path.suffix != ".json":
        return (path,)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} lists no weight files; download it again.")
    # Only the names are used, so that an index cannot refer to files outside its folder.
    files = [path.parent / Path(str(file)).name for file in sorted(set(places.values()))]
    for file in files:
        require(file, name)
    return tuple(files)


BUFFERS = (".position_ids",)
"""Endings of keys that do not refer to weights; such keys occur in older files."""

PREFIXES = {TEXT_ENCODER: "text_model."}
"""Prefixes that keys have in files and in transformers 4, but not in transformers 5."""


def build(part: Component) -> nn.Module:
    """Build the network that a part's configuration describes, without weights.

    Raises `CheckpointError` for an invalid configuration.
    """
    import_library(part.name)  # not in `try`: a missing or broken package is not the checkpoint's fault
    try:
        return empty(lambda: from_config(part.name, part.config))
    except Exception as error:  # libraries raise all kinds of errors for invalid configurations
        raise CheckpointError(
            f"{part.config_path} does not describe a valid {part.name} ({error!r})."
        ) from error


def import_library(name: str) -> None:
    """Import the library that builds a network; raise `ImportError` with the cause, which the library hides.

    diffusers and transformers import each other as well as torchvision and torchaudio; any of these imports
    may fail.
    """
    try:
        if name == TEXT_ENCODER:
            from transformers import CLIPTextModel  # noqa: F401
        elif name != "vae":
            from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise
        library = "transformers" if name == TEXT_ENCODER else "diffusers"
        raise ImportError(f"{library} cannot be imported: {cause(error)}", name=library) from error


def cause(error: BaseException) -> BaseException:
    """Return the original error in a chain of causes."""
    return cause(error.__cause__) if error.__cause__ else error


def from_config(name: str, config: dict[str, Any]) -> Any:
    """Build the network called `name` in checkpoint folders, with its library's initial weights."""
    if name == "vae":
        return TemporalAutoencoderTiny(config)
    if name == TEXT_ENCODER:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**config))
    from diffusers import ControlNetModel, UNet2DConditionModel

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError("the ControlNet's image channels must be in RGB order")
    return ControlNetModel.from_config(config)


def fill(network: Network, part: Component, device: torch.device, dtype: torch.dtype) -> Network:
    """Load the weights of a part into its network, and put the network in eval mode.

    The files are memory-mapped and copied to the device one weight at a time, so there is never a second copy
    of all weights. On a CPU, weights that already have the right type stay in the mapped file: they use none
    of the process's memory and are loaded when first used. Raises `CheckpointError` if the weights do not
    fit.
    """
    needed = shapes_of(network)
    weights = named_for(part, part.weights(), needed)
    check_keys(part.path, named_for(part, part.shapes, needed), needed)
    placed = {key: move_weight(value, device, dtype) for key, value in weights.items()}
    network.load_state_dict(placed, assign=True)
    return network.to(device).eval().requires_grad_(False)


Value = TypeVar("Value")


def named_for(part: Component, values: Mapping[str, Value], needed: Shapes) -> dict[str, Value]:
    """Rename a part's weights as the installed library expects, and drop all BUFFERS."""
    kept = {key: value for key, value in values.items() if not key.endswith(BUFFERS)}
    prefix = PREFIXES.get(part.name, "")
    if prefix and not any(key.startswith(prefix) for key in needed):
        return {key.removeprefix(prefix): value for key, value in kept.items()}
    return kept


@dataclass(frozen=True)
class Traits:
    """Properties of a checkpoint, read from its index; the defaults are those of the released checkpoints."""

    steps: int = 4
    """Number of denoising steps if the options specify none."""
    occlusion: str = "off"
    """'mask' if the model was trained with guidance that fades out; see `UpscaleOptions.occlusion`."""
    centred_flow: bool = False
    """Whether estimated flow, but not the caller's, compensates for the shift of `warp`, as in training."""
