"""The node that upscales a video of any length from file to file, in constant memory."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..stream_diffvsr.errors import IncompatibleInputError
from . import files, host
from .job import LAST, check_output, choose_source, source_path, upscale_file
from .settings import SettingsValue
from .sizes import PRESET, SIZE, fidelity_widgets
from .sockets import CATEGORY, PIPE_IN, SEED, SETTINGS_IN, STEPS

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler


class UpscaleVideo:
    """Upscales a video file and writes the result to a new file."""

    DESCRIPTION = (
        "Upscales a video of any length by a factor of 4, from file to file in constant memory, and keeps "
        "its sound, timing and colours. Cancelling leaves a playable file with the finished part; queue the "
        "workflow again to resume."
    )
    SEARCH_ALIASES: ClassVar = [
        "upscale long video",
        "video file upscale",
        "video super resolution",
        "vsr video",
    ]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "VIDEO")
    RETURN_NAMES = ("output_path", "video")
    OUTPUT_TOOLTIPS = ("Path of the finished file.", "The finished file as a video, not loaded into memory.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipe": PIPE_IN},
            "optional": {
                "video_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Path of a video file or a folder of pictures, absolute or relative to "
                        "the input folder. Leave empty if video is connected.",
                    },
                ),
                "video": (
                    "VIDEO",
                    {"tooltip": "A video from Load Video or Create Video, instead of video_path."},
                ),
                "output_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "File to write in the output folder; a number is added if it already "
                        "exists. Leave empty for a numbered file in the subfolder stream_diffvsr, named "
                        "after the video.",
                    },
                ),
                "frames_per_batch": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 256,
                        "advanced": True,
                        "tooltip": "Number of frames to decode in advance; 0 means automatic. This never "
                        "changes the result.",
                    },
                ),
                "start_frame": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**31 - 1,
                        "advanced": True,
                        "tooltip": "First frame to upscale, counted from 0.",
                    },
                ),
                "end_frame": (
                    "INT",
                    {
                        "default": LAST,
                        "min": LAST,
                        "max": 2**31 - 1,
                        "advanced": True,
                        "tooltip": "Last frame to upscale, inclusive; -1 means the end of the video.",
                    },
                ),
                "num_inference_steps": STEPS,
                "seed": SEED,
                "settings": SETTINGS_IN,
                "preset": PRESET,
                "size": SIZE,
                **fidelity_widgets(),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, video_path: str | None = "", unique_id: str | None = None, **_: Any) -> str:
        return (files.file_stamp(source_path(video_path)) if video_path else "") + files.lost_stamp(unique_id)

    @classmethod
    def VALIDATE_INPUTS(cls, video_path: str | None = "", output_path: str | None = "") -> bool:
        """Raise errors instead of returning messages, which ComfyUI would repeat for every input."""
        if video_path and not source_path(video_path).exists():
            raise IncompatibleInputError(
                f"video_path must be a file or a folder of pictures; {source_path(video_path)} does not "
                "exist",
            )
        check_output(output_path)
        return True

    def execute(
        self,
        pipe: Upscaler,
        video_path: str = "",
        video: Any = None,
        output_path: str = "",
        unique_id: str | None = None,
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
        settings: SettingsValue | None = None,
        **widgets: Any,
    ) -> dict[str, Any]:
        metadata = host.workflow_metadata(prompt, extra_pnginfo)
        path = upscale_file(
            pipe,
            lambda: choose_source(video_path, video),
            settings or SettingsValue(),
            unique_id,
            metadata,
            output_path,
            **widgets,
        )
        return {"ui": host.shown_video(path), "result": (str(path), host.video_file(path))}
