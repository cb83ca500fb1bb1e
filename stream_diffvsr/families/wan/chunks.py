"""Base class of models that process frames in chunks, and the session that collects the frames."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import chain
from threading import Lock
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...devices import repeatable
from ...errors import CheckpointError, IncompatibleInputError, VRAMError
from ...memory import LiveTensors, free_memory, is_out_of_memory, on_meta, release_caches
from ...tensors import check_frame, is_finite
from ...upscaler import (
    FixedPlacement,
    Info,
    OnStep,
    Placement,
    Provenance,
    State,
    Upscaled,
    ignore_progress,
    stream,
)
from .attention import FusedAttention, attention, check_attention
from .state import size_of

log = logging.getLogger(__name__)

MEGABYTE = 2**20


class Memory(Protocol):
    """The memory carried from chunk to chunk; it is immutable, so a chunk that fails does not affect it."""

    @property
    def index(self) -> int:
        """The number of frames finished so far in the whole video."""
        ...

    @property
    def ahead(self) -> int:
        """The number of frames, from `index` on, that earlier chunks have already seen."""
        ...

    def to_state(self, size: tuple[int, int], provenance: Provenance) -> State:
        """Return the state after frame `index` - 1; the next frame to push is `index`."""
        ...


def result_size(lq: Tensor, options: Any) -> tuple[int, int]:
    """Return the height and width of a frame's result."""
    return round(lq.shape[-2] * options.scale), round(lq.shape[-1] * options.scale * options.stretch)


