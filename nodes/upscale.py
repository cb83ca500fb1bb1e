"""The nodes that upscale images: a batch, or one frame at a time in a loop."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..stream_diffvsr.errors import IncompatibleInputError
from ..stream_diffvsr.upscaler import State, stream
from . import host, layout
from .pipes import memory_plan
from .settings import SettingsValue
from .sizes import AS_SETTINGS, PRESET, SIZE, fidelity_widgets, fitted_job
from .sockets import (
    CATEGORY,
    PIPE_IN,
    SEED,
    SETTINGS_IN,
    SINCE,
    STATE,
    STATE_IN,
    STATE_OUT,
    STEPS,
    check_values,
)
from .state import one_picture

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler

log = logging.getLogger(__name__)


class Upscale:
    """Upscales a batch of images, treated as consecutive frames of a video."""

    DESCRIPTION = (
        "Upscales frames by a factor of 4 with Stream-DiffVSR. The batch dimension is time: frame 0 comes "
        "first, and each frame is guided by the previous one. If you link state from one Upscale to the "
        "next, or link meta_batch, a video upscaled in parts is identical to one upscaled in a single run."
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
    OUTPUT_TOOLTIPS = ("The upscaled frames, exactly 4 times as wide and high; alpha is kept.", STATE_OUT)

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
                        "advanced": True,
                        "tooltip": "Run the U-Net in tiles, which needs the least memory but changes the "
                        "picture slightly. When this is off, memory_plan in Settings decides; its default, "
                        "auto, uses tiles only if nothing else fits.",
                    },
                ),
                "tile_size": (
                    "INT",
                    {
                        "default": 512,
                        "min": 256,
                        "max": 1024,
                        "step": 64,
                        "advanced": True,
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
                        "advanced": True,
                        "tooltip": "Overlap of the tiles in output pixels; must be less than half of "
                        "tile_size. Only used when enable_tiling is on.",
                    },
                ),
                "meta_batch": (
                    "VHS_BatchManager",
                    {
                        "tooltip": "Link VideoHelperSuite's Meta Batch Manager here, so that the sequence "
                        "continues from one batch to the next."
                    },
                ),
                "preset": PRESET,
                "size": SIZE,
                **fidelity_widgets(),
            },
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, enable_tiling: Any = None, tile_size: int | None = None, tile_overlap: int | None = None
    ) -> bool:
        """Raise the errors that a run would raise; a value of None means that the input is linked."""
        given = {"tile_size": tile_size, "tile_overlap": tile_overlap}
        check_values({name: cls.INPUT_TYPES()["optional"][name] for name in given}, given)
        if enable_tiling and tile_size and tile_overlap and 2 * tile_overlap >= tile_size:
            raise IncompatibleInputError(
                f"tile_overlap must be below half of tile_size {tile_size}, not {tile_overlap}"
            )
        return True

    def execute(
        self,
        pipe: Upscaler,
        images: Tensor,
        state: State | None = None,
        settings: SettingsValue | None = None,
        num_inference_steps: int = 0,
        seed: int = 0,
        enable_tiling: bool = False,
        tile_size: int = 512,
        tile_overlap: int = 64,
        meta_batch: Any = None,
        unique_id: str | None = None,
        prompt: Mapping[str, Any] | None = None,
        preset: str = AS_SETTINGS,
        size: str = "",
        **fidelity: Any,
    ) -> tuple[Tensor, State]:
        own: dict[str, Any] = {"num_inference_steps": num_inference_steps, "seed": seed}
        if enable_tiling:
            own |= {"memory_plan": "tiled", "tile_size": tile_size, "tile_overlap": tile_overlap}
        number = host.meta_batch_number(prompt, unique_id)
        batch = MetaBatch(self if meta_batch is None else meta_batch, unique_id, number)
        options = (settings or SettingsValue()).options(pipe, preset, **own)
        finish = batch.finishes(pipe, images, meta_batch is not None)
        state, images = batch.resume(state, images)
        result, state = upscale(pipe, images, state, options, size, finish, **fidelity)
        batch.keep(state, images[len(result) :])
        return result, state


class ProcessFrame:
    """Upscales a single frame, for use in loops."""

    DESCRIPTION = "Upscales one frame by a factor of 4 and passes on the state, for use in loops."
    SEARCH_ALIASES: ClassVar = ["single frame upscale", "video loop upscale", "stream upscale"]
    CATEGORY = CATEGORY
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", STATE)
    RETURN_NAMES = ("image", "state")
    OUTPUT_TOOLTIPS = ("The upscaled frame, exactly 4 times as wide and high; alpha is kept.", STATE_OUT)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        state = "State after the previous frame. For the first frame, link Create State."
        return {
            "required": {
                "pipe": PIPE_IN,
                "image": ("IMAGE", {"tooltip": "One frame. For a batch, use Stream-DiffVSR Upscale."}),
                "state": (STATE, {"tooltip": state}),
            },
            "optional": {"settings": SETTINGS_IN, "num_inference_steps": STEPS, "seed": SEED},
        }

    def execute(
        self,
        pipe: Upscaler,
        image: Tensor,
        state: State,
        settings: SettingsValue | None = None,
        num_inference_steps: int = 0,
        seed: int = 0,
    ) -> tuple[Tensor, State]:
        check_frame_by_frame(pipe)
        own: dict[str, Any] = {"num_inference_steps": num_inference_steps, "seed": seed}
        options = (settings or SettingsValue()).options(pipe, **own)
        return upscale(
            pipe, one_picture(image, "image", "use Stream-DiffVSR Upscale for a batch"), state, options
        )


def check_frame_by_frame(pipe: Upscaler) -> None:
    """Raise `IncompatibleInputError` for a model that processes frames in chunks."""
    if not pipe.info.frame_by_frame:
        raise IncompatibleInputError(
            f"{pipe.info.family} needs {pipe.info.first} frames before its first result: use Stream-DiffVSR "
            "Upscale, or a model that takes one frame at a time, such as nano or v1",
        )


def upscale(
    pipe: Upscaler,
    images: Tensor,
    state: State | None,
    options: Any,
    size: str = "",
    finish: bool = True,
    **fidelity: Any,
) -> tuple[Tensor, State]:
    """Upscale (N, H, W, C) in [0, 1] to (N, 4H, 4W, C) or to `size`; also return the state after the batch.

    `fidelity` sets how closely the result follows the images. It affects only the returned images, never
    the state.

    A model that processes frames in chunks finishes the batch as if the video ended there. The returned state
    is the one at the last chunk boundary plus the frames since then, which the next batch upscales again. The
    result is therefore the same as in a single run over all frames, except at the end of each batch. Without
    `finish`, the frames since that boundary are left out of the result.
    """
    from ..stream_diffvsr.jobs.job import Speed

    layout.check_images(images, pipe.info.minimum)
    device = host.intermediate_device()
    source = (images.shape[1], images.shape[2])
    job = fitted_job(pipe, options, *source, size, **fidelity)
    options = job.options
    border, since = opened(state or State())
    start = border.index + len(since)
    host.make_room(pipe, source, options)
    progress, speed, done = host.Progress(len(images), host.running_node()), Speed(), 0
    session = pipe.session(options, border, progress.step)
    result = layout.empty_result(images, job.sizes.output(*source), device)
    for step in stream(session, itertools.chain(since, layout.lq_frames(images)), finish):
        border = session.state() or border
        index = step.index - start
        if index < 0:
            continue  # from the previous batch, upscaled again
        lq = layout.to_frame(images[index, ..., : layout.COLOURS])
        layout.write_frame(result, index, job.finished(step.hq, lq, source), images[index])
        done = index + 1
        progress.show(done, result[index])
        speed.tick()
        line = host.frames_done(done, len(images), speed.fps) if len(images) > 1 else ""
        if told := "; ".join(filter(None, (line, memory_plan(border.provenance)))):
            progress.say(told, last=done == len(images))
    left = start + len(images) - border.index
    frames = [*since, *layout.lq_frames(images[max(0, len(images) - left) :])]
    return result[:done], closed(border, frames[len(frames) - left :], device)


def opened(state: State) -> tuple[State, list[Tensor]]:
    """Split a state into the state at the last chunk boundary and the frames since then."""
    if SINCE not in state.tensors:
        return state, []
    tensors = dict(state.tensors)
    frames = list(tensors.pop(SINCE).split(1))
    return replace(state, index=state.index - len(frames), tensors=tensors), frames


def closed(border: State, since: list[Tensor], device: torch.device) -> State:
    """Undo `opened`: merge the boundary state and the frames since then into one state on `device`."""
    if since:
        tensors = {**border.tensors, SINCE: torch.cat(since)}
        border = replace(border, index=border.index + len(since), tensors=tensors)
    return border.to(device)


_sequences: WeakKeyDictionary[Any, dict[str | None, tuple[int, State, Tensor]]] = WeakKeyDictionary()
"""The batch number, state and leftover images of each node in a running meta-batch.

