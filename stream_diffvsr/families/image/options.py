"""The options of single-image models."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import IncompatibleInputError
from ...options import check_options, option

PRESETS: dict[str, dict[str, float]] = {"exact": {}, "balanced": {}, "fast": {}}
"""The presets of the other families, all empty here, because these models have no faster settings."""

OWN = "single-image models"
"""Title of the group of flags that only this family has."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Settings of one sequence, checked on creation."""

    steady: float = option(
        0.0,
        "How strongly each result is blended with the motion-compensated previous result where both show "
        "the same content. 0 leaves each frame as the model makes it; higher values reduce flicker but make "
        "the picture slightly softer.",
        low=0, high=1, step=0.05, group=OWN,
    )  # fmt: skip
    tile_size: int | None = option(
        None,
        "Size, in output pixels, of the tiles in which a frame is computed; tiles need less memory but "
        "change the picture slightly.",
        kind=int, low=64, high=2**20, unset=0, group="memory", expert=True, metavar="N",
        unset_help="the whole frame at once, or tiles if memory runs out",
    )  # fmt: skip
    tile_overlap: int = option(
        64,
        "Overlap of the tiles in output pixels; must be less than half of the tile size.",
        low=0, high=2**20, group="memory", expert=True, metavar="N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.tile_size is not None and self.tile_overlap * 2 >= self.tile_size:
            raise IncompatibleInputError(
                f"tile_overlap must be below half of tile_size {self.tile_size}, not {self.tile_overlap}"
            )
