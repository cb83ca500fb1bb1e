"""FlashVSR's files: their names, their contents, and the networks loaded from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, IncompatibleInputError, ModelNotFoundError, StreamDiffVSRError
from ...files import fingerprint, read_json, read_shapes, read_weights
from ...weights.networks import Shapes, check_keys, shapes_of
from ..wan.transformer import transformer
from .decoders import TinyDecoder
from .method import FlashVSR
from .projection import V11, VERSIONS, Projection
from .transformer import prepare

TRANSFORMER, PROJECTION, TINY, FULL, PROMPT = "transformer", "projection", "tiny", "full", "prompt"

RENAMED = "FlashVSR1_1.safetensors"
"""Name of v1.1's transformer file in copies of the weights; no other file name reveals the version."""

FILES = {
    TRANSFORMER: (
        "diffusion_pytorch_model_streaming_dmd.safetensors",
        RENAMED,
        "FlashVSR.safetensors",
    ),
    PROJECTION: (
        "LQ_proj_in.ckpt",
        "LQ_proj_in.safetensors",
        "Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors",
    ),
    TINY: ("TCDecoder.ckpt", "TCDecoder.safetensors"),
    FULL: ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"),
    PROMPT: ("posi_prompt.pth", "posi_prompt.safetensors", "Prompt.safetensors"),
}
"""File names by part: the published name first, then the names used in copies of the weights."""

HEAD = 128
"""Channels per head, unless the folder's config.json specifies the number of heads."""

MERGED = "LQ_proj_in."
"""Prefix of the projection's weights in copies that store them in the transformer's file."""


def find(folder: Path, part: str) -> Path | None:
    """Return the path of a part's file, or None if it is missing."""
    return next((path for name in FILES[part] if (path := folder / name).is_file()), None)


def version_of(folder: Path) -> str | None:
    """Return the version if a file name reveals it, or else None."""
    return V11 if (folder / RENAMED).is_file() else None


def recognise(folder: Path) -> bool:
    """Return whether a folder seems, by a file name, to contain FlashVSR's transformer or projection."""
    return find(folder, TRANSFORMER) is not None or find(folder, PROJECTION) is not None


def problem(folder: Path) -> StreamDiffVSRError | None:
    """Return the error that prevents a folder from being opened, or None if its files are valid."""
    try:
        _read(folder, VERSIONS[0])
    except StreamDiffVSRError as error:
        return error
    return None


def needed(names: Collection[str], folder: Path) -> list[str]:
    """Return the published `names` that are needed to run the model; the prompt is published elsewhere."""
    chosen = [next((name for name in FILES[part] if name in names), None) for part in FILES]
    return [name for name in chosen if name]


@dataclass(frozen=True)
class _Part:
    """A network without weights, the file to load them from, and a function that renames them."""

    network: nn.Module
    path: Path
    rename: Callable[[dict[str, Any]], dict[str, Any]]


def open_flashvsr(
    folder: str | Path,
    version: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> FlashVSR:
    """Load a folder, placing each weight directly on its device in its number format.

    `version` is 'v1' or 'v1.1'; the published files do not reveal it. Raises `IncompatibleInputError`,
    `ModelNotFoundError` or `CheckpointError`.
    """
    if version not in VERSIONS:
        raise IncompatibleInputError(
            f"version must be 'v1' or 'v1.1', not {version!r}: FlashVSR's files do not reveal it; "
            "alternatively, rename the folder to flashvsr-v1 or flashvsr-v1.1"
        )
    folder = Path(folder)
    if version_of(folder) not in (None, version):
        raise IncompatibleInputError(f"{folder / RENAMED} is a file of version 'v1.1', not {version!r}")
    parts, prompt = _read(folder, version), read_prompt(folder)
    networks = {name: _fill(part, device, dtype) for name, part in parts.items()}
    paths = dict.fromkeys([*(part.path for part in parts.values()), _required(folder, PROMPT)])
    return FlashVSR(
        networks=networks,
        prompt=prompt.to(device, dtype),
        device=device,
        dtype=dtype,
        model=f"{fingerprint(paths)}-{version}",
    )


def read_prompt(folder: Path) -> Tensor:
    """Return the prompt's embedding, (1, tokens, width); raise `CheckpointError` if it is damaged."""
    path = _required(folder, PROMPT)
    tensors = list(read_weights(path).values())
    if len(tensors) != 1 or tensors[0].ndim not in (2, 3):
        raise CheckpointError(f"{path} does not contain exactly one prompt embedding; download it again.")
    prompt = tensors[0] if tensors[0].ndim == 3 else tensors[0][None]
    if not bool(torch.isfinite(prompt).all()):
        raise CheckpointError(
            f"{path} contains NaN or infinite values, which would make every frame black; download it again."
        )
    return prompt


def build(shapes: Mapping[str, Shapes], version: str, head: int = HEAD) -> dict[str, nn.Module]:
    """Build the networks that the published names and shapes describe, on the meta device.

    Raises `KeyError`, `IndexError` or `ValueError` if these do not describe a network.
    """
    from accelerate import init_empty_weights

    with torch.inference_mode(False), init_empty_weights(include_buffers=False):
        return {name: _BUILD[name](of, version, head) for name, of in shapes.items()}


def _transformer(shapes: Shapes, version: str, head: int) -> nn.Module:
    width, channels, *patch = shapes["patch_embedding.weight"]
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": len(layers),
    }
    return prepare(transformer(config))


