"""Convert what a sequence remembers between chunks to a `State`, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import IncompatibleInputError
from ...upscaler import Provenance, State

POSITION = "position"

Numbered = dict[tuple[int, ...], Tensor]
"""Tensors of one kind, by the numbers in their names."""


def frames_before(latents: int) -> int:
    """Return how many frames a scene's first `latents` latents decode to."""
    return max(4 * latents - 3, 0)


def packed(
    family: str,
    start: int,
    latents: int,
    size: tuple[int, int],
    provenance: Provenance,
    tensors: Mapping[str, Tensor],
) -> State:
    """Return the state after `latents` latents of the scene that began at frame `start`.

    The keys of `tensors` are 'kind' or 'kind.number...'.
    """
    index = start + frames_before(latents)
    if not latents:
        return State(family, index, {}, provenance)
    return State(family, index, {POSITION: torch.tensor([start, latents, *size]), **tensors}, provenance)


def unpacked(
    state: State, family: str, device: torch.device, dtype: torch.dtype
) -> tuple[int, int, dict[str, Numbered]]:
    """Return the start, the number of latents and the tensors by kind from a state made by `packed`.

    Raises `IncompatibleInputError` if the state belongs to another family.
    """
    if state.family != family or POSITION not in state.tensors:
        raise IncompatibleInputError(
            f"the state belongs to {state.family or 'another family'}, not to {family}"
        )
    start, latents, *_ = state.tensors[POSITION].tolist()
    held: dict[str, Numbered] = {}
    for name, value in state.tensors.items():
        kind, *numbers = name.split(".")
        if kind != POSITION:
            held.setdefault(kind, {})[tuple(map(int, numbers))] = value.to(device, dtype)
    return start, latents, held


def size_of(state: State) -> tuple[int, int]:
    """Return (height, width) of a state's low-quality frames; the state must have tensors."""
    _, _, height, width = state.tensors[POSITION].tolist()
    return height, width
