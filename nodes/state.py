"""The nodes that create, inspect, save and load states."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..stream_diffvsr.errors import IncompatibleInputError
from ..stream_diffvsr.families.diffvsr.state import StreamDiffVSRState
from ..stream_diffvsr.tensors import SCALE
from ..stream_diffvsr.upscaler import State
from . import files, layout
from .sockets import ADVANCED, SINCE, STATE, STATE_OUT

BLACK_SIDE = 8
"""The side of the black picture shown for an empty state."""


class CreateState:
    """Creates an empty state, or one that continues from a given upscaled frame."""

    DESCRIPTION = (
        "Creates the state that a sequence starts from, either empty or with initial_frame as the last "
        "upscaled frame."
    )
    SEARCH_ALIASES: ClassVar = ["start sequence", "reset state", "new video upscale state"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (STATE,)
    RETURN_NAMES = ("state",)
    OUTPUT_TOOLTIPS = (
        "The state to start from; its frame_index is 1 if initial_frame is given, otherwise 0.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        frame = (
            "An upscaled frame from which the sequence continues. Its width and height must be multiples "
            "of 4."
        )
        lq = (
            "The same frame before upscaling, at a quarter of the width and height. Leave unconnected to "
            "compute it from initial_frame by area averaging."
        )
        return {
            "optional": {
                "initial_frame": ("IMAGE", {"tooltip": frame}),
                "initial_lq": ("IMAGE", {"tooltip": lq}),
            }
        }

    def execute(
        self, initial_frame: Tensor | None = None, initial_lq: Tensor | None = None
    ) -> tuple[StreamDiffVSRState]:
        if initial_frame is None and initial_lq is not None:
            raise IncompatibleInputError("initial_lq can only be used together with initial_frame")
        if initial_frame is None:
            return (StreamDiffVSRState(),)
        hq = layout.to_model(one_picture(initial_frame, "initial_frame"))
        lq = reduced(hq) if initial_lq is None else layout.to_model(one_picture(initial_lq, "initial_lq"))
        return (StreamDiffVSRState(previous_hq=hq, previous_lq=lq, frame_index=1),)


class ExtractState:
    """Shows the contents of a state."""

    DESCRIPTION = (
        "Shows what a state contains: the last upscaled frame, the number of frames done, and the settings."
    )
    SEARCH_ALIASES: ClassVar = ["state info", "last frame", "inspect state"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", "INT", "BOOLEAN", "STRING")
    RETURN_NAMES = ("previous_frame", "frame_index", "has_previous", "info")
    OUTPUT_TOOLTIPS = (
        "The last upscaled frame, or a black 8x8 picture if the state is empty.",
        "How many frames of the video have been upscaled so far.",
        "Whether there is a frame to continue from.",
        "A text summary that includes the model and the settings used.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"state": (STATE, {"tooltip": "The state to inspect."})}}

    def execute(self, state: State) -> tuple[Tensor, int, bool, str]:
        hq = state.tensors.get("previous_hq")
        if hq is None:
            frame = torch.zeros((1, BLACK_SIDE, BLACK_SIDE, layout.COLOURS))
        else:
            frame = layout.from_hq(hq.cpu())
        return frame, state.index, state.has_previous, describe(state)


class SaveState:
    """Writes a state to a numbered file in the output folder."""

    DESCRIPTION = (
        "Saves a state to a numbered file in the output folder, so that you can continue the sequence "
        "another day and get the same result, bit for bit."
    )
    SEARCH_ALIASES: ClassVar = ["save video state", "checkpoint state", "resume later"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("state_file",)
    OUTPUT_TOOLTIPS = ("Path of the file.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = (
            "Path of the file within the output folder; a number is appended. %year%, %month%, %day%, "
            "%hour%, %minute% and %second% become the current date and time."
        )
        return {
            "required": {
                "state": (STATE, {"tooltip": "The state to save."}),
                "filename_prefix": ("STRING", {"default": "stream_diffvsr/state", "tooltip": prefix}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **_: Any) -> str:
        return files.lost_stamp(unique_id)

    def execute(self, state: State, filename_prefix: str, unique_id: str | None = None) -> dict[str, Any]:
        path = files.numbered(filename_prefix, files.STATE_SUFFIX)
        state.save(path)
        files.remember_made(unique_id, path)
        return {"ui": {"text": [str(path)]}, "result": (str(path),)}


class LoadState:
    """Reads a saved state."""

    DESCRIPTION = "Loads a state that Save State wrote, so that Upscale continues as if it had never stopped."
    SEARCH_ALIASES: ClassVar = ["resume video upscale", "continue upscale", "restore state"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (STATE,)
    RETURN_NAMES = ("state",)
    OUTPUT_TOOLTIPS = (STATE_OUT,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "Saved states in the output and input folders, newest first; reload the page after saving one."
        )
        return {"required": {"state_file": (files.saved_states(), {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, state_file: str) -> str:
        return files.file_stamp(files.state_path(state_file))

    @classmethod
    def VALIDATE_INPUTS(cls, state_file: str) -> bool | str:
        path = files.state_path(state_file)
        return (
            path.is_file()
            or f"There is no saved state {path}: run Stream-DiffVSR Save State first, or choose another file."
        )

    def execute(self, state_file: str) -> tuple[State]:
        state = State.load(files.state_path(state_file))
        return (StreamDiffVSRState.of(state) if state.family in ("", "diffvsr") else state,)


def one_picture(image: Tensor, name: str, remedy: str = "pass one of its frames") -> Tensor:
    """Check that `image` is a single picture, (1, H, W, 3 or 4), and return it."""
    layout.check_images(image)
    if len(image) != 1:
        raise IncompatibleInputError(f"{name} must be one picture, not a batch of {len(image)}: {remedy}")
    return image


def reduced(hq: Tensor) -> Tensor:
    """Reduce (1, 3, 4h, 4w) to (1, 3, h, w) by averaging each 4x4 square."""
    height, width = hq.shape[-2:]
    if height % SCALE or width % SCALE:
        raise IncompatibleInputError(
            f"the width and height of initial_frame must be multiples of {SCALE}, not {width}x{height}"
        )
    return F.avg_pool2d(hq, SCALE)


def describe(state: State) -> str:
    """Describe a state in a few lines of text."""
    lq, since = state.tensors.get("previous_lq"), state.tensors.get(SINCE)
    if lq is not None:
        height, width = lq.shape[-2:]
        frame = f"previous frame {width}x{height}, upscaled {SCALE * width}x{SCALE * height}"
    elif state.has_previous:
        frame = f"{state.family} data, {state.nbytes / 1e6:.1f} MB; the picture is black"
    else:
        frame = f"no previous frame, so the picture is black ({BLACK_SIDE}x{BLACK_SIDE})"
    lines = [f"frames done: {state.index}", frame]
    if since is not None:
        lines.append(
            f"The last {len(since)} frames belong to an unfinished chunk and will be computed again "
            "before the next batch."
        )
    texts = sorted(state.provenance.to_texts().items())
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in texts)])
