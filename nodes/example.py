"""The node that provides a short clip, so that the examples run before the user has chosen a video."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from . import host
from .sockets import CATEGORY

CLIP = Path(__file__).parent.parent / "example_workflows" / "example.mp4"


class ExampleVideo:
    """Returns this pack's clip as a VIDEO, since ComfyUI's Load Video lists only the input folder's files."""

    DESCRIPTION = (
        "A short sample clip for trying things out: 128x72, two scenes of one second each, with sound. "
        "To use your own video, replace this node with Load Video."
    )
    SEARCH_ALIASES: ClassVar = ["sample video", "demo clip", "test video"]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("VIDEO", "STRING")
    RETURN_NAMES = ("video", "path")
    OUTPUT_TOOLTIPS = ("The clip as a video, like the output of Load Video.", "Path of the clip.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def execute(self) -> tuple[Any, str]:
        return host.video_file(CLIP), str(CLIP)
