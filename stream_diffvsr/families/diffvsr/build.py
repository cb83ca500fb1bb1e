"""Networks built without initial weights, and filled from files, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import CheckpointError
from ...weights.networks import Network, Shapes, check_keys, empty, place, shapes_of
from .parts import TEXT_ENCODER, Part
from .vae import TemporalAutoencoderTiny

BUFFERS = (".position_ids",)
"""Endings of keys that older files hold although they carry no weights."""

PREFIXES = {TEXT_ENCODER: "text_model."}
"""What keys begin with in files and in transformers 4, but not in transformers 5."""


def build(part: Part) -> nn.Module:
    """The network that a part's configuration describes, without weights; raises `CheckpointError`."""
    import_library(part.name)  # here, since a package that is missing or broken is not the checkpoint's fault
    try:
        return empty(lambda: from_config(part.name, part.config))
    except Exception as error:  # whatever the libraries make of a configuration that makes no sense
        raise CheckpointError(
            f"{part.config_path} describes no {part.name} that can be built ({error!r})."
        ) from error


def import_library(name: str) -> None:
    """Import what a network is built with; raises `ImportError` with the cause, which libraries bury.

    diffusers and transformers import each other, torchvision and torchaudio: any of them may be at fault.
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
    """The first error of a chain."""
    return cause(error.__cause__) if error.__cause__ else error


def from_config(name: str, config: dict[str, Any]) -> Any:
    """The network of that name in a checkpoint folder, with initial weights as its library sets them."""
    if name == "vae":
        return TemporalAutoencoderTiny(config)
    if name == TEXT_ENCODER:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**config))
    from diffusers import ControlNetModel, UNet2DConditionModel

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError("its picture must be in RGB order")
    return ControlNetModel.from_config(config)


def fill(network: Network, part: Part, device: torch.device, dtype: torch.dtype) -> Network:
    """Give a network without weights those of its part, in eval mode; raises `CheckpointError`.

    The files are mapped and go to the device one weight at a time, so no second copy of them is ever
    held. On a CPU, weights that have the right type already stay in the mapped file: they cost no memory
    of the process, and are loaded when first used.
    """
    needed = shapes_of(network)
    weights = named_for(part, part.weights(), needed)
    check_keys(part.path, named_for(part, part.shapes, needed), needed)
    placed = {key: place(value, device, dtype) for key, value in weights.items()}
    network.load_state_dict(placed, assign=True)
    return network.to(device).eval().requires_grad_(False)


Value = TypeVar("Value")


def named_for(part: Part, values: Mapping[str, Value], needed: Shapes) -> dict[str, Value]:
    """What a part's files hold, under the names of the installed library, without known buffers."""
    kept = {key: value for key, value in values.items() if not key.endswith(BUFFERS)}
    prefix = PREFIXES.get(part.name, "")
    if prefix and not any(key.startswith(prefix) for key in needed):
        return {key.removeprefix(prefix): value for key, value in kept.items()}
    return kept