class ChunkUpscaler(ABC):
    """Base class of all models that process frames in chunks; each family defines how to compute a chunk."""

    Options: ClassVar[Any]
    Memory: ClassVar[Any]
    """The family's memory class, with a constructor `of(state, device, dtype)`; `Memory()` begins a scene."""
    remedy: ClassVar[str]
    """Advice for the user if memory runs out."""
    fixed: ClassVar[tuple[str, ...]]
    """Options that must stay the same when a state is continued."""
    info: Info

    def __init__(
        self,
        *,
        networks: Mapping[str, nn.Module],
        prompt: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        model: str,
    ) -> None:
        """Wrap loaded `networks` (by stage), a `prompt` (1, tokens, width) and the `model` fingerprint."""
        self.networks, self.prompt, self.device, self.dtype = networks, prompt, device, dtype
        self.placement: Placement = FixedPlacement(device)
        self.model, self.number_format = model, str(dtype).removeprefix("torch.")
        self.offloaded = False
        """Whether idle blocks are kept in system memory, because memory ran out or the options ask for it."""
        self._needs = lru_cache(maxsize=64)(self._count)
        self._lock = Lock()

    def use_attention(self, name: str) -> None:
        """Use one of `ATTENTIONS` for self-attention from now on; states record the choice.

        Call this only before the first frame. Raises the same errors as `attention.check_attention`.
        """
        check_attention(name, self.device, self.dtype)
        if name == "auto":
            return
        transformer: Any = self.networks["transformer"]
        for block in transformer.blocks:
            block.attn1.processor.attend = self.attend_by(name)
        self.number_format += f", attention {name}"
        self.info = replace(self.info, number_format=self.number_format)

    def attend_by(self, name: str) -> Any:
        """Return the attention function for a block's processor to call."""
        return attention(name)

    @abstractmethod
    def whole(self, memory: Any, options: Any) -> int:
        """Return how many frames the next chunk needs, counted from `memory.index`."""

    @abstractmethod
    def filled(self, frames: list[Tensor], memory: Any, options: Any) -> list[Tensor]:
        """Return the next chunk's frames at the end of a sequence: `frames`, padded or cut as needed."""

    @abstractmethod
    def _chunk(
        self,
        frames: Sequence[Tensor],
        memory: Any,
        options: Any,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> tuple[list[Tensor], Any]:
        """Return the results for the frames from `memory.index` on, and the new memory."""

    def session(
        self,
        options: Any = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> ChunkSession:
        """Begin a scene at frame `state.index`, or continue one; see `ChunkSession`."""
        return ChunkSession(self, options or self.Options(), state, on_step or ignore_progress, noise)

    def stream(
        self,
        frames: Iterable[Tensor],
        options: Any = None,
        state: State | None = None,
        on_step: OnStep | None = None,
        noise: Tensor | None = None,
    ) -> Iterator[Upscaled]:
        """Upscale frames lazily, one after another; see `upscaler.stream`."""
        return stream(self.session(options, state, on_step, noise), frames)

    def provenance(self, size: tuple[int, int], options: Any = None) -> Provenance:
        """Return a record of how frames are made, without the memory plan, which does not affect them."""
        settings = asdict(options or self.Options())
        offloads = settings.pop("memory_plan") == "offload" or self.offloaded
        parts = "blocks that are not running are kept in system memory" if offloads else ""
        info = self.info
        return Provenance(info.model, info.number_format, info.runtime, settings, parts=parts)

    def bytes_needed(self, size: tuple[int, int], options: Any = None) -> int:
        """Return how many bytes LQ frames of `size` (height, width) need in addition to the weights.

        The bytes are counted by running a scene's first two chunks on the meta device.
        """
        return self._needs(tuple(size), options or self.Options())

    @torch.no_grad()
    def chunk(
        self,
        frames: Sequence[Tensor],
        memory: Any,
        options: Any,
        on_step: OnStep,
        noise: Tensor | None = None,
    ) -> tuple[list[Tensor], Any]:
        """Return the results for LQ frames, and the new `Memory`; retry with offloading if memory runs out.

        The inputs are never modified, even if the chunk fails.
        """
        with self._lock:
            if options.memory_plan == "offload":
                self._offload()
            compute = partial(self._chunk, frames, memory, options, on_step, noise)
            while True:
                try:
                    with repeatable():
                        return compute()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    message = str(error).strip().partition("\n")[0]
                # The error has now been freed, along with the tensors that its traceback referred to.
                release_caches(self.device)
                if options.memory_plan == "whole" or not self._offload():
                    plan = "offload" if self.offloaded else options.memory_plan
                    size = frames[0].shape[-2], frames[0].shape[-1]
                    need = self.bytes_needed(size, replace(options, memory_plan=plan))
                    remedy = f"memory ran out ({message}); {self.remedy}"
                    raise VRAMError(need // MEGABYTE, free_memory(self.device) // MEGABYTE, remedy)
                log.warning(
                    "out of memory (%s): from now on, blocks that are not running are kept in system memory",
                    message,
                )

    def weights(self) -> list[Tensor]:
        """Return all tensors that the model keeps permanently."""
        held = (chain(network.parameters(), network.buffers()) for network in self.networks.values())
        return [*chain.from_iterable(held), self.prompt]

    def _acquire(self, stage: str, lq: Tensor, options: Any) -> Any:
        """Move a network to its device if necessary, and return the network."""
        if not self.placement.fixed:
            self.placement.acquire(stage, self.bytes_needed((lq.shape[-2], lq.shape[-1]), options))
        return self.networks[stage]

    def _checked(self, hq: Tensor) -> Tensor:
        """Return a finished frame; raise `CheckpointError` if it contains NaN or infinite values."""
        if not hq.is_meta and not is_finite(hq):
            raise CheckpointError(
                f"the result contains NaN or infinite values in {self.number_format}: use bfloat16 or "
                "float32; if that does not help, the weights are damaged."
            )
        return hq.contiguous()

    def _offload(self) -> bool:
        """Start keeping idle transformer blocks and their stored data in system memory.

        Return False if they are already kept there or the device is not a CUDA device. If a host program
        places the networks, it must also move the blocks.
        """
        if self.offloaded or self.device.type != "cuda":
            return False
        self.offloaded = True
        if self.placement.fixed:
            from diffusers.hooks import apply_group_offloading

            transformer: Any = self.networks["transformer"]
            for block in transformer.blocks:
                apply_group_offloading(
                    block, self.device, torch.device("cpu"), "block_level", num_blocks_per_group=1
                )
        return True

    def _count(self, size: tuple[int, int], options: Any) -> int:
        empty = type(self)(
            networks={name: on_meta(network) for name, network in self.networks.items()},
            prompt=torch.empty_like(self.prompt, device="meta"),
            device=torch.device("meta"),
            dtype=self.dtype,
            model=self.model,
        )
        memory = self.Memory()
        fused = nullcontext() if self.device.type == "mps" else FusedAttention()
        with torch.no_grad(), fused, LiveTensors(empty.weights()) as live:
            for _ in range(2):
                count = self.whole(memory, options)
                frames = [torch.empty((1, 3, *size), device="meta") for _ in range(count)]
                _, memory = empty._chunk(frames, memory, options, ignore_progress, None)
        return live.peak


class ChunkSession:
    """One sequence, which collects frames until a chunk is complete, and pads the last chunk.

    To continue from a state, push the frames from `state.index` on, including those that the state's last
    chunk already saw when it looked ahead.
    """

    def __init__(
        self,
        upscaler: ChunkUpscaler,
        options: Any,
        state: State | None,
        on_step: OnStep,
        noise: Tensor | None,
    ) -> None:
        self._upscaler, self._options, self._on_step, self._noise = upscaler, options, on_step, noise
        self._memory: Memory = upscaler.Memory.of(state, upscaler.device, upscaler.dtype)
        self._frames: list[Tensor] = []
        """Frames that have been pushed but have no result yet."""
        self._size = size_of(state) if state and state.has_previous else None
        self._finished = False
        if state and state.has_previous:
            self._check(state)

    def push(self, lq: Tensor) -> list[Upscaled]:
        """Add the next frame, (1, 3, h, w) float32; if it completes a chunk, return the chunk's results."""
        if self._finished:
            raise IncompatibleInputError("the sequence has ended: begin a new session for further frames")
        check_frame(lq)
        size = lq.shape[-2], lq.shape[-1]
        if size != (self._size or size):
            raise IncompatibleInputError(
                f"all frames of a sequence must have the same size {self._size} (height, width), not {size}"
            )
        frames = [*self._frames, lq.to(self._upscaler.device, copy=True)]
        if len(frames) < self._upscaler.whole(self._memory, self._options):
            self._frames, self._size = frames, size
            return []
        results, self._memory = self._chunk(frames, self._memory)
        self._frames, self._size = frames[len(results) :], size
        return results

    def finish(self) -> list[Upscaled]:
        """Return the remaining results, repeating the last frame as needed; surplus results are dropped."""
        memory, frames, results = self._memory, self._frames, []
        last = memory.index + len(frames)
        while memory.index < last:
            chunk = self._upscaler.filled(frames, memory, self._options)
            finished, memory = self._chunk(chunk, memory)
            frames = frames[len(finished) :]
            results += finished
        self._finished, self._frames = True, []
        return [result for result in results if result.index < last]

    def state(self) -> State | None:
        """Return the state before the first frame or after a whole chunk; otherwise, return None."""
        if self._finished or len(self._frames) > self._memory.ahead:
            return None
        provenance = self._upscaler.provenance(self._size or (0, 0), self._options)
        return self._memory.to_state(self._size or (0, 0), provenance)

    def _chunk(self, frames: list[Tensor], memory: Memory) -> tuple[list[Upscaled], Memory]:
        hq, after = self._upscaler.chunk(frames, memory, self._options, self._on_step, self._noise)
        return [Upscaled(memory.index + offset, each) for offset, each in enumerate(hq)], after

    def _check(self, state: State) -> None:
        """Refuse a state that does not fit; log a warning if it was made under different conditions."""
        before, now = state.provenance, self._upscaler.provenance(size_of(state), self._options)
        if before.model not in ("", now.model):
            raise IncompatibleInputError(
                f"the state belongs to model {before.model}, not to this one ({now.model})"
            )
        for name in self._upscaler.fixed:
            old, new = before.options.get(name, now.options[name]), now.options[name]
            if old != new:
                raise IncompatibleInputError(
                    f"{name} must be {old!r}, the value used for the state's frames, not {new!r}"
                )
        if differences := before.differences(now):
            log.warning("this is not an exact continuation of frame %d: %s", state.index, differences)
