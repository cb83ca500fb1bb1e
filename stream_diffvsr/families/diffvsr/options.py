"""The settings of one run, checked once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import IncompatibleInputError

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
MEMORY_PLANS = ("auto", "whole", "banded", "tiled")
COMPILE_MODES = ("off", "auto", "max")
FLOW_SCALES = (1.0, 0.5, 0.25)


PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"control_every": 2},
    "fast": {"control_every": 4, "flow_scale": 0.5},
}
"""Names for sets of approximations; README.md tells the error and the time of each."""


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """How frames are upscaled. Frozen; wrong values raise `IncompatibleInputError` here and nowhere else."""

    num_inference_steps: int | None = None
    """Denoising steps, 1 to 1000; None: the checkpoint's own number, 4 for released ones."""
    seed: int = 0
    """Noise of frame n comes from (seed + n) mod 2**64."""
    guidance_scale: float = 0.0
    """Classifier-free guidance; 1 or less means none."""
    prompt: str = ""
    negative_prompt: str = ""
    controlnet_conditioning_scale: float = 1.0
    """Strength of the guidance by the previous frame."""
    control_guidance_start: float = 0.0
    """Share of the steps, from 0 to 1, before which the ControlNet is off."""
    control_guidance_end: float = 1.0
    """Share of the steps after which the ControlNet is off."""
    timestep_spacing: str | None = None
    """None: the checkpoint's own; else 'leading', 'trailing' or 'linspace'."""
    use_tpm: bool = True
    """Whether the decoder sees the previous frame."""
    flow_scale: float = 1.0
    """Size at which flow is estimated, as a share of the output's: 1, 0.5 or 0.25."""
    memory_plan: str = "auto"
    tile_size: int | None = None
    """Side of the U-Net's tiles in HQ pixels; None: chosen by the memory plan."""
    tile_overlap: int = 64
    """Overlap of the tiles in HQ pixels, below half of `tile_size`."""
    compile_mode: str = "off"
    """torch.compile: 'off', 'auto', or 'max', which tries more ways and starts more slowly."""
    control_every: int = 1
    """Of how many steps one computes the ControlNet, for the others too; an approximation above 1."""
    occlusion: str | None = None
    """'mask': guidance fades where the previous frame cannot be believed; 'off'; None: the checkpoint's."""

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None:
            self._check_whole("num_inference_steps", self.num_inference_steps, 1, 1000)
        self._check_whole("seed", self.seed, -(2**63), 2**64 - 1)
        self._check_number("guidance_scale", self.guidance_scale, 0, math.inf)
        self._check_number("controlnet_conditioning_scale", self.controlnet_conditioning_scale, 0, math.inf)
        self._check_number("control_guidance_start", self.control_guidance_start, 0, 1)
        self._check_number("control_guidance_end", self.control_guidance_end, 0, 1)
        self._check_choice("timestep_spacing", self.timestep_spacing, (None, *TIMESTEP_SPACINGS))
        self._check_choice("flow_scale", self.flow_scale, FLOW_SCALES)
        self._check_choice("memory_plan", self.memory_plan, MEMORY_PLANS)
        self._check_choice("compile_mode", self.compile_mode, COMPILE_MODES)
        self._check_choice("use_tpm", self.use_tpm, (True, False))
        self._check_whole("control_every", self.control_every, 1, 1000)
        self._check_choice("occlusion", self.occlusion, (None, "off", "mask"))
        self._check_tiles()
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise IncompatibleInputError(f"{name} as text", repr(getattr(self, name)))

    def _check_tiles(self) -> None:
        if self.tile_size is not None:
            self._check_whole("tile_size", self.tile_size, 64, 2**20)
        self._check_whole("tile_overlap", self.tile_overlap, 0, 2**20)
        if self.tile_size is not None and self.tile_overlap * 2 >= self.tile_size:
            raise IncompatibleInputError(
                f"tile_overlap below half of tile_size {self.tile_size}", str(self.tile_overlap)
            )

    @staticmethod
    def _check_whole(name: str, value: Any, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise IncompatibleInputError(f"{name} as a whole number from {low} to {high}", repr(value))

    @staticmethod
    def _check_number(name: str, value: Any, low: float, high: float) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise IncompatibleInputError(f"{name} as a finite number {limits}", repr(value))

    @staticmethod
    def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
        if value not in choices:
            raise IncompatibleInputError(f"{name} as one of {', '.join(map(repr, choices))}", repr(value))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance takes part."""
        return self.guidance_scale > 1

    def to_json(self) -> str:
        """One line of JSON, keys sorted, for a state's metadata and a video's journal."""
        return json.dumps(asdict(self), sort_keys=True)


def with_preset(preset: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `UpscaleOptions`: one of PRESETS, and `own`, which wins where it is not the default."""
    if preset not in PRESETS:
        raise IncompatibleInputError(f"preset as one of {', '.join(PRESETS)}", repr(preset))
    defaults = {each.name: each.default for each in fields(UpscaleOptions)}
    left = {
        name: value
        for name, value in PRESETS[preset].items()
        if own.get(name, defaults[name]) == defaults[name]
    }
    return {**own, **left}
