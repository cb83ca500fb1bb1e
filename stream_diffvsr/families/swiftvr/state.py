"""The memory of a sequence between chunks, and its conversion to and from a `State`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...upscaler import Provenance, State
from ..wan.state import frames_before, packed, unpacked
from ..wan.taehv import Memory as Past

FAMILY = "swiftvr"

AHEAD = 3
"""Number of frames that the encoder has seen but that have no result yet."""


@dataclass(frozen=True)
class Memory:
    """The memory carried from chunk to chunk; it is immutable, so a chunk that fails does not affect it."""

    start: int = 0
    """Index of the scene's first frame in the video."""
    latents: int = 0
    """Number of the scene's latents processed so far."""
    encoder: Past = field(default_factory=dict)
    decoder: Past = field(default_factory=dict)
    lq: Tensor | None = None
    """The last low-quality latents, (1, C, n, h, w); None at the start."""

    @property
    def index(self) -> int:
        """The number of video frames finished so far."""
        return self.start + frames_before(self.latents)

    @property
    def ahead(self) -> int:
        """The number of frames, from `index` on, that the encoder has already seen."""
        return AHEAD if self.latents else 0

    def to_state(self, size: tuple[int, int], provenance: Provenance) -> State:
        """Return the state after frame `index` - 1; the next frame to push is `index`."""
        tensors = {f"encoder.{index}": value for index, value in self.encoder.items()}
        tensors |= {f"decoder.{index}": value for index, value in self.decoder.items()}
        if self.lq is not None and self.lq.shape[2]:
            tensors["lq"] = self.lq
        return packed(FAMILY, self.start, self.latents, size, provenance, tensors)

    @classmethod
    def of(cls, state: State | None, device: torch.device, dtype: torch.dtype) -> Memory:
        """Restore the memory from a state of this family, or from an empty state of any family.

        Raises `IncompatibleInputError` if the state belongs to another family.
        """
        state = state or State()
        if not state.has_previous:
            return cls(start=state.index)
        start, latents, held = unpacked(state, FAMILY, device, dtype)
        past = [{at[0]: value for at, value in held[name].items()} for name in ("encoder", "decoder")]
        return cls(start, latents, past[0], past[1], held.get("lq", {}).get(()))
