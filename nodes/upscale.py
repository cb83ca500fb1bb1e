"""The nodes that upscale pictures: a batch, or one frame of a loop."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor

from ..stream_diffvsr.families.diffvsr.state import StreamDiffVSRState
from . import host, layout
from .settings import SettingsValue
from .sockets import CATEGORY, PIPE_IN, SEED, SETTINGS_IN, STATE, STATE_IN, STATE_OUT, STEPS
from .state import one_picture

if TYPE_CHECKING:
    from ..stream_diffvsr import StreamDiffVSRPipeline, UpscaleOptions

log = logging.getLogger(__name__)


class Upscale:
    """Upscales a batch of images, which is a piece of video."""

    DESCRIPTION = (
        "Upscales frames by 4 with Stream-DiffVSR. The batch is time: frame 0 comes first, and each frame is "
        "guided by the one before. Link state from one Upscale to the next, or link meta_batch, and a video "
        "done in parts equals one done at once."
    )
    SEARCH_ALIASES: ClassVar = [
        "video super resolution",
        "vsr",
        "upscale video frames",
        "4x upscale",
        "diffvsr",
    ]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", STATE)
    RETURN_NAMES = ("images", "state")
    OUTPUT_TOOLTIPS = ("The frames, exactly 4 times as wide and high; alpha is kept.", STATE_OUT)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipe": PIPE_IN,
                "images": (
                    "IMAGE",
                    {"tooltip": "The frames in order: the batch dimension is time, frame 0 first."},
                ),
            },
            "optional": {
                "state": STATE_IN,
                "settings": SETTINGS_IN,
                "num_inference_steps": STEPS,
                "seed": SEED,
                "enable_tiling": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Run the U-Net in tiles: the least memory, and a slightly different "
                        "picture. Off: the memory_plan of Settings, whose auto takes tiles only where "
                        "nothing else fits.",
                    },
                ),
                "tile_size": (
                    "INT",
                    {
                        "default": 512,
                        "min": 256,
                        "max": 1024,
                        "step": 64,
                        "tooltip": "Tile size in output pixels. Only used when enable_tiling is on.",
                    },
                ),
                "tile_overlap": (
                    "INT",
                    {
                        "default": 64,
                        "min": 16,
                        "max": 256,
                        "step": 16,
                        "tooltip": "Overlap of the tiles in pixels of the result, below half of tile_size. "
                        "Only used when enable_tiling is on.",
                    },
                ),
                "meta_batch": (
                    "VHS_BatchManager",
                    {
                        "tooltip": "VideoHelperSuite's Meta Batch Manager: the sequence goes on from one "
                        "batch to the next."
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"},
        }

    def execute(
        self,
        pipe: StreamDiffVSRPipeline,
        images: Tensor,
        state: StreamDiffVSRState | None = None,
        settings: SettingsValue | None = None,
        num_inference_steps: int = 0,
        seed: int = 0,
        enable_tiling: bool = False,
        tile_size: int = 512,
        tile_overlap: int = 64,
        meta_batch: Any = None,
        unique_id: str | None = None,
        prompt: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, StreamDiffVSRState]:
        own: dict[str, Any] = {"num_inference_steps": num_inference_steps, "seed": seed}
        if enable_tiling:
            own |= {"memory_plan": "tiled", "tile_size": tile_size, "tile_overlap": tile_overlap}
        number = host.meta_batch_number(prompt, unique_id)
        batch = MetaBatch(self if meta_batch is None else meta_batch, unique_id, number)
        result, state = upscale(
            pipe, images, batch.resume(state), (settings or SettingsValue()).options(**own)
        )
        batch.keep(state)
        return result, state


class ProcessFrame:
    """Upscales one frame, for loops."""

    DESCRIPTION = "Upscales one frame by 4 and hands on the state, for loops that do one frame at a time."
    SEARCH_ALIASES: ClassVar = ["single frame upscale", "video loop upscale", "stream upscale"]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", STATE)
    RETURN_NAMES = ("image", "state")
    OUTPUT_TOOLTIPS = ("The frame, exactly 4 times as wide and high; alpha is kept.", STATE_OUT)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        state = "What the frame before left behind; from Create State for the first one."
        return {
            "required": {
                "pipe": PIPE_IN,
                "image": ("IMAGE", {"tooltip": "One frame; a batch is refused, Upscale takes those."}),
                "state": (STATE, {"tooltip": state}),
            },
            "optional": {"settings": SETTINGS_IN, "num_inference_steps": STEPS, "seed": SEED},
        }

    def execute(
        self,
        pipe: StreamDiffVSRPipeline,
        image: Tensor,
        state: StreamDiffVSRState,
        settings: SettingsValue | None = None,
        num_inference_steps: int = 0,
        seed: int = 0,
    ) -> tuple[Tensor, StreamDiffVSRState]:
        options = (settings or SettingsValue()).options(num_inference_steps=num_inference_steps, seed=seed)
        return upscale(
            pipe, one_picture(image, "image; a batch is for Stream-DiffVSR Upscale"), state, options
        )


def upscale(
    pipe: StreamDiffVSRPipeline, images: Tensor, state: StreamDiffVSRState | None, options: UpscaleOptions
) -> tuple[Tensor, StreamDiffVSRState]:
    """(N, H, W, C) in [0, 1] -> (N, 4H, 4W, C), and the state after the last frame."""
    layout.check_images(images)
    device = host.intermediate_device()
    result = layout.empty_result(images, device)
    progress = host.Progress(len(images))
    state = state or StreamDiffVSRState()
    host.make_room(pipe, (images.shape[1], images.shape[2]), options)
    for index, step in enumerate(pipe.stream(layout.lq_frames(images), options, state, host.check_interrupt)):
        layout.put(result, index, step.hq, images[index])
        progress.show(index + 1, result[index])
        state = step.state
    return result, state.to(device)


_sequences: WeakKeyDictionary[Any, dict[str | None, tuple[int, StreamDiffVSRState]]] = WeakKeyDictionary()
"""What each node of a running meta-batch goes on from; gone with the batch manager or the node."""


@dataclass(frozen=True)
class MetaBatch:
    """The place of a run in VideoHelperSuite's meta-batches, which queue the same prompt again and again."""

    holder: Any
    """Who lives as long as the meta-batch: its manager, or the node where the manager is not linked to it."""
    node_id: str | None
    number: int | None
    """Which batch this is, from 0; None outside of meta-batches."""

    def resume(self, given: StreamDiffVSRState | None) -> StreamDiffVSRState | None:
        """The state after the batch before; `given` in the first batch, and outside of meta-batches."""
        if not self.number:
            return given
        number, state = _sequences.get(self.holder, {}).get(self.node_id, (None, None))
        if number == self.number - 1:
            return state
        log.warning("meta-batch %d does not follow one of this node: a new sequence starts", self.number)
        return given

    def keep(self, state: StreamDiffVSRState) -> None:
        """Remember the state for the next batch; forget it after the last one."""
        kept = _sequences.setdefault(self.holder, {})
        kept.pop(self.node_id, None)
        if self.number is not None and not getattr(self.holder, "has_closed_inputs", False):
            kept[self.node_id] = self.number, state
