"""Building networks without initial weights, and checking weights before they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

Network = TypeVar("Network", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


def empty(construct: Callable[[], Network]) -> Network:
    """Build a network with all weights on the meta device, so that no initial weights are computed."""
    from accelerate import init_empty_weights

    with torch.inference_mode(False), init_empty_weights(include_buffers=False):
        return construct()


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a network needs, by name."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def move_weight(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a weight to a device and convert it to a number format; integers keep their format.

    Weights that have to be copied also get the memory layout that convolutions prefer, channels last.
    """
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if (tensor.device, tensor.dtype) == (device, dtype):
        return tensor
    order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, dtype, memory_format=order)


def check_keys(path: Path, got: Shapes, needed: Shapes) -> None:
    """Compare the weights' names and shapes; raise `CheckpointError` naming the first difference."""
    problems = [f"lacks {key!r}" for key in needed if key not in got]
    problems += [f"has {key!r}, which this network does not have" for key in got if key not in needed]
    problems += [
        f"has {key!r} of shape {got[key]}, but its configuration requires {needed[key]}"
        for key in needed
        if key in got and got[key] != needed[key]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path} {problems[0]}{more}: it belongs to another model or version.")
