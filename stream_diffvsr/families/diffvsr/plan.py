"""What of a frame is computed in parts. A plan is recorded in the state, and later frames keep to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ...errors import IncompatibleInputError
from .options import UpscaleOptions

BAND_ROWS = 128
"""Rows of a band: few against a large picture, many against the rows that are computed twice."""

TILE_SIZE = 512
"""HQ pixels along the side of a U-Net tile where the options name none."""

SMALLEST_TILE = 256
"""Below it the U-Net sees too little of the picture around."""


@dataclass(frozen=True)
class Plan:
    """How one frame is computed. The result is exactly that of the whole frame, but for tiles."""

    flow: str = "whole"
    """One of the estimator's `methods`: 'whole', 'linear' (RAFT without its volume) or 'tiled'."""
    rows: int | None = None
    """Rows per band of decoder, features and control embedding; None: the whole frame at once."""
    tile: int | None = None
    """Side of the U-Net's tiles in HQ pixels; None: the whole frame."""
    overlap: int = 64
    """Overlap of the tiles in HQ pixels, below half of `tile`."""

    @property
    def exact(self) -> bool:
        """Whether the numbers are those of the whole frame, up to rounding."""
        return self.tile is None and self.flow != "tiled"

    def lower(self, stage: str, methods: Sequence[str], tile: int | None = None) -> Plan | None:
        """The next plan with less memory, exact ones first; None if there is none.

        `stage` is where memory ran out: only for flow does tiled flow help. `tile` is the size that U-Net
        tiles begin with.
        """
        if self.flow == "whole" and "linear" in methods:
            return replace(self, flow="linear")
        if self.rows is None:
            return replace(self, rows=BAND_ROWS)
        if stage == "flow" and "tiled" in methods and self.flow != "tiled":
            return replace(self, flow="tiled")
        if stage == "flow" or (self.tile is not None and self.tile <= SMALLEST_TILE):
            return None
        return self.tiled(tile or TILE_SIZE if self.tile is None else max(self.tile // 2, SMALLEST_TILE))

    def tiled(self, tile: int) -> Plan:
        """The same with U-Net tiles of that size."""
        return replace(self, tile=tile, overlap=min(self.overlap, (tile - 1) // 2))

    def __str__(self) -> str:
        parts = {
            "linear": "flow in linear memory",
            "tiled": "flow in tiles",
            "whole": "" if self.rows or self.tile else "whole frames",
        }[self.flow]
        bands = f"convolutions in bands of {self.rows} rows" if self.rows else ""
        tiles = f"U-Net in tiles of {self.tile} (overlap {self.overlap})" if self.tile else ""
        return ", ".join(part for part in (parts, bands, tiles) if part)

    def to_json(self) -> str:
        """One line of JSON for a state's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; raises `IncompatibleInputError`."""
        try:
            plan = cls(**json.loads(text))
            plan._check()
        except (TypeError, ValueError) as error:
            raise IncompatibleInputError(
                "a state whose plan was written by this program", repr(text)
            ) from error
        return plan

    def _check(self) -> None:
        whole = [value for value in (self.rows, self.tile, self.overlap) if value is not None]
        if self.flow not in ("whole", "linear", "tiled") or any(type(value) is not int for value in whole):
            raise ValueError("no such plan")
        if (self.rows or 4) < 4 or (self.tile is not None and not 0 <= self.overlap * 2 < self.tile):
            raise ValueError("no such plan")


def asked_for(options: UpscaleOptions, methods: Sequence[str]) -> Plan:
    """The plan that the options name; for 'auto' the one to begin with, nothing split."""
    if options.memory_plan in ("auto", "whole"):
        return Plan(overlap=options.tile_overlap)
    plan = Plan(fitting("linear", methods), BAND_ROWS, overlap=options.tile_overlap)
    if options.memory_plan == "banded":
        return plan
    return plan.tiled(options.tile_size or TILE_SIZE)


def fitting(method: str, methods: Sequence[str]) -> str:
    """The estimator's own method in place of one that it lacks."""
    return method if method in methods else methods[0]
