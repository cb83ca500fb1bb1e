"""Whether a checkpoint folder is complete, told without loading a weight."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ModelNotFoundError, StreamDiffVSRError
from ...files import keep_json, read_json
from ...weights.folders import user_cache
from ...weights.networks import Shapes, check_keys, shapes_of
from .build import build, named_for
from .parts import (
    CONFIG,
    INDEX,
    NETWORKS,
    REMEDY,
    SCHEDULER_CONFIG,
    TEXT_ENCODER,
    TOKENIZER,
    Part,
    open_part,
    require,
)
from .prompt import FILE, PromptEmbeddings, token_ids
from .recognise import name_foreign
from .traits import Traits

log = logging.getLogger(__name__)

NeededShapes = Callable[[Part], Shapes]
"""What the network of a part needs, by its configuration."""


def problem(folder: Path) -> StreamDiffVSRError | None:
    """Why a folder is no complete checkpoint; None where it is one."""
    try:
        check(folder)
    except StreamDiffVSRError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{folder} cannot be read ({error}); check its permissions.")
    return None


def check(folder: Path) -> None:
    """Compare configurations, headers, names and shapes of every part.

    Raises `ModelNotFoundError` or `CheckpointError`, naming the file and what to do, for the first part
    that is not whole.
    """
    check_networks(folder, remembered_shapes)
    check_text(folder, remembered_shapes)


def check_networks(folder: Path, needed_shapes: NeededShapes) -> list[Part]:
    """The networks' parts, checked before any of them is loaded."""
    if not folder.is_dir():
        raise ModelNotFoundError("checkpoint", folder, "Name a checkpoint folder, 'nano' or 'v1'.")
    parts = [open_part(folder, name) for name in NETWORKS]
    for part in parts:
        check_part(part, needed_shapes)
    require(folder / SCHEDULER_CONFIG, "scheduler")
    read_json(folder / SCHEDULER_CONFIG)
    default_flow(folder)
    return parts


def check_part(part: Part, needed_shapes: NeededShapes) -> None:
    """One part: whole files, of this model, that fit their configuration."""
    foreign = name_foreign(part)
    if foreign:
        raise CheckpointError(
            f"{part.path} is {foreign}, not Stream-DiffVSR's {part.name}: point to the folder of the "
            "Stream-DiffVSR weights."
        )
    needed = needed_shapes(part)
    check_keys(part.path, named_for(part, part.shapes, needed), needed)


def check_text(folder: Path, needed_shapes: NeededShapes) -> None:
    """The embedding of the empty prompt, or all that makes it."""
    width = read_json(folder / NETWORKS[0] / CONFIG).get("cross_attention_dim")
    prompts = PromptEmbeddings(folder, user_cache())
    if prompts.has(""):
        check_width(width, prompts.get("").shape[-1], folder / FILE)
        return
    for name in (TEXT_ENCODER, TOKENIZER):
        if not (folder / name).is_dir():
            file = CONFIG if name == TEXT_ENCODER else "tokenizer_config.json"
            raise ModelNotFoundError(
                f"{name} (nor {FILE} with the embedding of the empty prompt)", folder / name / file, REMEDY
            )
    encoder = open_part(folder, TEXT_ENCODER)
    check_part(encoder, needed_shapes)
    token_ids(folder / TOKENIZER, "", encoder.config.get("max_position_embeddings", 77))
    check_width(width, encoder.config.get("hidden_size"), encoder.config_path)


def check_width(needed: object, got: object, path: Path) -> None:
    """Prompt embeddings are as wide as the U-Net's attention to them."""
    if needed != got:
        raise CheckpointError(
            f"{path} is of width {got}, but the U-Net needs prompt embeddings of width {needed}: it belongs "
            "to another model."
        )


def default_flow(folder: Path) -> str:
    """The estimator that a checkpoint names for itself, else RAFT large, as the reference has."""
    return read_index(folder).get("flow", "raft_large")


def traits(folder: Path) -> Traits:
    """What a checkpoint's index says of how it was trained; raises `CheckpointError`."""
    index = read_index(folder)
    known = {each.name: index[each.name] for each in fields(Traits) if each.name in index}
    for name, value in known.items():
        if type(value) is not type(getattr(Traits(), name)):
            raise CheckpointError(f"{folder / INDEX} has {name} {value!r}, which is not what it takes.")
    return Traits(**known)


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder's index says; nothing where there is none."""
    index = folder / INDEX
    return read_json(index) if index.is_file() else {}


def remembered_shapes(part: Part) -> Shapes:
    """What the network of a part needs, from a small file once it was worked out.

    Working it out imports diffusers, which takes seconds: too long each time a list of models is shown.
    """
    content = json.dumps([part.name, part.config, version("diffusers"), version("transformers")])
    path = user_cache() / f"shapes-{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"
    try:
        return {key: tuple(shape) for key, shape in read_json(path).items()}
    except CheckpointError:
        shapes = shapes_of(build(part))
    keep_json(path, shapes)
    return shapes
