"""What a sequence remembers between chunks, and how it becomes a State and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...upscaler import Provenance, State
from ..wan.state import frames_before, packed, unpacked
from ..wan.taehv import Memory as DecoderMemory
from .projection import Past
from .transformer import Pairs

FAMILY = "flashvsr"

FIRST, CHUNK, AHEAD = 25, 8, 4
"""Frames that a scene's first chunk takes, what each later one adds, and what is seen but not yet decoded."""

LATENTS = 6
"""Of the first chunk; later ones have 2."""


@dataclass(frozen=True)
class Memory:
    """After whole chunks; never changed, so that a chunk that fails leaves it as it was."""

    start: int = 0
    """First frame of the scene, counted in the video."""
    latents: int = 0
    """Done so far in the scene."""
    projection: Past = ()
    pairs: Pairs = ()
    decoder: DecoderMemory = field(default_factory=dict)

    @property
    def index(self) -> int:
        """Frames done so far, counted in the video."""
        return self.start + frames_before(self.latents)

    @property
    def ahead(self) -> int:
        """Frames from `index` on that the projection has seen."""
        return AHEAD if self.latents else 0

    @property
    def frames(self) -> int:
        """How many frames from `index` on the next chunk takes."""
        return AHEAD + CHUNK if self.latents else FIRST

    def to_state(self, size: tuple[int, int], provenance: Provenance) -> State:
        """A state after frame `index` - 1; the next frame to push is `index`."""
        tensors: dict[str, Tensor] = {}
        for block, pairs in enumerate(self.pairs):
            for age, (keys, values) in enumerate(pairs):
                tensors |= {f"keys.{block}.{age}": keys, f"values.{block}.{age}": values}
        tensors |= {f"projection.{index}": value for index, value in enumerate(self.projection)}
        tensors |= {f"decoder.{index}": value for index, value in self.decoder.items()}
        return packed(FAMILY, self.start, self.latents, size, provenance, tensors)

    @classmethod
    def of(cls, state: State | None, device: torch.device, dtype: torch.dtype) -> Memory:
        """From what `to_state` gave, or an empty state of any family; raises `IncompatibleInputError`."""
        state = state or State()
        if not state.has_previous:
            return cls(start=state.index)
        start, latents, held = unpacked(state, FAMILY, device, dtype)
        keys, values = held["keys"], held["values"]
        blocks = 1 + max(block for block, _ in keys)
        pairs = tuple(
            tuple((keys[at], values[at]) for at in sorted(keys) if at[0] == block) for block in range(blocks)
        )
        projection = held.get("projection", {})
        return cls(
            start=start,
            latents=latents,
            projection=tuple(projection[at] for at in sorted(projection)),
            pairs=pairs,
            decoder={at[0]: value for at, value in held["decoder"].items()},
        )
