"""Settings: everything that the working nodes have no widget for."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .sockets import ADVANCED, SETTINGS, Widget

if TYPE_CHECKING:
    from ..stream_diffvsr import UpscaleOptions

CHECKPOINT_SPACING = "checkpoint"

ENGINE_WIDGETS: dict[str, Widget] = {
    "guidance_scale": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 20.0,
            "step": 0.1,
            "tooltip": "Classifier-free guidance. Up to 1: none, as the model was made. Above, it doubles "
            "the time of the U-Net.",
        },
    ),
    "prompt": (
        "STRING",
        {
            "default": "",
            "multiline": True,
            "tooltip": "What the picture shows. The model was made with the empty prompt; another one needs "
            "its text encoder.",
        },
    ),
    "negative_prompt": (
        "STRING",
        {
            "default": "",
            "multiline": True,
            "tooltip": "What the picture shall not show. Counts only with a guidance_scale above 1.",
        },
    ),
    "controlnet_conditioning_scale": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 2.0,
            "step": 0.05,
            "tooltip": "How strongly the frame before guides this one. Lower: less ghosting, more flicker.",
        },
    ),
    "control_guidance_start": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "Share of the denoising steps after which guidance by the frame before begins.",
        },
    ),
    "control_guidance_end": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "Share of the denoising steps after which guidance by the frame before ends.",
        },
    ),
    "use_tpm": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Whether the decoder, too, sees the frame before (Temporal Processor Module). Off: "
            "more flicker.",
        },
    ),
    "flow_scale": (
        [1.0, 0.5, 0.25],
        {
            "default": 1.0,
            "tooltip": "Size at which motion is estimated, as a share of the result's. Below 1: faster, less "
            "exact, and not what the model was made with.",
        },
    ),
    "memory_plan": (
        ["auto", "whole", "banded", "tiled"],
        {
            "default": "auto",
            "tooltip": "How memory is saved. whole: nothing is split. banded: less memory, the same picture. "
            "tiled: the least memory, the U-Net in tiles. auto: what fits, and the next one when memory "
            "runs out.",
        },
    ),
    "compile_mode": (
        ["off", "auto", "max"],
        {
            "default": "off",
            "tooltip": "torch.compile. auto: the first frame takes a minute or more, the others less time. "
            "max: tries more ways, and starts more slowly still. The log says where it cannot work.",
        },
    ),
}

FILE_WIDGETS: dict[str, Widget] = {
    "scene_cut": (
        ["auto", "off"],
        {
            "default": "auto",
            "tooltip": "auto: a new scene starts without memory of the one before. Acts in Upscale Video "
            "only; a batch of images is taken as one scene.",
        },
    ),
    "scene_cut_threshold": (
        "FLOAT",
        {
            "default": 27.0,
            "min": 0.0,
            "max": 255.0,
            "step": 0.5,
            "tooltip": "Mean HSV difference of two frames (0-255) from which on they are two scenes.",
        },
    ),
    "codec": (
        ["h264", "h265", "av1", "prores", "ffv1", "png"],
        {
            "default": "h264",
            "tooltip": "Codec of the file that Upscale Video writes. ffv1 and png lose nothing.",
        },
    ),
    "crf": (
        "INT",
        {
            "default": 18,
            "min": 0,
            "max": 63,
            "tooltip": "Quality of the file that Upscale Video writes: a lower number is better and larger. "
            "h264 and h265: 0-51, av1: 0-63; the other codecs have none.",
        },
    ),
    "pix_fmt": (
        ["auto", "yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"],
        {
            "default": "auto",
            "tooltip": "Pixel format of the file that Upscale Video writes. auto: the bit depth of the "
            "source, 4:2:0 where the codec has that.",
        },
    ),
}

LAST_WIDGETS: dict[str, Widget] = {
    "preset": (
        ["exact", "balanced", "fast"],
        {
            "default": "exact",
            "tooltip": "How exact the result is. exact: the reference's numbers. balanced: guidance by the "
            "frame before is computed in every second step only. fast: only once for a frame, with motion at "
            "half the size.",
        },
    ),
    "timestep_spacing": (
        [CHECKPOINT_SPACING, "trailing", "leading"],
        {
            "default": CHECKPOINT_SPACING,
            "tooltip": "Which noise levels the steps visit. checkpoint: as its scheduler file says, leading "
            "where that says nothing. The paper trained with 999, 749, 499, 249, which is trailing.",
        },
    ),
}

WIDGETS = {**ENGINE_WIDGETS, **FILE_WIDGETS, **LAST_WIDGETS}
"""In the order of the node, which never changes."""


@dataclass(frozen=True)
class SettingsValue:
    """What travels on the settings socket; empty means all defaults."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `UpscaleOptions`."""
    file: dict[str, Any] = field(default_factory=dict)
    """How Upscale Video reads and writes: the names of FILE_WIDGETS."""

    def options(self, **own: Any) -> UpscaleOptions:
        """The engine's options; what the node itself says wins."""
        from ..stream_diffvsr import UpscaleOptions

        return UpscaleOptions(**{**self.engine, **own})


class Settings:
    """Collects settings for the other nodes."""

    DESCRIPTION = (
        "Further settings for the Stream-DiffVSR nodes. Defaults are the model's own; most need none."
    )
    SEARCH_ALIASES: ClassVar = ["stream diffvsr options", "video upscale settings", "upscaler settings"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("For the settings input of Upscale, Upscale Video and Process Frame.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": WIDGETS}

    def execute(self, **values: Any) -> tuple[SettingsValue]:
        from ..stream_diffvsr.families.diffvsr.options import with_preset

        values = {name: values.get(name, spec["default"]) for name, (_, spec) in WIDGETS.items()}
        spacing = values["timestep_spacing"]
        engine = {name: values[name] for name in ENGINE_WIDGETS}
        engine |= {
            "flow_scale": float(values["flow_scale"]),
            "timestep_spacing": None if spacing == CHECKPOINT_SPACING else spacing,
        }
        engine = with_preset(values["preset"], engine)
        return (SettingsValue(engine, {name: values[name] for name in FILE_WIDGETS}),)
