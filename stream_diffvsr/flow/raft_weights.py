"""RAFT with torchvision's weights from a models folder, ComfyUI's folder, torch's hub cache or a download."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelNotFoundError
from ..files import read_weights
from ..weights.networks import check_keys, empty, shapes_of

RAFT = {"raft_large": "Raft_Large_Weights", "raft_small": "Raft_Small_Weights"}
"""torchvision's enumeration of the weights for each estimator; the reference uses its DEFAULT member."""

FOLDER = "flow"
"""Subfolder of a models folder that may contain RAFT's weights in a .safetensors or .pth file."""

SHARED_FOLDER = "optical_flow"
"""ComfyUI's folder for flow weights of any kind, either inside a models folder or next to it."""

SUFFIXES = (".safetensors", ".pth")


def open_raft(name: str, folders: Iterable[Path] = ()) -> nn.Module:
    """Return torchvision's network with its weights, on the CPU.

    Searches `flow/` in each folder, `optical_flow/` in and next to each folder, and torch's hub cache; if the
    weights are in none of them, downloads them. Raises `ModelNotFoundError` or `CheckpointError`.
    """
    return load_raft(name, find_raft(name, folders) or download_raft(name))


def load_raft(name: str, path: Path) -> nn.Module:
    """Return the network with weights read from a file. Raises `CheckpointError` if the file is damaged."""
    from torchvision.models import optical_flow

    network = empty(lambda: getattr(optical_flow, name)(weights=None, progress=False))
    weights = read_raft(path)
    check_keys(path, {key: tuple(value.shape) for key, value in weights.items()}, shapes_of(network))
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False)


def find_raft(name: str, folders: Iterable[Path] = ()) -> Path | None:
    """Return an existing file with RAFT's weights, or None if there is none."""
    folders = list(folders)
    own = _files((folder / FOLDER for folder in folders), name)
    if own:
        return own[0]
    published = hub_file(name)  # imports torchvision
    shared = [place / SHARED_FOLDER for folder in folders for place in (folder, folder.parent)]
    # Other programs store other versions of RAFT there, so accept only torchvision's file name or its start.
    known = [path for path in _files(shared, name) if published.stem.startswith(path.stem)]
    return next((path for path in [*known, published] if path.is_file()), None)


def _files(folders: Iterable[Path], name: str) -> list[Path]:
    here = [path for folder in folders for path in sorted(folder.glob(f"{name}*"))]
    return [path for path in here if path.suffix in SUFFIXES and path.is_file()]


def hub_file(name: str) -> Path:
    """Return the path at which torchvision stores the weights that it downloads."""
    return Path(torch.hub.get_dir(), "checkpoints", _weights(name).url.rpartition("/")[2])


def read_raft(path: Path) -> dict[str, Any]:
    """Read a file's weights, after checking its SHA-256 against the digits in its name, if any."""
    prefix = _hash_prefix(path)
    if prefix and not _digest(path).startswith(prefix):
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged: its SHA-256 does not begin with "
            f"{prefix}, the digits in its name; delete the file, and it will be downloaded again."
        )
    return read_weights(path)


def download_raft(name: str) -> Path:
    """Download torchvision's weights file and check its hash, without unpickling it."""
    from ..weights.fetch import offline

    weights, path = _weights(name), hub_file(name)
    try:
        if offline():
            raise OSError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(path), _hash_prefix(path), progress=False)
    except (OSError, RuntimeError) as error:
        raise ModelNotFoundError(
            f"flow weights of {name}",
            path,
            f"They could not be downloaded ({error}): save {weights.url} there or in the subfolder "
            f"'{FOLDER}' of a models folder, or choose another flow ('dis' needs no weights).",
        ) from error
    return path


def _weights(name: str) -> Any:
    from torchvision.models import optical_flow

    return getattr(optical_flow, RAFT[name]).DEFAULT


def _hash_prefix(path: Path) -> str | None:
    """Return the first digits of the file's SHA-256 if its name contains them, else None."""
    found = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    return found[1] if found else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
