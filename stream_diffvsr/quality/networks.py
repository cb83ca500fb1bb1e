"""Measures that use trained networks: piq's LPIPS and DISTS, and RAFT's flow; users download the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ModelNotFoundError
from ..files import read_pickled
from ..flow import RaftFlow
from ..flow.raft_weights import load_raft
from .vgg import vgg_features

WEIGHTS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "lpips": "https://github.com/photosynthesis-team/photosynthesis.metrics/releases/download/v0.4.0/"
    "lpips_weights.pt",
    "dists": "https://github.com/photosynthesis-team/piq/releases/download/v0.4.1/dists_weights.pt",
    "raft_large": "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
}
"""What each file's name begins with, and where it can be downloaded."""

LAYERS = ("3", "8", "15", "22", "29")
CHANNELS = (64, 128, 256, 512, 512)
"""The last activation of each of VGG-16's five blocks, which LPIPS and DISTS compare."""


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks, on the CPU, and the names of the files with their weights."""

    lpips: nn.Module
    """Called with two pictures (1, 3, H, W) in [0, 1]; returns LPIPS with VGG-16 (Zhang et al. 2018)."""
    dists: nn.Module
    """Called likewise; returns DISTS (Ding et al. 2020)."""
    flow: RaftFlow
    files: dict[str, str]


def open_networks(folder: Path) -> Networks:
    """Open the networks with the weights in `folder`; nothing is downloaded.

    Raises `ModelNotFoundError` if a file is missing, `CheckpointError` if one contains other weights.
    """
    paths = _find(folder)
    # The measures share the convolutions, but DISTS replaces the pooling layers between them.
    features = vgg_features(paths["vgg16"])
    return Networks(
        lpips=import_piq().ContentLoss(
            features, LAYERS, _lpips_weights(paths["lpips"]), normalize_features=True
        ),
        dists=_dists(nn.Sequential(*features), _dists_weights(paths["dists"])),
        flow=RaftFlow(load_raft("raft_large", paths["raft_large"]), "raft_large"),
        files={name: path.name for name, path in paths.items()},
    )


def _find(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pt", ".pth"))
    found = {name: path for path in reversed(files) for name in WEIGHTS if path.name.startswith(name)}
    if missing := [name for name in WEIGHTS if name not in found]:
        raise ModelNotFoundError(
            f"weights of {', '.join(missing)}",
            folder,
            f"Download into this folder: {', '.join(WEIGHTS[name] for name in missing)}",
        )
    return found


def _lpips_weights(path: Path) -> list[Tensor]:
    weights = read_pickled(path)
    weights = list(weights) if isinstance(weights, (list, tuple)) else []
    _check(path, weights, CHANNELS)
    return [each.reshape(1, -1, 1, 1) for each in weights]


def _dists_weights(path: Path) -> list[Tensor]:
    """Return weights for the structure, then for the texture, of the picture and of each layer."""
    weights, counts = read_pickled(path), (3, *CHANNELS)
    kinds = [weights[kind] for kind in ("alpha", "beta") if isinstance(weights, dict) and kind in weights]
    _check(path, kinds, (sum(counts),) * 2)
    return [part for each in kinds for part in each.reshape(1, -1, 1, 1).split(counts, dim=1)]


def _check(path: Path, weights: list[Any], counts: tuple[int, ...]) -> None:
    if tuple(x.numel() if isinstance(x, Tensor) else -1 for x in weights) != counts:
        raise CheckpointError(f"{path} does not contain the weights that piq publishes under this name")


def _dists(features: nn.Sequential, weights: list[Tensor]) -> nn.Module:
    """Return piq's DISTS with these weights; its own constructor would download them."""
    piq = import_piq()

    class Dists(piq.DISTS):
        def __init__(self) -> None:
            piq.ContentLoss.__init__(
                self, features, LAYERS, weights, replace_pooling=True, allow_layers_weights_mismatch=True
            )

    return Dists()


def import_piq() -> ModuleType:
    """Return the package piq; raise `ModuleNotFoundError` with advice if it is not installed."""
    try:
        import piq
    except ImportError as error:
        raise ModuleNotFoundError(
            "measuring quality needs piq: pip install 'stream-diffvsr[quality]'"
        ) from error
    return piq
