"""The node that continues its sequence from one workflow run to the next, for live input such as a webcam."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .settings import SettingsValue
from .sockets import CATEGORY, PIPE_IN, SEED, SETTINGS_IN, STEPS
from .state import one_picture
from .upscale import check_frame_by_frame, upscale

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import State, Upscaler


class Live:
    """Upscales one frame per workflow run; the next run continues the sequence."""

    DESCRIPTION = (
        "Upscales one frame each time the workflow runs, guided by the previous run's frame. Use it with "
        "automatic queueing for live input, such as a webcam or a screen."
    )
    SEARCH_ALIASES: ClassVar = ["webcam upscale", "live upscale", "real time upscale", "screen upscale"]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "info")
    OUTPUT_TOOLTIPS = (
        "The upscaled frame, exactly 4 times as wide and high; alpha is kept.",
        "The frame's number in its sequence and, if a new sequence began, the reason.",
    )

    def __init__(self) -> None:
        self._sequence: tuple[Any, State | None] = ((), None)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        reset = (
            "Start a new sequence with this frame, for example after a cut. While this is on, every frame "
            "starts a new sequence."
        )
        return {
            "required": {
                "pipe": PIPE_IN,
                "image": ("IMAGE", {"tooltip": "One frame. For a batch, use Stream-DiffVSR Upscale."}),
            },
            "optional": {
                "settings": SETTINGS_IN,
                "num_inference_steps": STEPS,
                "seed": SEED,
                "reset": ("BOOLEAN", {"default": False, "tooltip": reset}),
            },
            "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # an unchanged picture is still a new frame

    def execute(
        self,
        pipe: Upscaler,
        image: Tensor,
        settings: SettingsValue | None = None,
        num_inference_steps: int = 0,
        seed: int = 0,
        reset: bool = False,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, str]:
        check_frame_by_frame(pipe)
        one_picture(image, "image", "use Stream-DiffVSR Upscale for a batch")
        options = (settings or SettingsValue()).options(
            pipe, num_inference_steps=num_inference_steps, seed=seed
        )
        # ComfyUI keeps a node's instance by its id, which a node in another workflow may share.
        workflow = ((extra_pnginfo or {}).get("workflow") or {}).get("id")
        height, width = image.shape[1:3]
        kind = {"workflow": workflow, "model": pipe.info.model, "size": f"{width}x{height}"}
        before, state = self._sequence
        why = "reset is on" if reset else "first run" if state is None else ""
        if not why:
            why = ", ".join(f"different {name}" for name in kind if kind[name] != before[name])
        result, state = upscale(pipe, image, None if why else state, options)
        self._sequence = kind, state
        told = f"frame {state.index}, {width}x{height} to {result.shape[2]}x{result.shape[1]}"
        return result, f"{told}; new sequence ({why})" if why else told
