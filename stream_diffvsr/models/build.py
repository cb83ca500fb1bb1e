"""Networks built without initial weights, and filled from a file, strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_tensors

Network = TypeVar("Network", bound=nn.Module)

BUFFERS = (".position_ids",)
"""Endings of keys that older files hold although they carry no weights."""


def fill(
    build: Callable[[], Network], path: Path, device: torch.device, dtype: torch.dtype, prefix: str = ""
) -> Network:
    """Build a network and give it the weights of a safetensors file, in eval mode.

    `prefix` is one that a library's versions disagree about: the keys may have it or lack it. Raises
    `CheckpointError` naming the file and the key where the two do not fit exactly.
    """
    network = empty(build)
    tensors = {key: value for key, value in read_tensors(path)[0].items() if not key.endswith(BUFFERS)}
    needed = network.state_dict()
    if prefix and not any(key.startswith(prefix) for key in needed):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    check_keys(path, tensors, needed)
    network.load_state_dict({key: place(value, device, dtype) for key, value in tensors.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)


def empty(build: Callable[[], Network]) -> Network:
    """The network with all weights on the meta device: nothing is computed that would be overwritten."""
    from accelerate import init_empty_weights

    with torch.inference_mode(False), init_empty_weights(include_buffers=False):
        return build()


def place(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a weight; whole numbers keep their type."""
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def check_keys(path: Path, got: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Compare names and shapes; the error names the first that differs."""
    problems = [f"lacks {key!r}" for key in needed if key not in got]
    problems += [f"holds {key!r}, which this network has not" for key in got if key not in needed]
    problems += [
        f"has {key!r} of shape {tuple(got[key].shape)}, its configuration says {tuple(needed[key].shape)}"
        for key in needed
        if key in got and got[key].shape != needed[key].shape
    ]
    if problems:
        more = f" ({len(problems) - 1} more such keys)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path} {problems[0]}{more}: it belongs to another model or version.")
