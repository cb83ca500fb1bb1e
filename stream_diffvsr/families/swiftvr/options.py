"""SwiftVR's options."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import IncompatibleInputError
from ...options import check_options, option

GROUP = 4
"""Frames per latent."""

CLIP = 24
"""Frames per chunk, as published; this is also the maximum, since it determines the look-ahead."""

PRESETS: dict[str, dict[str, int]] = {"exact": {}, "balanced": {}, "fast": {}}
"""All presets use the published settings, since no other settings would be faster."""

OWN = "SwiftVR"
"""Title of the group of flags that only this family has."""


@dataclass(frozen=True, kw_only=True)
class SwiftVROptions:
    """Settings of one sequence, checked on creation; the defaults are the published ones."""

    scale: float = option(4.0, "Factor by which each side is enlarged.", low=1, high=4, step=0.5)
    stretch: float = option(1.0, "Additional scale factor for the width.", low=0.25, high=4, hidden=True)
    protocol: str = option(
        "file",
        "file: reads 4 extra frames at the start and pads the last clip, as in the published results. "
        "session: uses clips of equal length from the start and waits for 4 fewer frames.",
        choices=("file", "session"),
        expert=True,
        group=OWN,
    )
    clip_len: int = option(
        CLIP, "Number of frames restored together; must be a multiple of 4. Fewer frames give results "
        "sooner and need less memory, but reduce quality.",
        low=GROUP, high=CLIP, step=GROUP, expert=True, group=OWN,
    )  # fmt: skip
    overlap: int | None = option(
        None, "Number of groups of 4 earlier frames that a clip reuses.",
        kind=int, low=0, high=CLIP // GROUP, unset=-1, expert=True, group=OWN,
        unset_help="depends on protocol (0 for file, 1 for session)",
    )  # fmt: skip
    memory_plan: str = option(
        "auto",
        "offload: keeps the transformer in system memory between uses. auto: does so only if memory runs "
        "out.",
        choices=("auto", "whole", "offload"),
        expert=True,
        group="memory",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.clip_len % GROUP:
            raise IncompatibleInputError(f"clip_len must be a multiple of {GROUP}, not {self.clip_len!r}")

    @property
    def context(self) -> int:
        """The number of earlier latents that a clip reuses."""
        return int(self.protocol == "session") if self.overlap is None else self.overlap

    @property
    def kept(self) -> int:
        """The number of latents to keep; protocol "file" also pads the last clip with them."""
        return max(self.context, self.clip_len // GROUP if self.protocol == "file" else 0)
