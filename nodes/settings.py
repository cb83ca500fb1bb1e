"""The settings nodes, for all options without a widget on the upscaling nodes."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..stream_diffvsr.errors import IncompatibleInputError
from ..stream_diffvsr.options import from_widgets
from .pipes import how_made
from .sockets import ADVANCED, SETTINGS, Widget, check_values

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler

ENGINE = (
    "guidance_scale",
    "prompt",
    "negative_prompt",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "use_tpm",
    "flow_scale",
    "memory_plan",
    "compile_mode",
)
"""Engine options in the order of their widgets, which never changes; options added later are in LAST."""
LAST = ("timestep_spacing", "occlusion")
FILE = ("scene_cut", "scene_cut_threshold", "codec", "crf", "pix_fmt")
"""Options for how Upscale Video reads and writes files."""
H26X_CRF = 51
"""The largest crf that h264 and h265 support."""
CODECS = ("h264", "h265", "av1", "prores", "ffv1", "png")
PIXEL_FORMATS = ("auto", "yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")


def file_widgets() -> dict[str, Widget]:
    """Return the widgets for the options in FILE."""
    from ..stream_diffvsr.jobs.job import VideoJob
    from ..stream_diffvsr.jobs.scenes import THRESHOLD
    from ..stream_diffvsr.options import rules

    told = {name: rule.help for name, rule in rules(VideoJob).items()}
    pix_fmt = f"{told['pix_fmt']} auto: {rules(VideoJob)['pix_fmt'].unset_help}."
    made: dict[str, Widget] = {
        "scene_cut": (
            ["auto", "off"],
            {
                "default": "auto",
                "tooltip": "auto: the model starts each scene afresh. Only Upscale "
                "Video detects scenes; a batch of images is treated as one scene.",
            },
        ),
        "scene_cut_threshold": (
            "FLOAT",
            {
                "default": THRESHOLD,
                "min": 0.0,
                "max": 255.0,
                "step": 0.5,
                "tooltip": "A new scene begins where the mean HSV difference between two frames (0 to "
                "255) reaches this value.",
            },
        ),
        "codec": (list(CODECS), {"default": "h264", "tooltip": told["codec"]}),
        "crf": ("INT", {"default": 18, "min": 0, "max": 63, "tooltip": told["crf"]}),
        "pix_fmt": (list(PIXEL_FORMATS), {"default": "auto", "tooltip": pix_fmt}),
    }
    return {name: (kind, {**about, "advanced": True}) for name, (kind, about) in made.items()}


def with_defaults(widgets: dict[str, Widget], values: dict[str, Any]) -> dict[str, Any]:
    """Return a value for every widget; refuse a crf that the codec does not support."""
    given = {name: about["default"] for name, (_, about) in widgets.items()} | values
    if given["codec"] in ("h264", "h265") and given["crf"] > H26X_CRF:
        raise IncompatibleInputError(
            f"crf must be at most {H26X_CRF} for {given['codec']}, not {given['crf']}"
        )
    return given


def settings_widgets() -> dict[str, Widget]:
    """Return all widgets of the node; their order never changes."""
    from ..stream_diffvsr.families.diffvsr.options import PRESET_HELP, PRESETS, UpscaleOptions
    from ..stream_diffvsr.options import widgets

    preset: Widget = (list(PRESETS), {"default": "exact", "tooltip": PRESET_HELP})
    last = widgets(UpscaleOptions, LAST)
    return {**widgets(UpscaleOptions, ENGINE), **file_widgets(), "preset": preset, **last}


@dataclass(frozen=True)
class SettingsValue:
    """The value passed through a settings socket; if it is empty, all defaults apply."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Values for fields of the family's options."""
    file: dict[str, Any] = field(default_factory=dict)
    """Values for the options in FILE, for Upscale Video."""

    family: str = "diffvsr"

    def options(self, pipe: Upscaler | None = None, preset: str = "settings", **own: Any) -> Any:
        """Return options for the family of `pipe` (Stream-DiffVSR if None); `own` takes precedence.

        A `preset` chosen on the node replaces the one from Settings, along with every option that presets
        can set. The compile mode of a Runtime node overrides any other. Options that the family lacks are
        left out. Raise `IncompatibleInputError` for settings of another family.
        """
        from ..stream_diffvsr.load import FAMILIES
        from ..stream_diffvsr.options import rules

        family = pipe.info.family if pipe else "diffvsr"
        cls = FAMILIES[family].options
        if self.engine and self.family != family:
            ours, model = FAMILIES[self.family].title, FAMILIES[family].title
            raise IncompatibleInputError(f"these are {ours} settings, but the model is {model}")
        own = {name: value for name, value in own.items() if name in rules(cls)}
        engine = dict(self.engine)
        if preset != "settings":
            presets = FAMILIES[family].presets
            for name in itertools.chain(*presets.values()):
                engine.pop(name, None)
            engine |= presets.get(preset, {})
        mode = how_made(pipe).compile_mode if pipe else None
        if mode is not None and "compile_mode" in rules(cls):
            engine["compile_mode"] = mode
        return cls(**{**engine, **from_widgets(cls, own)})


