"""Recognise a Stream-DiffVSR folder, list the files that it needs, and open it as a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelNotFoundError
from ...files import fingerprint, read_json
from ...flow import open_flow
from ...flow.open import open_flow_network
from ...weights.folders import user_cache
from ...weights.networks import Shapes, shapes_of
from .check import check_networks, check_text, default_flow, problem, remembered_shapes, traits
from .components import (
    CONFIG,
    INDEX,
    NETWORKS,
    SCHEDULER_CONFIG,
    TEXT_ENCODER,
    TOKENIZER,
    Component,
    build,
    choose,
    fill,
    shards,
)
from .control import Control
from .pipeline import StreamDiffVSRPipeline
from .prompt import PromptEmbeddings

TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.json",
)  # fmt: skip


def recognise(folder: Path) -> bool:
    """Return whether a folder is meant to contain Stream-DiffVSR, judging by its contents."""
    return (folder / INDEX).is_file() or any((folder / name).is_dir() for name in NETWORKS)


def needed(names: Collection[str], folder: Path) -> list[str]:
    """Return the names of the published files that the model needs, with each part's best weights file."""
    text = not PromptEmbeddings(folder, user_cache()).has("")
    wanted = {INDEX, SCHEDULER_CONFIG.as_posix()}
    for part in [*NETWORKS, *([TEXT_ENCODER] if text else [])]:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        chosen = choose(inside, part)
        if chosen is None:
            raise CheckpointError(f"The published files contain no weights for {part}.")
        files = [CONFIG, chosen, *(shards(inside, chosen) if chosen.endswith(".json") else [])]
        wanted |= {f"{part}/{name}" for name in files}
    if text:
        wanted |= {f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES}
    return [name for name in names if name in wanted]


def lacks_text_only(folder: Path) -> bool:
    """Return whether only the text encoder or the tokenizer is missing."""
    error = problem(folder)
    return isinstance(error, ModelNotFoundError) and error.component.startswith((TEXT_ENCODER, TOKENIZER))


def open_diffvsr(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    flow: str | Callable[[Tensor, Tensor], Tensor],
    flow_folders: Iterable[Path],
) -> StreamDiffVSRPipeline:
    """Load a checkpoint folder strictly, placing each weight directly on its device in its number format.

    `flow_folders` are additional folders to search for RAFT's weights. Raises `ModelNotFoundError` or
    `CheckpointError`.
    """
    networks, prompts = _Networks(), PromptEmbeddings(folder, user_cache())
    with torch.inference_mode(False):
        parts = check_networks(folder, networks.shapes)
        check_text(folder, remembered_shapes)
        # Done before loading the networks, so that the text encoder is no longer in memory by then.
        prompts.get("")
        filled = {part.name: fill(networks[part.name], part, device, dtype) for part in parts}
        chosen_flow = default_flow(folder) if flow == "auto" else flow
        raft_folders = [folder, folder.parent, *flow_folders]
        estimator = open_flow(chosen_flow, partial(open_flow_network, folders=raft_folders)).to(device)
    return StreamDiffVSRPipeline(
        unet=filled["unet"],
        control=Control(filled["controlnet"]),
        vae=filled["vae"],  # type: ignore[arg-type]
        flow=estimator,
        prompts=prompts,
        scheduler_config=read_json(folder / SCHEDULER_CONFIG),
        device=device,
        dtype=dtype,
        model=fingerprint(file for part in parts for file in part.files),
        traits=traits(folder),
    )


class _Networks(dict[str, torch.nn.Module]):
    """Networks built without weights; they are compared with their files before the weights are loaded."""

    def shapes(self, part: Component) -> Shapes:
        self[part.name] = build(part)
        return shapes_of(self[part.name])
