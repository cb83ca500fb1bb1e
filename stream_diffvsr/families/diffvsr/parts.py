"""The parts of a checkpoint folder: which files hold each, and what they say about themselves."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ModelNotFoundError
from ...files import read_json, read_shapes, read_weights

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
"""Names under which weights are published, best first: full before half, one file before several."""

REMEDY = "Copy it there, or let 'stream-diffvsr download' fetch the released folder."


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint folder, on the disk."""

    name: str
    config: dict[str, Any]
    config_path: Path
    path: Path
    """The file of weights, or the index of several."""
    files: tuple[Path, ...]
    """All files that hold weights."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What the weights are called, and their shapes; raises `CheckpointError` for a damaged file."""
        return {key: shape for path in self.files for key, shape in read_shapes(path).items()}

    def weights(self) -> dict[str, Tensor]:
        """The weights, mapped from their files."""
        return {key: value for path in self.files for key, value in read_weights(path).items()}


def open_part(folder: Path, name: str) -> Part:
    """A network's configuration and files.

    Raises `ModelNotFoundError` naming what is missing, or `CheckpointError` for a file that is damaged.
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
    return Part(name, read_json(config_path), config_path, path, _files(path, name))


def choose(present: Collection[str], name: str) -> str | None:
    """The best of a part's published forms among the names in its folder; None where there is none."""
    stems = STEMS.get(name, NETWORK_STEMS)
    names = [form.format(stem=stem) for form in FORMS for stem in stems]
    return next((candidate for candidate in names if candidate in present), None)


def shards(present: Collection[str], index: str) -> list[str]:
    """Names of the files that belong to an index, told by their names: stem-00001-of-00002.safetensors."""
    stem, kind, variant = re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\..+)?\.json", index).groups()  # type: ignore[union-attr]
    pattern = re.compile(rf"{re.escape(stem)}{re.escape(variant or '')}-\d+-of-\d+\.{kind}")
    return sorted(name for name in present if pattern.fullmatch(name))


def require(path: Path, name: str) -> None:
    """Raise `ModelNotFoundError` unless the file is there."""
    if path.is_file():
        return
    where = f" (a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
    raise ModelNotFoundError(f"checkpoint part {name}{where}", path, REMEDY)


def _files(path: Path, name: str) -> tuple[Path, ...]:
    if path.suffix != ".json":
        return (path,)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} names no files of weights; fetch the file again.")
    # Names only: an index never leads out of its folder.
    files = [path.parent / Path(str(file)).name for file in sorted(set(places.values()))]
    for file in files:
        require(file, name)
    return tuple(files)
