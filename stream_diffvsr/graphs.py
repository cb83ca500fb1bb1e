"""The denoising loop as one CUDA graph: thousands of kernels are started at once and not one by one.

A graph repeats its kernels on the addresses that they were recorded with. So it belongs to one kind of frame,
what differs between frames is copied to where it was recorded, and weights must stay where they are. It is
used only if it repeats an ordinary run bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Loop = Callable[..., Tensor]
"""The work of a frame: a few tensors to one."""


class Recording(Protocol):
    """A loop that can be repeated."""

    inputs: list[Tensor]
    """Where the loop reads."""
    output: Tensor
    """Where it writes."""

    def replay(self) -> None:
        """Run the loop once more."""
        ...


class CudaRecording:
    """Recorded while the kernels are only taken down; everything they need must have been loaded before."""

    def __init__(self, loop: Loop, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Threads that read and write videos go on with their own copies meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.output = loop(*self.inputs)

    def replay(self) -> None:
        self._graph.replay()


class LoopGraph:
    """Runs a loop, from its third run of a kind on by a graph. It keeps one recording at a time."""

    def __init__(self, record: Callable[[Loop, Sequence[Tensor]], Recording] = CudaRecording) -> None:
        self._record = record
        self._key: Any = None
        self._recording: Recording | None = None
        self._given_up = False

    def run(
        self, key: Any, loop: Loop, inputs: Sequence[Tensor], has_room: Callable[[], bool] = lambda: True
    ) -> Tensor:
        """`loop(*inputs)`. Loops of equal keys and inputs of equal shapes are the same kernels.

        `has_room` tells, before recording, whether the loop's memory could be held from then on.
        """
        key = (key, [(x.shape, x.dtype, x.stride()) for x in inputs])
        if self._given_up or key != self._key:
            # The first run of a kind loads and compiles what recording needs.
            self._key, self._recording = key, None
            return loop(*inputs)
        if self._recording is not None:
            return _repeat(self._recording, inputs)
        result = loop(*inputs)
        if has_room():
            self._recording = self._recorded(loop, inputs, result)
        return result

    def give_up(self) -> bool:
        """Free the recording, and record no more; returns whether there was one."""
        held = self._recording is not None
        self._recording, self._given_up = None, True
        return held

    def _recorded(self, loop: Loop, inputs: Sequence[Tensor], expected: Tensor) -> Recording | None:
        try:
            recording = self._record(loop, inputs)
            if torch.equal(_repeat(recording, inputs), expected):
                return recording
            reason = "its numbers differ"
        except Exception as error:  # an optimisation: whatever is wrong with it, frames go on without
            reason = str(error).strip().partition("\n")[0]
        log.warning("the denoising loop runs without a CUDA graph: %s", reason)
        self._given_up = True
        return None


def _repeat(recording: Recording, inputs: Sequence[Tensor]) -> Tensor:
    for place, x in zip(recording.inputs, inputs, strict=True):
        place.copy_(x)
    recording.replay()
    return recording.output.clone()
