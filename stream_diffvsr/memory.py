"""Measuring free memory and the memory that tensors use, and recognising out-of-memory errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Network = TypeVar("Network", bound=nn.Module)

MESSAGES = (
    "out of memory",  # CUDA and MPS, whatever the error's class
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "_status_alloc_failed",  # cuDNN and cuBLAS
    "insufficient memory",  # OpenCV
    "bad alloc",  # OpenVINO
    "bad_alloc",
    "failed to allocate",  # ONNX Runtime
)

LIBRARIES = ("cv2", "onnxruntime")
"""Libraries whose out-of-memory errors are not of type `RuntimeError`."""

CGROUPS = Path("/sys/fs/cgroup")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    message = str(error).lower()
    known = isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in LIBRARIES
    return known and any(text in message for text in MESSAGES)


def release_caches(device: torch.device) -> None:
    """Release memory that is cached but unused."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return how many bytes can be allocated on `device` without freeing anything."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = min([psutil.virtual_memory().available, *_cgroup_free()])
    if device.type == "mps":
        used = torch.mps.current_allocated_memory()
        return max(min(free, torch.mps.recommended_max_memory() - used), 0)
    return free


def _cgroup_free() -> list[int]:
    """Return a list with the bytes left under the container's memory limit, or [] if there is no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [int((CGROUPS / name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):  # absent, or "max"
            continue
        return [max(numbers[0] - numbers[1], 0)]
    return []


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are currently alive, except those in `known`.

    `peak` is the highest count so far. Memory that libraries allocate internally is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}  # pyright: ignore[reportPrivateUsage]
        self._now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()  # pyright: ignore[reportPrivateUsage]
                if key not in self._seen:
                    self._seen.add(key)
                    self._now += size
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._forget, key, size)
        return out

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def count_bytes(call: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Return the peak size of a call's tensors in bytes, not counting inputs and weights (`known`).

    The call runs on torch's meta device, which computes nothing, so it takes about a second for any network.
    """
    with torch.no_grad(), torch.device("meta"), LiveTensors(known) as live:
        result = call()
    del result
    return live.peak


def on_meta(network: Network) -> Network:
    """Copy a network to the meta device; the copy has the same shapes and code, but no weights."""
    tensors = chain(network.parameters(), network.buffers())
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            if type(tensor) in (Tensor, nn.Parameter):
                empty = torch.empty_like(tensor, device="meta")
            else:  # an 8-bit tensor, which acts like a plain tensor
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(network, memo)
