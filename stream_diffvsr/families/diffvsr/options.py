"""The settings of one run, checked once."""

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
"""Names for sets of approximations; README.md tells the error and the time of each."""

PRESET_HELP = (
    "exact: the reference's numbers. balanced: guidance by the previous frame is computed in every second "
    "step only. fast: only once per frame, with motion estimated at half the size."
)


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """How frames are upscaled. Frozen; wrong values raise `IncompatibleInputError` here and nowhere else."""

    num_inference_steps: int | None = option(
        None,
        "Denoising steps per frame. 0: as the model was trained, which is 4 for the released one; more is "
        "slower and seldom better.",
        kind=int,
        low=1,
        high=1000,
        usual=(1, 50),
        unset=0,
        unset_help="as the model was trained",
        flag="steps",
        metavar="N",
    )
    seed: int = option(
        0,
        "Noise seed. Frame n of the whole video uses seed + n, so a video upscaled in parts equals one "
        "upscaled at once.",
        low=-(2**63),
        high=2**64 - 1,
        usual=(0, 2**64 - 1),
        metavar="N",
    )
    guidance_scale: float = option(
        0.0,
        "Classifier-free guidance. Up to 1 there is none, as the model was trained; above 1 the U-Net takes "
        "twice the time.",
        low=0,
        usual=(0.0, 20.0),
        step=0.1,
        expert=True,
        metavar="G",
    )
    prompt: str = option(
        "",
        "What the picture shows. The model was trained with the empty prompt; any other needs its text "
        "encoder.",
        multiline=True,
        expert=True,
    )
    negative_prompt: str = option(
        "",
        "What the picture should not show. Only used when guidance_scale is above 1.",
        multiline=True,
        expert=True,
    )
    controlnet_conditioning_scale: float = option(
        1.0,
        "How strongly the previous frame guides this one. Lower: less ghosting, more flicker.",
        low=0,
        usual=(0.0, 2.0),
        step=0.05,
        expert=True,
        metavar="S",
    )
    control_guidance_start: float = option(
        0.0,
        "Fraction of the denoising steps after which guidance by the previous frame begins.",
        low=0.0,
        high=1.0,
        step=0.05,
        expert=True,
        metavar="F",
    )
    control_guidance_end: float = option(
        1.0,
        "Fraction of the denoising steps after which guidance by the previous frame ends.",
        low=0.0,
        high=1.0,
        step=0.05,
        expert=True,
        metavar="F",
    )
    timestep_spacing: str | None = option(
        None,
        "Which noise levels the steps visit. checkpoint: as its scheduler file says, or leading where that "
        "says nothing. The paper trained with 999, 749, 499, 249, which is trailing.",
        kind=str,
        choices=("trailing", "leading", "linspace"),
        unset="checkpoint",
        unset_help="checkpoint",
        expert=True,
    )
    use_tpm: bool = option(
        True,
        "Show the previous frame to the decoder, too (Temporal Processor Module). Off: more flicker.",
        expert=True,
    )
    flow_scale: float = option(
        1.0,
        "Resolution of motion estimation, as a fraction of the output. Below 1 it is faster and less "
        "accurate; the model was trained with 1.",
        choices=(1.0, 0.5, 0.25),
        group="speed",
        expert=True,
    )
    memory_plan: str = option(
        "auto",
        "How memory is saved. whole: nothing is split. banded: less memory, the same picture. tiled: least "
        "memory, with the U-Net in tiles and a slightly different picture. auto: the first of them that "
        "fits, and the next one when memory runs out.",
        choices=("auto", "whole", "banded", "tiled"),
        group="memory",
        expert=True,
    )
    tile_size: int | None = option(
        None,
        "Tile size in output pixels. Only used with tiles.",
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
        "Overlap of the tiles in output pixels, below half of the tile size.",
        low=0,
        high=2**20,
        group="memory",
        expert=True,
        metavar="N",
    )
    compile_mode: str = option(
        "off",
        "Use torch.compile. auto: the first frame takes a minute or more, the others are faster. max: tries "
        "more ways, and starts even more slowly. A warning is logged where it cannot work.",
        choices=("off", "auto", "max"),
        group="speed",
        expert=True,
    )
    control_every: int = option(
        1,
        "Run the ControlNet every N steps and reuse it in between, an approximation.",
        low=1,
        high=1000,
        group="speed",
        expert=True,
        metavar="N",
    )
    occlusion: str | None = option(
        None,
        "Guidance where the previous frame does not show what is there now. mask: it fades out. off: it "
        "stays, as in the paper. checkpoint: as the model was trained.",
        kind=str,
        choices=("off", "mask"),
        unset="checkpoint",
        unset_help="checkpoint",
        expert=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.tile_size is not None and self.tile_overlap * 2 >= self.tile_size:
            raise IncompatibleInputError(
                f"tile_overlap below half of tile_size {self.tile_size}", str(self.tile_overlap)
            )

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance takes part."""
        return self.guidance_scale > 1

    def to_json(self) -> str:
        """One line of JSON, keys sorted, for a state's metadata and a video's journal."""
        return json.dumps(asdict(self), sort_keys=True)