class Settings:
    """Collects settings for the other nodes."""

    DESCRIPTION = (
        "Further settings for the Stream-DiffVSR nodes. The defaults are the model's own and suit most uses."
    )
    SEARCH_ALIASES: ClassVar = ["stream diffvsr options", "video upscale settings", "upscaler settings"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("For the settings input of Upscale, Upscale Video and Process Frame.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": settings_widgets()}

    @classmethod
    def VALIDATE_INPUTS(cls, **values: Any) -> bool:
        check_values(settings_widgets(), values)
        cls().execute(**{name: value for name, value in values.items() if value is not None})
        return True

    def execute(self, **values: Any) -> tuple[SettingsValue]:
        from ..stream_diffvsr.families.diffvsr.options import PRESETS, UpscaleOptions
        from ..stream_diffvsr.options import defaults, with_preset

        values = with_defaults(settings_widgets(), values)
        engine = from_widgets(UpscaleOptions, {name: values[name] for name in (*ENGINE, *LAST)})
        file = {name: values[name] for name in FILE}
        # Widgets always have a value, so the preset applies to every option left at its default.
        default = defaults(UpscaleOptions)
        changed = {name: value for name, value in engine.items() if value != default[name]}
        UpscaleOptions(**engine)  # raises if options contradict each other
        return (SettingsValue(with_preset(PRESETS, values["preset"], changed), file),)


class FamilySettings:
    """Base class for the settings node of another family, generated from that family's options."""

    FAMILY: ClassVar[str]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("For the settings input of Upscale and Upscale Video.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": family_widgets(cls.FAMILY)}

    @classmethod
    def VALIDATE_INPUTS(cls, **values: Any) -> bool:
        check_values(family_widgets(cls.FAMILY), values)
        cls().execute(**{name: value for name, value in values.items() if value is not None})
        return True

    def execute(self, **values: Any) -> tuple[SettingsValue]:
        from ..stream_diffvsr.load import FAMILIES

        given = with_defaults(family_widgets(self.FAMILY), values)
        file = {name: given.pop(name) for name in FILE}
        engine = from_widgets(FAMILIES[self.FAMILY].options, given)
        FAMILIES[self.FAMILY].options(**engine)  # raises if options contradict each other
        return (SettingsValue(engine, file, self.FAMILY),)


class FlashVSRSettings(FamilySettings):
    FAMILY = "flashvsr"
    DESCRIPTION = "Settings for a FlashVSR model. The defaults are the published values and suit most uses."
    SEARCH_ALIASES: ClassVar = ["flashvsr options", "flash vsr settings"]


class SwiftVRSettings(FamilySettings):
    FAMILY = "swiftvr"
    DESCRIPTION = "Settings for a SwiftVR model. The defaults are the published values and suit most uses."
    SEARCH_ALIASES: ClassVar = ["swiftvr options", "swift vr settings"]


class ImageSettings(FamilySettings):
    FAMILY = "image"
    DESCRIPTION = (
        "Settings for a single-image model from upscale_models, such as how strongly to suppress flicker."
    )
    SEARCH_ALIASES: ClassVar = ["image model video settings", "steady upscale", "upscale model flicker"]


def family_widgets(family: str) -> dict[str, Widget]:
    """Return widgets for a family's options that the upscaling nodes do not offer, then the file widgets."""
    from ..stream_diffvsr.load import FAMILIES
    from ..stream_diffvsr.options import rules, widgets

    options = FAMILIES[family].options
    own = [name for name, rule in rules(options).items() if name != "seed" and not rule.hidden]
    return {**widgets(options, own), **file_widgets()}