An entry disappears together with its batch manager or node.
"""


@dataclass(frozen=True)
class MetaBatch:
    """A run's place in a series of meta-batches; VideoHelperSuite queues the prompt once for each."""

    holder: Any
    """An object that lives as long as the meta-batch: its manager, or the node if no manager is linked."""
    node_id: str | None
    number: int | None
    """The number of the batch, counted from 0, or None outside meta-batches."""

    @property
    def last(self) -> bool:
        """Whether this is the last batch; False if that is unknown, for example without a linked manager."""
        return self.number is None or getattr(self.holder, "has_closed_inputs", False)

    def finishes(self, pipe: Upscaler, images: Tensor, linked: bool) -> bool:
        """Whether the sequence ends with this batch; if not, a model that works in chunks needs more frames.

        Raise `IncompatibleInputError` for a model that works in chunks if the end is unknown, or if a batch
        might produce no frames, since VideoHelperSuite would then stop silently.
        """
        if pipe.info.frame_by_frame or self.number is None:
            return True
        if not linked:
            raise IncompatibleInputError(
                f"{pipe.info.family} also needs the Meta Batch Manager to be linked to meta_batch"
            )
        if not self.last and len(images) < pipe.info.first:
            raise IncompatibleInputError(
                f"{pipe.info.family} needs a frames_per_batch of at least {pipe.info.first}, "
                f"not {len(images)}"
            )
        return self.last

    def resume(self, given: State | None, images: Tensor) -> tuple[State | None, Tensor]:
        """Return the state after the previous batch, and `images` preceded by that batch's leftover images.

        In the first batch and outside meta-batches, return `given` and `images` unchanged.
        """
        if not self.number:
            return given, images
        number, state, waiting = _sequences.get(self.holder, {}).get(self.node_id, (None, None, None))
        if state is not None and waiting is not None and number == self.number - 1:
            return opened(state)[0], torch.cat([waiting, images]) if len(waiting) else images
        log.warning(
            "meta-batch %d does not follow the last one this node upscaled: starting a new sequence",
            self.number,
        )
        return given, images

    def keep(self, state: State, waiting: Tensor) -> None:
        """Store the state and the leftover images for the next batch; discard them after the last one."""
        kept = _sequences.setdefault(self.holder, {})
        kept.pop(self.node_id, None)
        if not self.last:
            kept[self.node_id] = self.number or 0, state, waiting.clone()
