"""What a checkpoint says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a checkpoint says of itself in its index; the defaults are those of the released ones."""

    steps: int = 4
    """Denoising steps where the options name none."""
    occlusion: str = "off"
    """'mask' where it was trained to have guidance fade out; see `UpscaleOptions.occlusion`."""
    centred_flow: bool = False
    """Whether it was trained with estimates that undo the shift of `warp`; given flow is used as it is."""
