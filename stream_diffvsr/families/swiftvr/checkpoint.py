"""SwiftVR's files: their names, their contents, and the networks loaded from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelNotFoundError, StreamDiffVSRError
from ...files import fingerprint, read_json, read_shapes, read_weights
from ...weights.networks import Shapes, check_keys, empty, shapes_of
from ..wan.transformer import transformer
from .autoencoder import Decoder, Encoder, converted
from .method import SwiftVR
from .transformer import WINDOW, prepare

TRANSFORMER, AUTOENCODER, PROMPT, CONFIG = "transformer", "autoencoder", "prompt", "transformer's config"

FILES = {
    TRANSFORMER: (
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.bin",
    ),
    AUTOENCODER: ("reae.safetensors",),
    PROMPT: ("prompt_embedding.safetensors",),
    CONFIG: ("transformer/config.json",),
}
"""File names by part: the published name first, then the name that diffusers uses for pickled weights."""

PROMPT_KEY = "prompt_emb"
WINDOW_KEY = "self_attn_window_hw"


def find(folder: Path, part: str) -> Path | None:
    """Return the file of a part, or None if it is missing."""
    return next((path for name in FILES[part] if (path := folder / name).is_file()), None)


def recognise(folder: Path) -> bool:
    """Return whether a folder has a file with the name of SwiftVR's autoencoder or prompt."""
    return find(folder, AUTOENCODER) is not None or find(folder, PROMPT) is not None


def problem(folder: Path) -> StreamDiffVSRError | None:
    """Return the error that prevents a folder from being opened, or None if its files are valid."""
    try:
        _read(folder)
    except StreamDiffVSRError as error:
        return error
    return None


def needed(names: Collection[str], folder: Path) -> list[str]:
    """Return those of the published `names` that are needed to run the model."""
    chosen = [next((name for name in FILES[part] if name in names), None) for part in FILES]
    return [name for name in chosen if name]


def open_swiftvr(folder: str | Path, device: torch.device, dtype: torch.dtype) -> SwiftVR:
    """Load a folder, placing each weight directly on its device in its number format.

    Raises `ModelNotFoundError` or `CheckpointError`.
    """
    folder = Path(folder)
    networks, prompt = _read(folder)
    paths = [_required(folder, part) for part in (TRANSFORMER, AUTOENCODER, PROMPT)]
    autoencoder = converted(read_weights(paths[1]))
    values = {name: _own(name, autoencoder) for name in ("encoder", "decoder")}
    values[TRANSFORMER] = read_weights(paths[0])
    for name, network in networks.items():
        filling = {key: value.to(device, dtype) for key, value in values.pop(name).items()}
        network.load_state_dict(filling, assign=True)
        network.to(device).eval().requires_grad_(False)
    return SwiftVR(
        networks=networks,
        prompt=prompt.to(device, dtype),
        device=device,
        dtype=dtype,
        model=fingerprint(paths),
    )


def build(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Build the networks without weights, from the autoencoder's shapes and the transformer's configuration.

    Raises `KeyError`, `IndexError`, `TypeError` or `ValueError` if these do not describe a network.
    """
    height, width = config.get(WINDOW_KEY) or WINDOW
    encoder = shapes["encoder.0.weight"][0], shapes["encoder.17.weight"][0]
    decoder = [shapes[f"decoder.{index}.weight"][0] for index in (1, 8, 14, 20)]
    channels = shapes["decoder.1.weight"][1]
    return {
        "encoder": empty(lambda: Encoder(*encoder)),
        TRANSFORMER: prepare(empty(lambda: transformer(config)), (height, width)),
        "decoder": empty(lambda: Decoder(decoder, channels)),
    }


def read_prompt(folder: Path) -> Tensor:
    """Return the prompt's embedding, (1, tokens, width), including any rows of zeros.

    Raises `CheckpointError` if the embedding is damaged or missing from the file.
    """
    path = _required(folder, PROMPT)
    prompt = read_weights(path).get(PROMPT_KEY)
    if prompt is None or prompt.ndim < 2 or not prompt.numel():
        raise CheckpointError(f"{path} contains no embedding named {PROMPT_KEY!r}; download it again.")
    prompt = prompt.reshape(-1, *prompt.shape[-2:])[:1]
    if not bool(torch.isfinite(prompt).all()):
        raise CheckpointError(
            f"{path} contains NaN or infinite values, which would make every frame black; download it again."
        )
    return prompt


def _read(folder: Path) -> tuple[dict[str, nn.Module], Tensor]:
    """Return a folder's networks, checked against the files but without weights, and its prompt."""
    paths = {part: _required(folder, part) for part in FILES}
    prompt, config, shapes = read_prompt(folder), read_json(paths[CONFIG]), read_shapes(paths[AUTOENCODER])
    try:
        networks = build(shapes, config)
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        got = {name: tuple(value.shape) for name, value in converted(meta).items()}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{paths[AUTOENCODER]} or {paths[CONFIG]} does not belong to SwiftVR ({error!r}); download both "
            "again."
        ) from error
    check_keys(paths[AUTOENCODER], got, shapes_of(networks["encoder"]) | shapes_of(networks["decoder"]))
    check_keys(paths[TRANSFORMER], read_shapes(paths[TRANSFORMER]), shapes_of(networks[TRANSFORMER]))
    network: Any = networks[TRANSFORMER]
    ends = network.config.in_channels, network.config.text_dim
    if ends != (shapes["encoder.17.weight"][0], prompt.shape[-1]):
        raise CheckpointError(
            f"{folder} mixes parts of several models: the transformer needs {ends[0]} channels and a prompt "
            f"of width {ends[1]}, but the other files provide {shapes['encoder.17.weight'][0]} and "
            f"{prompt.shape[-1]}."
        )
    return networks, prompt


def _own(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if key.startswith(f"{name}.")}


def _required(folder: Path, part: str) -> Path:
    path = find(folder, part)
    if path is None:
        remedy = "It is published with SwiftVR's weights (Hugging Face: H-oliday/SwiftVR)."
        raise ModelNotFoundError(f"SwiftVR's {part}", folder / FILES[part][0], remedy)
    return path
