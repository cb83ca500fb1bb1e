"""The memory of a sequence between chunks, and its conversion to and from a `State`."""

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
"""Frames read by a scene's first chunk, added by each later chunk, and read but not yet decoded."""

LATENTS = 6
"""Number of latents in the first chunk; later chunks have 2."""


@dataclass(frozen=True)
class Memory:
    """The memory carried from chunk to chunk; it is immutable, so a chunk that fails does not affect it."""

    start: int = 0
    """Index of the scene's first frame in the video."""
    latents: int = 0
    """Number of the scene's latents processed so far."""
    projection: Past = ()
    pairs: Pairs = ()
    decoder: DecoderMemory = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The number of video frames finished so far."""
        return self.start + frames_before(self.latents)

    @property
    def ahead(self) -> int:
        """The number of frames, from `index` on, that the projection has already processed."""
        return AHEAD if self.latents else 0

    @property
    def frames(self) -> int:
        """The number of frames, from `index` on, that the next chunk needs."""
        return AHEAD + CHUNK if self.latents else FIRST

    def to_state(self, size: tuple[int, int], provenance: Provenance) -> State:
        """Return the state after frame `index` - 1; the next frame to push is `index`."""
        tensors: dict[str, Tensor] = {}
        for block, pairs in enumerate(self.pairs):
            for age, (keys, values) in enumerate(pairs):
                tensors |= {f"keys.{block}.{age}": keys, f"values.{block}.{age}": values}
        tensors |= {f"projection.{index}": value for index, value in enumerate(self.projection)}
        tensors |= {f"decoder.{index}": value for index, value in self.decoder.items()}
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
