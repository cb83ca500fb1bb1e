"""The sizes and presets that the upscaling nodes offer."""

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
        "tooltip": "Size of the result: a multiple of the source, or the pixels of its shorter side. What "
        "the model does not make by itself is resampled once, after it.",
    },
)
PRESET: Widget = (
    [AS_SETTINGS, *PRESETS],
    {
        "default": AS_SETTINGS,
        "tooltip": f"settings: what the Settings node says, and exact without one. {PRESET_HELP}",
        "advanced": True,
    },
)
QUALITY: Widget = (list(PRESETS), {"default": "exact", "tooltip": PRESET_HELP})


def asked(size: str, info: Info) -> dict[str, Any]:
    """A size as fields of a job: none where the model makes it by itself."""
    if size.endswith("p"):
        return {"short_edge": int(size[:-1])}
    factor = float(size[:-1])
    own = size == OWN if info.scales is None else info.scales == (factor,)
    return {} if own else {"scale": factor}


def fitted_job(pipe: Upscaler, options: Any, size: str, height: int, width: int) -> VideoJob | None:
    """What frames of that size become, as the options and sizes of a job; None: what the model makes."""
    from ..stream_diffvsr.jobs.job import VideoJob, fitted

    if not (fields := asked(size, pipe.info)):
        return None
    job = VideoJob(source=Path(), output=Path(), options=options, **fields)
    return fitted(job, pipe.info, pipe.Options, height, width)
