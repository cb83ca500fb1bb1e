"""Selection of the device and the number format for the networks."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from .errors import IncompatibleInputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def available() -> list[str]:
    """Return the names of this machine's devices, best first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device with a given name; 'auto' means the best one on this machine.

    If there is no such device, raise `IncompatibleInputError` with a list of those that exist.
    """
    names = available()
    if device == "auto":
        return torch.device(names[0])
    if device == "cuda" and "cuda:0" in names:
        return torch.device("cuda", torch.cuda.current_device())
    if str(device) not in names:
        raise IncompatibleInputError(
            f"there is no device {str(device)!r} on this machine: choose one of {', '.join(['auto', *names])}"
        )
    return torch.device(device)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the named number format; 'auto' means float16 if it is fast on `device`, otherwise float32."""
    if dtype == "auto":
        return torch.float16 if _fast_half(device) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise IncompatibleInputError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    return chosen


def _fast_half(device: torch.device) -> bool:
    # GPUs before Volta compute float16 at a small fraction of their float32 rate.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


_repeatable = threading.Lock()
_nested, _before = 0, (False, False)


@contextmanager
def repeatable() -> Generator[None, None, None]:
    """Make cuDNN's results repeatable within this context.

    Some of cuDNN's algorithms are not repeatable, and the fastest one can differ between processes. The
    process's TF32 setting is not changed: by default, torch uses TF32 on CUDA for float32 convolutions, but
    not for matrix products. Contexts in several threads may overlap; the process's original settings are
    restored when the last one ends.
    """
    global _nested, _before
    cudnn = torch.backends.cudnn
    with _repeatable:
        if _nested == 0:
            _before = cudnn.deterministic, cudnn.benchmark
            cudnn.deterministic, cudnn.benchmark = True, False
        _nested += 1
    try:
        yield
    finally:
        with _repeatable:
            _nested -= 1
            if _nested == 0:
                cudnn.deterministic, cudnn.benchmark = _before


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that timings include all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
