"""Recognise and check the files of single-image models, and open them as upscalers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...devices import resolve_device, resolve_dtype
from ...errors import CheckpointError, ModelNotFoundError, StreamDiffVSRError
from ...files import fingerprint, read_pickled, read_shapes, read_tensors
from ...flow.open import open_bundled
from .method import ImageModel
from .network import CHANNELS, ImageNetwork

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")

SCALES = range(1, 9)

OTHER_USE = {
    "LaMa": "fills in masked parts",
    "GFPGAN": "needs aligned faces",
    "RestoreFormer": "needs aligned faces",
}
"""Architectures in spandrel that cannot upscale or restore a whole frame, with the reason for each."""


def recognise(path: Path) -> bool:
    """Return whether a file may contain a single-image model, judging by its name."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def architecture(path: str | Path) -> str:
    """Detect a file's architecture from its weights' names and shapes, without reading their values.

    Raises `ModelNotFoundError` if the file is missing, or `CheckpointError` if it contains no model of this
    family.
    """
    path = Path(path)
    _check_name(path)
    return _architecture(path, _read(path, "meta"))


def problem(path: Path) -> StreamDiffVSRError | None:
    """Return why a file cannot be opened, or None if the names and shapes of its weights fit a model."""
    try:
        architecture(path)
    except (CheckpointError, ModelNotFoundError) as error:
        return error
    return None


def open_image_model(
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ImageModel:
    """Load a model file; if the model does not support half precision, log a warning and use float32.

    Raises `ModelNotFoundError`, `CheckpointError` or, for an invalid device or dtype,
    `IncompatibleInputError`.
    """
    from spandrel import MAIN_REGISTRY, ImageModelDescriptor

    path, device = Path(path), resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    _check_name(path)
    with torch.inference_mode(False):
        weights = _read(path, "cpu")
        name = _architecture(path, weights)
        try:
            descriptor = MAIN_REGISTRY.load(weights)
        except Exception as error:  # each architecture infers its settings from the weights differently
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise CheckpointError(
                f"{path} looks like {name} but cannot be loaded as such ({reason}): the file is damaged, or "
                "newer than the installed spandrel."
            ) from error
        channels = descriptor.input_channels, descriptor.output_channels
        if not isinstance(descriptor, ImageModelDescriptor) or channels not in CHANNELS:
            raise CheckpointError(
                f"{path} ({name}) takes {channels[0]} channels and returns {channels[1]}; choose a model "
                "for colour or greyscale pictures."
            )
        if descriptor.scale not in SCALES:
            raise CheckpointError(
                f"{path} ({name}) has scale {descriptor.scale}; choose a model with a scale from 1 to 8."
            )
        if {torch.float16: descriptor.supports_half, torch.bfloat16: descriptor.supports_bfloat16}.get(
            dtype, True
        ) is False:
            log.warning("%s does not support %s; it runs in float32", name, str(dtype).removeprefix("torch."))
            dtype = torch.float32
        network = ImageNetwork(descriptor).to(device, dtype).eval().requires_grad_(False)
        flow = open_bundled().to(device)
    return ImageModel(network, flow, device, dtype, fingerprint([path]))


def _check_name(path: Path) -> None:
    if not path.is_file():
        raise ModelNotFoundError("single-image model", path, "Check the path.")
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path} is not a model file: its name must end in {', '.join(SUFFIXES)}.")


def _read(path: Path, device: str) -> dict[str, Any]:
    """Return the weights by name, without wrappers added in training; on 'meta', without their values."""
    from spandrel import canonicalize_state_dict

    if path.suffix.lower() != ".safetensors":
        weights = read_pickled(path, device)
    elif device == "meta":
        weights = {name: torch.empty(shape, device=device) for name, shape in read_shapes(path).items()}
    else:
        weights = read_tensors(path)[0]
    weights = canonicalize_state_dict(weights) if isinstance(weights, dict) else {}
    return {name: value for name, value in weights.items() if isinstance(name, str)}


def _architecture(path: Path, weights: dict[str, Any]) -> str:
    from spandrel import MAIN_REGISTRY

    for each in MAIN_REGISTRY.architectures("detection"):
        if each.detect(weights):
            if use := OTHER_USE.get(each.architecture.id):
                raise CheckpointError(f"{path} ({each.architecture.name}) {use}; choose an upscaling model.")
            return each.architecture.name
    raise CheckpointError(
        f"{path} contains no super-resolution or restoration model that spandrel supports; choose another "
        "file."
    )
