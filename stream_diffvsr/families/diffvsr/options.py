"""The settings of one run, checked on creation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import IncompatibleInputError
from ...options import check_options, option

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"control_every": 2},
    "fast": {"control_every": 4, "flow_scale": 0.5},
}
"""Named sets of approximations; docs/speed.md lists the error and the time of each."""

PRESET_HELP = (
    "exact: produces the same results as the reference. balanced: computes the guidance from the previous "
    "frame only on every second step. fast: computes it only once per frame, and estimates motion at half "
    "size."
)


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """Immutable settings for upscaling frames; invalid values raise `IncompatibleInputError` on creation."""

    num_inference_steps: int | None = option(
        None,
        "Number of denoising steps per frame; more steps are slower and seldom better.",
        kind=int,
        low=1,
        high=1000,
        usual=(1, 50),
        unset=0,
        unset_help="as in training (4 for the released model)",
        flag="steps",
        metavar="N",
    )
    seed: int = option(
        0,
        "Noise seed. Frame n of the whole video uses seed + n, so upscaling a video in parts gives the "
        "same result as a single run.",
        low=-(2**63),
        high=2**64 - 1,
        usual=(0, 2**64 - 1),
        metavar="N",
    )
    guidance_scale: float = option(
        0.0,
        "Strength of classifier-free guidance. Values up to 1 turn it off, as in training; above 1, the "
        "U-Net takes twice as long.",
        low=0,
        usual=(0.0, 20.0),
        step=0.1,
        expert=True,
        metavar="G",
    )
    prompt: str = option(
        "",
        "Description of the picture. The model was trained with an empty prompt; any other prompt needs the "
        "model's text encoder.",
        multiline=True,
        expert=True,
    )
    negative_prompt: str = option(
        "",
        "Description of what the picture should not show. Used only if guidance_scale is above 1.",
        multiline=True,
        expert=True,
    )
    controlnet_conditioning_scale: float = option(
        1.0,
        "How strongly the previous frame guides this one. Lower values cause less ghosting but more flicker.",
        low=0,
        usual=(0.0, 2.0),
        step=0.05,
        expert=True,
        metavar="S",
    )
    control_guidance_start: float = option(
        0.0,
        "Guidance from the previous frame begins after this fraction of the denoising steps.",
        low=0.0,
        high=1.0,
        step=0.05,
        expert=True,
        metavar="F",
    )
    control_guidance_end: float = option(
        1.0,
        "Guidance from the previous frame ends after this fraction of the denoising steps.",
        low=0.0,
        high=1.0,
        step=0.05,
        expert=True,
        metavar="F",
    )
    timestep_spacing: str | None = option(
        None,
        "How the noise levels of the steps are spaced. The paper's model was trained with timesteps "
        "999, 749, 499 and 249, which corresponds to trailing.",
        kind=str,
        choices=("trailing", "leading", "linspace"),
        unset="checkpoint",
        unset_help="as set in the checkpoint's scheduler file, or leading if not set there",
        expert=True,
    )
    use_tpm: bool = option(
        True,
        "Also feed the previous frame to the decoder (Temporal Processor Module). Turning this off causes "
        "more flicker.",
        expert=True,
    )
    flow_scale: float = option(
        1.0,
        "Resolution of motion estimation, relative to the output. Values below 1 are faster but "
        "less accurate; the model was trained with 1.",
        choices=(1.0, 0.5, 0.25),
        group="speed",
        expert=True,
    )
    memory_plan: str = option(
        "auto",
        "How to save memory. whole: saves no memory. banded: needs less memory for the same picture. tiled: "
        "needs the least memory, but runs the U-Net in tiles and changes the picture slightly. auto: uses "
        "the first of these that fits, and the next one if memory runs out.",
        choices=("auto", "whole", "banded", "tiled"),
        group="memory",
        expert=True,
    )
    tile_size: int | None = option(
        None,
        "Tile size in output pixels. Used only if the U-Net runs in tiles.",
        kind=int,
        low=64,
        high=2**20,
        unset_help="chosen by the memory plan",
        group="memory",
        expert=True,
        metavar="N",
    )
    tile_overlap: int = option(
        64,
        "Overlap of the tiles in output pixels; must be less than half of the tile size.",
        low=0,
        high=2**20,
        group="memory",
        expert=True,
        metavar="N",
    )
    compile_mode: str = option(
        "off",
        "Whether to use torch.compile. auto: the first frame takes a minute or more, but later frames are "
        "faster. max: tries more variants and starts even more slowly. If compilation does not work on this "
        "machine, a warning is logged.",
        choices=("off", "auto", "max"),
        group="speed",
        expert=True,
    )
    control_every: int = option(
        1,
        "Run the ControlNet only every N steps and reuse its output in between, which is an approximation.",
        low=1,
        high=1000,
        group="speed",
        expert=True,
        metavar="N",
    )
    occlusion: str | None = option(
        None,
        "How to treat guidance where the previous frame shows different content. mask: fades it out. off: "
        "keeps it, as in the paper.",
        kind=str,
        choices=("off", "mask"),
        unset="checkpoint",
        unset_help="as in training",
        expert=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.tile_size is not None and self.tile_overlap * 2 >= self.tile_size:
            raise IncompatibleInputError(
                f"tile_overlap must be below half of tile_size {self.tile_size}, not {self.tile_overlap}"
            )

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is used."""
        return self.guidance_scale > 1

    def to_json(self) -> str:
        """Return the options as one line of JSON with sorted keys, for states and video journals."""
        return json.dumps(asdict(self), sort_keys=True)
