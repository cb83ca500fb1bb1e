"""The sizes, presets and fidelity settings that the upscaling nodes offer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stream_diffvsr.families.diffvsr.options import PRESET_HELP, PRESETS
from .sockets import Widget

if TYPE_CHECKING:
    from ..stream_diffvsr.jobs.job import VideoJob
    from ..stream_diffvsr.upscaler import Info, Upscaler

OWN = "4x"
SIZES = ("2x", "3x", OWN, "720p", "1080p", "1440p", "2160p")
AS_SETTINGS = "settings"
SIZE: Widget = (
    list(SIZES),
    {
        "default": OWN,
        "tooltip": "Size of the result: a multiple of the source's size, or the length of the result's "
        "shorter side in pixels. If the model cannot produce that size itself, its result is resampled once.",
    },
)
PRESET: Widget = (
    [AS_SETTINGS, *PRESETS],
    {
        "default": AS_SETTINGS,
        "tooltip": f"settings: as set in the Settings node, or exact if none is linked. {PRESET_HELP}",
        "advanced": True,
    },
)
QUALITY: Widget = (list(PRESETS), {"default": "exact", "tooltip": PRESET_HELP})


def fidelity_widgets() -> dict[str, Widget]:
    """Return the widgets that set how closely the result follows its source."""
    from ..stream_diffvsr.jobs.job import VideoJob
    from ..stream_diffvsr.options import widgets

    return widgets(VideoJob, ("colour_fix", "strength"))


def size_fields(size: str, info: Info) -> dict[str, Any]:
    """Convert a size to fields of a job; return {} if the model produces that size itself."""
    if size.endswith("p"):
        return {"short_edge": int(size[:-1])}
    factor = float(size[:-1])
    own = size == OWN if info.scales is None else info.scales == (factor,)
    return {} if own else {"scale": factor}


def fitted_job(
    pipe: Upscaler, options: Any, height: int, width: int, size: str = OWN, **fidelity: Any
) -> VideoJob:
    """Return a job with the options and final size that apply to frames of `height` x `width`."""
    from ..stream_diffvsr.jobs.job import VideoJob, settle_job

    asked_for = {**size_fields(size, pipe.info), **fidelity} if size else fidelity
    job = VideoJob(source=Path(), output=Path(), options=options, **asked_for)
    return settle_job(job, pipe.info, pipe.Options, height, width)