def _projection(shapes: Shapes, version: str, head: int) -> nn.Module:
    first, second, width = (shapes[f"{name}.weight"][0] for name in ("conv1", "conv2", "linear_layers.0"))
    return Projection(first, second, width, version)


def _tiny(shapes: Shapes, version: str, head: int) -> nn.Module:
    return TinyDecoder([shapes[f"decoder.{index}.weight"][0] for index in (1, 10, 16, 22)])


def _full(shapes: Shapes, version: str, head: int) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=shapes["encoder.conv1.weight"][0])


_BUILD = {TRANSFORMER: _transformer, PROJECTION: _projection, TINY: _tiny, FULL: _full}


def converted(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a file's weights from the published names to those that the network uses."""
    if name == TRANSFORMER:
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        return convert_wan_transformer_to_diffusers(dict(values))
    if name == FULL:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        return convert_wan_vae_to_diffusers(dict(values))
    return dict(values)


def _read(folder: Path, version: str) -> dict[str, _Part]:
    """Build all networks of a folder without weights, and check their names and shapes against the files."""
    paths = {name: _required(folder, name) for name in (TRANSFORMER, PROMPT)}
    merged = any(name.startswith(MERGED) for name in read_shapes(paths[TRANSFORMER]))
    paths[PROJECTION] = paths[TRANSFORMER] if merged else _required(folder, PROJECTION)
    decoders = {name: path for name in (TINY, FULL) if (path := find(folder, name))}
    paths |= decoders or {TINY: _required(folder, TINY)}
    read_prompt(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    parts = {}
    for name in (TRANSFORMER, PROJECTION, *decoders):
        path, own = paths[name], _own(name)
        shapes = own(read_shapes(path))
        try:
            width = shapes["patch_embedding.weight"][0] if name == TRANSFORMER else HEAD
            heads = config.get("num_heads") or width // HEAD
            network = build({name: shapes}, version, width // heads)[name]
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{path} is not FlashVSR's {name} ({error!r}); download it again."
            ) from error
        _compare(path, name, shapes, network)
        parts[name] = _Part(network, path, lambda values, name=name, own=own: converted(name, own(values)))
    return parts


def _own(name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a filter that keeps one network's entries, since copies may store two networks in one file."""

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        if name == TRANSFORMER:
            return {key: value for key, value in values.items() if not key.startswith(MERGED)}
        merged = {key[len(MERGED) :]: value for key, value in values.items() if key.startswith(MERGED)}
        return merged if name == PROJECTION and merged else dict(values)

    return own


def _compare(path: Path, name: str, shapes: Shapes, network: nn.Module) -> None:
    """Check that all names and shapes match; the error states the first difference."""
    got = {
        key: tuple(value.shape)
        for key, value in converted(
            name, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        ).items()
    }
    check_keys(path, got, shapes_of(network))


def _fill(part: _Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    values = part.rename(read_weights(part.path))
    part.network.load_state_dict({key: value.to(device, dtype) for key, value in values.items()}, assign=True)
    if hasattr(part.network, "encoder"):  # only the decoder of Wan's autoencoder is used
        part.network.encoder = part.network.quant_conv = nn.Identity()
    return part.network.to(device).eval().requires_grad_(False)


def _required(folder: Path, part: str) -> Path:
    path = find(folder, part)
    if path is None:
        names = " or ".join(FILES[part][:2])
        where = (
            "It is part of FlashVSR's code repository (examples/WanVSR/prompt_tensor)."
            if part == PROMPT
            else "It is published with FlashVSR's weights."
        )
        raise ModelNotFoundError(
            f"FlashVSR's {part}", folder / FILES[part][0], f"{where} Accepted file names: {names}."
        )
    return path
