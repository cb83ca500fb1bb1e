"""How much memory is free, and how its end announces itself."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

MESSAGES = (
    "out of memory",  # CUDA and MPS, whatever class the error has
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "_status_alloc_failed",  # cuDNN and cuBLAS
    "insufficient memory",  # OpenCV
)

CGROUPS = Path("/sys/fs/cgroup")


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is one of the forms in which memory runs out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    message = str(error).lower()
    known = isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] == "cv2"
    return known and any(text in message for text in MESSAGES)


def release_caches(device: torch.device) -> None:
    """Give back what nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that could be used on `device` now, without making anything else give way."""
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
    """What a container's limit leaves; nothing outside of one."""
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
