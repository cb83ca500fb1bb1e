"""What a sequence remembers between chunks, and how it becomes a State and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...upscaler import Provenance, State
from ..wan.state import frames_before, packed, unpacked
from ..wan.taehv import Memory as Past

FAMILY = "swiftvr"

AHEAD = 3
"""Frames that are seen and have no result yet."""


@dataclass(frozen=True)
class Memory:
    """After whole chunks; never changed, so that a chunk that fails leaves it as it was."""

    start: int = 0
    """First frame of the scene, counted in the video."""
    latents: int = 0
    """Done so far in the scene."""
    encoder: Past = field(default_factory=dict)
    decoder: Past = field(default_factory=dict)
    lq: Tensor | None = None
    """(1, C, n, h, w): the last latents of low quality; None at the start."""

    @property
    def index(self) -> int:
        """Frames done so far, counted in the video."""
        return self.start + frames_before(self.latents)

    @property
    def ahead(self) -> int:
        """Frames from `index` on that the encoder has seen."""
        return AHEAD if self.latents else 0

    def to_state(self, size: tuple[int, int], provenance: Provenance) -> State:
        """A state after frame `index` - 1; the next frame to push is `index`."""
        tensors = {f"encoder.{index}": value for index, value in self.encoder.items()}
        tensors |= {f"decoder.{index}": value for index, value in self.decoder.items()}
        if self.lq is not None and self.lq.shape[2]:
            tensors["lq"] = self.lq
        return packed(FAMILY, self.start, self.latents, size, provenance, tensors)

    @classmethod
    def of(cls, state: State | None, device: torch.device, dtype: torch.dtype) -> Memory:
        """From what `to_state` gave, or an empty state of any family; raises `IncompatibleInputError`."""
        state = state or State()
        if not state.has_previous:
            return cls(start=state.index)
        start, latents, held = unpacked(state, FAMILY, device, dtype)
        past = [{at[0]: value for at, value in held[name].items()} for name in ("encoder", "decoder")]
        return cls(start, latents, past[0], past[1], held.get("lq", {}).get(()))
