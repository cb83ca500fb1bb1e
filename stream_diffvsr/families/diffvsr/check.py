"""Check that a checkpoint folder is complete and belongs to this model, without loading any weights.

Weights of other models are recognised by keys and shapes, never by file names.
"""

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
from .components import (
    CONFIG,
    INDEX,
    NETWORKS,
    REMEDY,
    SCHEDULER_CONFIG,
    TEXT_ENCODER,
    TOKENIZER,
    Component,
    Traits,
    build,
    named_for,
    open_component,
    require,
)
from .prompt import FILE, PromptEmbeddings, token_ids

log = logging.getLogger(__name__)

NeededShapes = Callable[[Component], Shapes]
"""A function that returns the weight shapes that a part's configuration requires."""


LATENT, LATENT_AND_LQ, LATENT_AND_MASK = 4, 7, 9
"""Input channels of U-Nets for generation, for generation from a picture (as here), and for inpainting."""

FAMILIES = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""Model families by the width of the prompt embeddings in their attention layers."""

SINGLE_FILE = ("model.diffusion_model.", "control_model.", "first_stage_model.")


def problem(folder: Path) -> StreamDiffVSRError | None:
    """Return why a folder is not a complete checkpoint, or None if it is one."""
    try:
        check(folder)
    except StreamDiffVSRError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{folder} cannot be read ({error}); check its permissions.")
    return None


def check(folder: Path) -> None:
    """Check the configuration, headers, names and shapes of every part.

    Raises `ModelNotFoundError` or `CheckpointError`, which name the file and the remedy, for the first part
    that is incomplete or wrong.
    """
    check_networks(folder, remembered_shapes)
    check_text(folder, remembered_shapes)


def check_networks(folder: Path, needed_shapes: NeededShapes) -> list[Component]:
    """Check the parts of all networks before any of them is loaded, and return the parts."""
    if not folder.is_dir():
        raise ModelNotFoundError("checkpoint", folder, "Choose 'nano', 'v1' or a checkpoint folder.")
    parts = [open_component(folder, name) for name in NETWORKS]
    for part in parts:
        check_component(part, needed_shapes)
    require(folder / SCHEDULER_CONFIG, "scheduler")
    read_json(folder / SCHEDULER_CONFIG)
    default_flow(folder)
    return parts


def check_component(part: Component, needed_shapes: NeededShapes) -> None:
    """Check that the files of one part are complete, belong to this model and fit their configuration."""
    foreign = name_foreign(part)
    if foreign:
        raise CheckpointError(
            f"{part.path} is {foreign}, not Stream-DiffVSR's {part.name}: choose the folder that contains "
            "the Stream-DiffVSR weights."
        )
    needed = needed_shapes(part)
    check_keys(part.path, named_for(part, part.shapes, needed), needed)


def check_text(folder: Path, needed_shapes: NeededShapes) -> None:
    """Check the embedding of the empty prompt or, if there is none, the files needed to compute it."""
    width = read_json(folder / NETWORKS[0] / CONFIG).get("cross_attention_dim")
    prompts = PromptEmbeddings(folder, user_cache())
    if prompts.has(""):
        check_width(width, prompts.get("").shape[-1], folder / FILE)
        return
    for name in (TEXT_ENCODER, TOKENIZER):
        if not (folder / name).is_dir():
            file = CONFIG if name == TEXT_ENCODER else "tokenizer_config.json"
            raise ModelNotFoundError(
                f"{name} (or {FILE} with the embedding of the empty prompt)", folder / name / file, REMEDY
            )
    encoder = open_component(folder, TEXT_ENCODER)
    check_component(encoder, needed_shapes)
    token_ids(folder / TOKENIZER, "", encoder.config.get("max_position_embeddings", 77))
    check_width(width, encoder.config.get("hidden_size"), encoder.config_path)


def check_width(needed: object, got: object, path: Path) -> None:
    """Check that prompt embeddings have the width that the U-Net's attention needs."""
    if needed != got:
        raise CheckpointError(
            f"{path} has width {got}, but the U-Net needs prompt embeddings of width {needed}: the file "
            "belongs to another model."
        )


def default_flow(folder: Path) -> str:
    """Return the flow estimator named in a checkpoint's index, or RAFT large, as in the reference."""
    return read_index(folder).get("flow", "raft_large")


def traits(folder: Path) -> Traits:
    """Return the traits recorded in a checkpoint's index; raise `CheckpointError` for an invalid value."""
    index = read_index(folder)
    known = {each.name: index[each.name] for each in fields(Traits) if each.name in index}
    for name, value in known.items():
        if type(value) is not type(getattr(Traits(), name)):
            raise CheckpointError(f"{folder / INDEX} contains an invalid {name}: {value!r}.")
    return Traits(**known)


def read_index(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's index, or an empty dict if there is none."""
    index = folder / INDEX
    return read_json(index) if index.is_file() else {}


def remembered_shapes(part: Component) -> Shapes:
    """Return the shapes that a part's network needs, cached in a small file after the first call.

    Computing them imports diffusers, which takes several seconds and would slow down every listing of models.
    """
    content = json.dumps([part.name, part.config, version("diffusers"), version("transformers")])
    path = user_cache() / f"shapes-{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"
    try:
        return {key: tuple(shape) for key, shape in read_json(path).items()}
    except CheckpointError:
        shapes = shapes_of(build(part))
    keep_json(path, shapes)
    return shapes


def name_foreign(part: Component) -> str:
    """Describe a part's weights if they belong to another model; return '' if they may be this model's."""
    shapes = part.shapes
    if any(key.startswith(SINGLE_FILE) for key in shapes):
        return "a Stable Diffusion checkpoint in single-file layout"
    if part.name == "vae":
        return _autoencoder(shapes)
    return "" if part.name == TEXT_ENCODER else _diffusion(part, shapes)


def _diffusion(part: Component, shapes: Shapes) -> str:
    """Describe a U-Net or ControlNet of another model; return '' if it may be this model's."""
    classes = shapes.get("class_embedding.weight")
    if classes or part.config.get("num_class_embeds"):
        count = classes[0] if classes else part.config["num_class_embeds"]
        return f"the {part.name} of a plain Stable Diffusion x4 upscaler (num_class_embeds {count})"
    first = shapes.get("conv_in.weight", (0, LATENT_AND_LQ))
    channels = first[1] if len(first) > 1 else LATENT_AND_LQ
    if channels not in (LATENT, LATENT_AND_MASK):
        return _swapped(part, shapes)
    family = FAMILIES.get(_prompt_width(shapes), "another diffusion model")
    kind = "ControlNet" if _is_controlnet(shapes) else "inpainting U-Net" if channels > LATENT else "U-Net"
    return f"a {family} {kind}"


def _swapped(part: Component, shapes: Shapes) -> str:
    if _is_controlnet(shapes) != (part.name == "controlnet") and "conv_in.weight" in shapes:
        return "a ControlNet" if part.name == "unet" else "a U-Net"
    return ""


def _is_controlnet(shapes: Shapes) -> bool:
    return "controlnet_cond_embedding.conv_in.weight" in shapes


def _prompt_width(shapes: Shapes) -> int:
    return next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)


def _autoencoder(shapes: Shapes) -> str:
    if "decoder.conv_in.weight" in shapes:
        return "the autoencoder of a plain Stable Diffusion model (AutoencoderKL)"
    if "decoder.layers.0.weight" in shapes and not any(".temporal_processor." in key for key in shapes):
        return "a tiny autoencoder without the Temporal Processor Module"
    return ""
