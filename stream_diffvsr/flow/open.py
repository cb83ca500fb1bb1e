"""Load flow networks: nano's weights are in its folder, and RAFT's are found on disk or downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..errors import CheckpointError, ModelNotFoundError
from ..files import read_json, read_weights
from ..weights.folders import NANO
from ..weights.networks import check_keys, empty, shapes_of
from .bundled import FlowNetwork
from .raft_weights import open_raft

BUNDLED = NANO / "flow" / "model.safetensors"
"""The weights of nano's flow network; its configuration is in the same folder."""


def open_flow_network(name: str, folders: Iterable[Path] = ()) -> nn.Module:
    """Return a flow estimator's network, on the CPU; `folders` are searched for RAFT's weights."""
    return open_bundled() if name == "bundled" else open_raft(name, folders)


def open_bundled(path: Path = BUNDLED) -> FlowNetwork:
    """Return nano's own network, in float32. Raises `ModelNotFoundError` or `CheckpointError`."""
    for needed in (path, path.with_name("config.json")):
        if not needed.is_file():
            raise ModelNotFoundError(
                "nano's flow network", needed, "Reinstall this package, or choose another flow."
            )
    config_path = path.with_name("config.json")
    config = read_json(config_path)
    try:
        network = empty(lambda: FlowNetwork(**config))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{config_path} does not describe a flow network ({error!r}): reinstall this package."
        ) from error
    weights = read_weights(path)
    check_keys(path, {key: tuple(value.shape) for key, value in weights.items()}, shapes_of(network))
    network.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return network.requires_grad_(False)
