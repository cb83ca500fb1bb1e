"""FlashVSR's options."""

from __future__ import annotations

from dataclasses import dataclass

from ...options import check_options, option

DECODERS = ("tiny", "full")

PRESETS: dict[str, dict[str, float]] = {"exact": {}, "balanced": {}, "fast": {"sparse_ratio": 1.5}}
"""exact and balanced use the published defaults; fast uses the faster setting published with them."""

OWN = "FlashVSR"
"""Title of the group of flags that only this family has."""


@dataclass(frozen=True, kw_only=True)
class FlashVSROptions:
    """Settings of one sequence, checked on creation; the defaults are the published ones."""

    scale: float = option(4.0, "Factor by which each side is enlarged.", low=1, high=4, step=0.5)
    stretch: float = option(1.0, "Additional scale factor for the width.", low=0.25, high=4, hidden=True)
    seed: int = option(0, "Noise seed.", low=0, high=2**64 - 1)
    decoder: str = option(
        "tiny",
        "tiny: a fast decoder that also sees the input frames. full: Wan's own decoder.",
        choices=DECODERS,
        group=OWN,
    )
    colour_fix: str = option(
        "adain",
        "adain: matches the mean and contrast of each colour channel to those of the input frame. none: "
        "leaves colours as they are.",
        choices=("adain", "none"),
        group=OWN,
    )
    sparse_ratio: float = option(
        2.0, "Controls how many windows each window attends to; 1.5 is faster, but 2 causes less flicker.",
        low=0.01, high=10, step=0.1, expert=True, group=OWN,
    )  # fmt: skip
    kv_ratio: int = option(
        3,
        "Number of earlier pairs of latents to keep in memory and attend to.",
        low=1,
        high=8,
        expert=True,
        group=OWN,
    )
    local_range: int = option(
        11,
        "Size of the area that a window may attend to, in windows of 128 pixels; 9 gives sharper pictures.",
        low=1, high=99, expert=True, group=OWN,
    )  # fmt: skip
    memory_plan: str = option(
        "auto",
        "offload: keeps the transformer and the keys of earlier pairs in system memory between uses, "
        "which needs less GPU memory and gives the same picture. auto: does so only if memory runs out.",
        choices=("auto", "whole", "offload"),
        expert=True,
        group="memory",
    )

    def __post_init__(self) -> None:
        check_options(self)
