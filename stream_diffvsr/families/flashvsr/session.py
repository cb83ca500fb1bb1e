"""One sequence: frames are collected until a chunk is whole, and the last chunk is filled up."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import IncompatibleInputError
from ...tensors import check_finite, check_frame
from ...upscaler import OnStep, State, Upscaled
from .options import FlashVSROptions
from .state import AHEAD, Memory, size_of

if TYPE_CHECKING:
    from .method import FlashVSR

log = logging.getLogger(__name__)


class FlashVSRSession:
    """The first 21 results come with frame 25 of a scene, then 8 with each 8 frames, the rest at the end.

    A session that continues from a state is fed from frame `state.index` on: the 4 frames that the state's
    last chunk looked ahead at come again.
    """

    def __init__(
        self,
        upscaler: FlashVSR,
        options: FlashVSROptions,
        state: State | None,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> None:
        self._upscaler, self._options, self._on_step = upscaler, options, on_step
        self._memory = Memory.of(state, upscaler.device, upscaler.dtype)
        self._frames: list[Tensor] = []
        """From the first one without a result on."""
        self._size = size_of(state) if state and state.has_previous else None
        self._finished = False
        if noise is not None:
            if noise.ndim != 5 or noise.shape[:2] != (1, upscaler.channels) or not noise.is_floating_point():
                expected = f"noise of shape (1, {upscaler.channels}, latents, height / 8, width / 8)"
                raise IncompatibleInputError(expected, str(tuple(noise.shape)))
            check_finite(noise, "noise")
        self._noise = noise
        if state and state.has_previous:
            self._check(state)

    def push(self, lq: Tensor) -> list[Upscaled]:
        """The next frame, (1, 3, h, w) float32; the frames finished by it: none, 21 or 8."""
        if self._finished:
            raise IncompatibleInputError(
                "no frame after the end of a sequence", "another one: begin a session"
            )
        check_frame(lq)
        size = lq.shape[-2], lq.shape[-1]
        if size != (self._size or size):
            raise IncompatibleInputError(
                f"a frame of the sequence's size {self._size} (height, width)", str(size)
            )
        frames = [*self._frames, lq.to(self._upscaler.device, copy=True)]
        if len(frames) < self._memory.frames:
            self._frames, self._size = frames, size
            return []
        results, self._memory = self._chunk(frames, self._memory)
        self._frames, self._size = frames[len(results) :], size
        return results

    def finish(self) -> list[Upscaled]:
        """The rest: the last frame is repeated until its result is there, and what is beyond is cut off."""
        memory, frames, results = self._memory, self._frames, []
        last = memory.index + len(frames)
        while memory.index < last:
            frames = [*frames, *[frames[-1]] * (memory.frames - len(frames))]
            finished, memory = self._chunk(frames, memory)
            frames = frames[len(finished) :]
            results += finished
        self._finished, self._frames = True, []
        return [result for result in results if result.index < last]

    def state(self) -> State | None:
        """After a whole chunk, or where nothing was pushed; None in between, and at the end."""
        ahead = AHEAD if self._memory.latents else 0
        if self._finished or len(self._frames) > ahead:
            return None
        size = self._size or (0, 0)
        return self._memory.to_state(size, self._upscaler.provenance(size, self._options))

    def _chunk(self, frames: list[Tensor], memory: Memory) -> tuple[list[Upscaled], Memory]:
        hq, after = self._upscaler.chunk(frames, memory, self._options, self._on_step, self._noise)
        return [Upscaled(memory.index + offset, each) for offset, each in enumerate(hq)], after

    def _check(self, state: State) -> None:
        """Refuse a state that does not fit, and say where it was made otherwise."""
        before, now = state.provenance, self._upscaler.provenance(size_of(state), self._options)
        if before.model not in ("", now.model):
            raise IncompatibleInputError(f"a state of model {now.model}", f"one of model {before.model}")
        for name in ("scale", "decoder"):
            old, new = before.options.get(name, now.options[name]), now.options[name]
            if old != new:
                raise IncompatibleInputError(f"{name} {old!r}, as in the state's frames", repr(new))
        if differences := before.differences(now):
            log.warning("not an exact continuation of frame %d: %s", state.index, differences)
