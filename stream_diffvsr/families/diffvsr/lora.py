"""LoRA: low-rank changes to a checkpoint's layers, read from one file and merged into copies of these layers.

A file contains `PART.LAYER.lora_A.weight` (rank, in, ...) and `PART.LAYER.lora_B.weight` (out, rank, ...),
with diffusers' names for parts and layers. A layer's weight becomes W + strength * alpha / rank * B A. The
metadata contains the fingerprint of the weights that the LoRA was trained for (`base`), `rank`, `alpha`, and
further information for human readers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, IncompatibleInputError, ModelNotFoundError
from ...files import fingerprint, read_metadata, read_tensors, save_tensors
from ...tensors import is_finite
from .networks import TorchNetworks

FORMAT = "stream-diffvsr-lora-1"
PARTS = ("unet", "controlnet", "vae")
EMBEDDING, A, B = "controlnet_cond_embedding.", ".lora_A.weight", ".lora_B.weight"
STRONGEST = 2.0

LowRank = tuple[Tensor, Tensor]
"""The matrices A (rank, in, ...) and B (out, rank, ...) of one layer."""


@dataclass(frozen=True, eq=False)
class Lora:
    """The contents of a LoRA file, and the strength with which it is applied."""

    name: str
    fingerprint: str
    base: str
    """Fingerprint of the weights that the LoRA was trained for."""
    changes: Mapping[str, LowRank]
    """The changes by layer name."""
    scale: float
    """The factor alpha / rank."""
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:8]}) at {self.strength:g}"


def layers(networks: TorchNetworks) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield the layers that a LoRA can change, each with its name in diffusers."""
    for part, network in networks.stages().items():
        for name, layer in network.named_modules() if part in PARTS else ():
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                yield f"{part}.{diffusers_name(part, name)}", layer


def diffusers_name(part: str, name: str) -> str:
    """Return diffusers' name for a layer or weight of a part; `Control` splits the ControlNet in two."""
    if part != "controlnet":
        return name
    return (
        EMBEDDING + name[len("embedding.") :] if name.startswith("embedding.") else name.removeprefix("body.")
    )


def low_rank_product(change: LowRank, shape: torch.Size) -> Tensor:
    """Return the product B A in the shape of the layer's weight."""
    a, b = change
    return (b.flatten(1) @ a.flatten(1)).view(shape)


def read_lora(path: str | Path, strength: float = 1.0) -> Lora:
    """Read a LoRA file.

    Raises `ModelNotFoundError`, `CheckpointError`, or `IncompatibleInputError` for an invalid strength.
    """
    path = Path(path)
    if not (math.isfinite(strength) and abs(strength) <= STRONGEST):
        raise IncompatibleInputError(
            f"the strength of a LoRA must be from {-STRONGEST:g} to {STRONGEST:g}, not {strength}"
        )
    if not path.is_file():
        raise ModelNotFoundError("LoRA", path, "Check the path.")
    tensors, told = read_tensors(path)
    if told.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not made by 'stream-diffvsr train': LoRAs for Stable Diffusion 2 and other "
            "models do not work with this model."
        )
    found: dict[str, LowRank] = {}
    for name in {key.removesuffix(A).removesuffix(B): None for key in tensors}:
        if not {name + A, name + B} <= tensors.keys():
            raise CheckpointError(
                f"{path} is damaged: {name} lacks one of its matrices; copy the file again."
            )
        found[name] = tensors[name + A].float(), tensors[name + B].float()
    if bad := next((name for name, pair in found.items() if not all(map(is_finite, pair))), None):
        raise CheckpointError(f"{path} contains NaN or infinite values in {bad}; train the LoRA again.")
    try:
        scale = float(told["alpha"]) / int(told["rank"])
        if not math.isfinite(scale):
            raise ValueError("alpha is not finite")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its rank and alpha are missing or invalid ({error}); copy the file again."
        ) from error
    return Lora(path.name, fingerprint([path]), told.get("base", ""), found, scale, float(strength))


def is_lora(path: Path) -> bool:
    """Return whether a file's metadata identifies a LoRA for `read_lora`; its tensors are not checked."""
    try:
        return path.suffix == ".safetensors" and read_metadata(path).get("format") == FORMAT
    except CheckpointError:
        return False


def write_lora(path: Path, changes: Mapping[str, LowRank], told: Mapping[str, str]) -> None:
    """Write a file that `read_lora` can read; its metadata `told` contains at least base, rank and alpha."""
    tensors = {name + end: x.detach().cpu().contiguous()
               for name, pair in changes.items() for end, x in zip((A, B), pair, strict=True)}  # fmt: skip
    save_tensors(path, tensors, {**told, "format": FORMAT})


def merge_loras(networks: TorchNetworks, model: str, loras: Sequence[Lora]) -> TorchNetworks:
    """Return networks with all these LoRAs merged into copies of the layers they change; the rest is shared.

    `model` is the fingerprint of `networks`. Raises `IncompatibleInputError` for a LoRA of another model.
    """
    known, deltas = dict(layers(networks)), dict[str, Tensor]()
    for lora in loras:
        if lora.base != model:
            raise IncompatibleInputError(
                f"{lora.name} was trained for another model ({lora.base[:8] or 'unknown'}), not for this one "
                f"({model[:8]})",
            )
        for name, (a, b) in lora.changes.items():
            shape = known[name].weight.shape if name in known else torch.Size()
            fits = a.shape[1:] == shape[1:] and b.flatten(1).shape == (*shape[:1], len(a))
            if name not in known or not fits:
                raise CheckpointError(f"{lora.name} does not fit this model's layers, for example {name}.")
            device = known[name].weight.device
            delta = lora.strength * lora.scale * low_rank_product((a.to(device), b.to(device)), shape)
            deltas[name] = deltas[name] + delta if name in deltas else delta
    parts = {name.partition(".")[0] for name in deltas}
    with torch.inference_mode(False), torch.no_grad():  # the weights outlive the caller's inference mode
        changed = {id(known[name].weight): nn.Parameter((known[name].weight.float() + delta)
                   .to(known[name].weight.dtype), False) for name, delta in deltas.items()}  # fmt: skip
        own: dict[str, Any] = {part: copy_with(getattr(networks, part), changed) for part in parts}
    return replace(networks, **own)


def copy_with(network: nn.Module, changed: Mapping[int, nn.Parameter]) -> nn.Module:
    """Copy a network but share its weights, except those that `changed` maps, by id, to new weights."""
    memo: dict[int, Any] = {
        id(x): changed.get(id(x), x) for x in chain(network.parameters(), network.buffers())
    }
    return copy.deepcopy(network, memo)


def merged_fingerprint(model: str, loras: Sequence[Lora]) -> str:
    """Return the fingerprint of a model with LoRAs merged into it."""
    if not loras:
        return model
    facts = [model, *([lora.fingerprint, lora.strength] for lora in loras)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
