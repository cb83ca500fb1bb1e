"""The only node that a beginner needs: it upscales a video."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from . import files, host
from .job import upscale_file, video_source
from .load import Loader, source_identity
from .settings import SettingsValue
from .sizes import QUALITY, SIZE
from .sockets import CATEGORY

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler


class SimpleUpscale:
    """Loader and Upscale Video in one node, with only the most important choices."""

    DESCRIPTION = (
        "Upscales a video, keeps its sound, and writes the result to the output folder. Choose a model, a "
        "quality and a size; nothing else is needed."
    )
    SEARCH_ALIASES: ClassVar = ["simple video upscale", "upscale video", "video super resolution", "4x video"]
    CATEGORY = CATEGORY
    ESSENTIALS_CATEGORY = "Video Tools"
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("VIDEO", "STRING")
    RETURN_NAMES = ("video", "output_path")
    OUTPUT_TOOLTIPS = ("The finished file as a video, not loaded into memory.", "Path of the finished file.")

    def __init__(self) -> None:
        self._pipe: Upscaler | None = None  # kept for the next run, since loading takes a long time

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        models, about = Loader.INPUT_TYPES()["required"]["model_version"]
        return {
            "required": {
                "video": ("VIDEO", {"tooltip": "A video from Load Video, Create Video or another node."}),
                "model": (models, {**about, "default": "nano"}),
                "quality": QUALITY,
                "size": SIZE,
            },
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, model: str, unique_id: str | None = None, **_: Any) -> str:
        return source_identity(model) + files.lost_stamp(unique_id)

    def execute(
        self,
        video: Any,
        model: str,
        quality: str = "exact",
        size: str = "4x",
        unique_id: str | None = None,
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        self._pipe = Loader().execute(model, "auto", "auto")[0]
        metadata = host.workflow_metadata(prompt, extra_pnginfo)
        settings = SettingsValue(family=self._pipe.info.family)
        path = upscale_file(
            self._pipe,
            lambda: video_source(video),
            settings,
            unique_id,
            metadata,
            preset=quality,
            size=size,
        )
        return {"ui": host.shown_video(path), "result": (host.video_file(path), str(path))}
