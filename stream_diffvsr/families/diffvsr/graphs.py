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
from torch.torch_version import TorchVersion

log = logging.getLogger(__name__)

UNWINDING = "2.15"
"""The torch whose sources were read to end a recording cleanly when it fails. Much older ones leave their
allocator and random numbers in the middle of it."""

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
        if TorchVersion(torch.__version__) < UNWINDING:
            raise RuntimeError(f"it needs torch {UNWINDING}, where a failed recording leaves no traces")
        device = inputs[0].device
        self.inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # torch's own stream for this is on the first device. Threads that read and write videos go on with
        # their copies meanwhile.
        stream = torch.cuda.Stream(device)
        recording = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
            self.output = loop(*self.inputs)

    def replay(self) -> None:
        self._graph.replay()


class LoopGraph:
    """At most one recorded loop, for frames of one kind; without `record` never any."""

    def __init__(self, record: Callable[[Loop, Sequence[Tensor]], Recording] | None) -> None:
        self._record = record
        self._key: Any = None
        self._recording: Recording | None = None

    @classmethod
    def on(cls, device: torch.device) -> LoopGraph:
        """For the loops of a device: CUDA's are recorded."""
        return cls(CudaRecording if device.type == "cuda" else None)

    @property
    def records(self) -> bool:
        """Whether loops are worth handing in."""
        return self._record is not None

    @property
    def holds_memory(self) -> bool:
        """Whether there is a recording, which keeps what the loop needs."""
        return self._recording is not None

    def repeat(self, key: Any, inputs: Sequence[Tensor]) -> Tensor | None:
        """The recorded loop's result for these inputs; None where there is none for this kind."""
        if self._recording is None or self._key != _kind(key, inputs):
            return None
        return _repeat(self._recording, inputs)

    def learn(
        self, key: Any, loop: Loop, inputs: Sequence[Tensor], result: Tensor, has_room: Callable[[], bool]
    ) -> None:
        """Record a loop that was just run as its `result` shows, if it is the second of its kind in turn.

        Loops of equal keys, on inputs of equal shapes, are the same kernels. The first run loads and compiles
        what recording needs. `has_room` tells whether the loop's memory could be held from now on.
        """
        kind = _kind(key, inputs)
        if kind != self._key:
            self._key, self._recording = kind, None
        elif self._record is not None and has_room():
            self._recording = self._recorded(self._record, loop, inputs, result)

    def give_up(self) -> bool:
        """Free the recording, and record no more; returns whether there was one."""
        held = self._recording is not None
        self._recording = self._record = None
        return held

    def _recorded(
        self, record: Callable[..., Recording], loop: Loop, inputs: Sequence[Tensor], expected: Tensor
    ) -> Recording | None:
        try:
            recording = record(loop, inputs)
            recording.output.fill_(torch.nan)  # so that only what is repeated can be equal
            if torch.equal(_repeat(recording, inputs), expected):
                return recording
            reason = "its numbers differ"
        except Exception as error:  # an optimisation: whatever is wrong with it, frames go on without
            first = error.__context__ or error  # ending a recording fails, too, with less to say
            reason = str(first).strip().partition("\n")[0]
        log.warning("the denoising loop runs without a CUDA graph: %s", reason)
        self._record = None
        return None


def _kind(key: Any, inputs: Sequence[Tensor]) -> Any:
    return key, [(x.shape, x.dtype, x.stride()) for x in inputs]


def _repeat(recording: Recording, inputs: Sequence[Tensor]) -> Tensor:
    for place, x in zip(recording.inputs, inputs, strict=True):
        place.copy_(x)
    recording.replay()
    return recording.output.clone()
