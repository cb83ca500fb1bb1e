"""A tiny model of another shape: 25 frames in before 21 come out, then 8 by 8, with a memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from stream_diffvsr import upscaler
from stream_diffvsr.tensors import upsample
from stream_diffvsr.upscaler import FixedPlacement, Info, Provenance, State, Upscaled

FIRST, CHUNK, AHEAD = 25, 8, 4


@dataclass(frozen=True)
class ChunkOptions:
    strength: float = 0.3


class ChunkUpscaler:
    """Every result depends on all chunks before it, and on the four frames that follow its chunk."""

    Options = ChunkOptions

    def __init__(self) -> None:
        self.placement = FixedPlacement(torch.device("cpu"))
        self.device, self.dtype, self.networks = torch.device("cpu"), torch.float32, {}

    @property
    def info(self) -> Info:
        return Info("chunks", "tiny", "float32", first=FIRST, chunk=CHUNK, look_ahead=FIRST - 1)

    def provenance(self, size, options=None) -> Provenance:
        return Provenance("tiny", "float32", "torch", asdict(options or ChunkOptions()))

    def bytes_needed(self, size, options=None) -> int:
        return 1000 * math.prod(size)

    def session(self, options=None, state=None, on_step=None, noise=None):
        return ChunkSession(
            self, options or ChunkOptions(), state or State(), on_step or upscaler.ignore_progress
        )

    def stream(self, frames, options=None, state=None, on_step=None, noise=None):
        return upscaler.stream(self.session(options, state, on_step), frames)


class ChunkSession:
    def __init__(self, model, options, state, on_step) -> None:
        self.model, self.options, self.on_step = model, options, on_step
        self.index, self.memory = state.index, state.tensors.get("memory")
        self.waiting: list[torch.Tensor] = []
        self.at_border = True

    def push(self, lq):
        self.waiting.append(lq)
        size = FIRST - AHEAD if self.memory is None else CHUNK
        self.at_border = len(self.waiting) == size + AHEAD
        return self._chunk(size, size) if self.at_border else []

    def finish(self):
        missing, results = len(self.waiting), []
        while missing > 0:
            size = FIRST - AHEAD if self.memory is None else CHUNK
            self.waiting += [self.waiting[-1]] * (size + AHEAD - len(self.waiting))
            results += self._chunk(size, min(size, missing))
            missing -= size
        self.waiting, self.at_border = [], False
        return results

    def _chunk(self, size, wanted):
        self.on_step("chunk", 1, 1)
        ahead = torch.stack(self.waiting[: size + AHEAD]).mean(0)
        before = torch.zeros_like(ahead) if self.memory is None else self.memory
        results = []
        for lq in self.waiting[:wanted]:
            guided = lq + self.options.strength * before + 0.1 * ahead
            results.append(Upscaled(self.index, upsample(guided)))
            self.index += 1
        self.memory = torch.tanh(0.5 * before + torch.stack(self.waiting[:size]).mean(0))
        self.waiting = self.waiting[size:]
        return results

    def state(self):
        if not self.at_border:
            return None
        tensors = {} if self.memory is None else {"memory": self.memory}
        return State("chunks", self.index, tensors, self.model.provenance((8, 8), self.options))
