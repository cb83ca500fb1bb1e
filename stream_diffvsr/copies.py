"""Copies between CPU and GPU that nobody waits for: through pinned memory, in order with the device's work.

Between other devices they are plain copies.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; this thread does not wait for what a GPU was given before."""
    if x.device.type == "cpu" and device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # systems limit how much may be pinned
            # torch keeps the pinned copy until the GPU has read it.
            return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Download:
    """A tensor on its way to the CPU; not to be changed until it is there."""

    def __init__(self, x: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._copy = _pinned_like(x) if x.device.type == "cuda" else x.cpu()
        if x.device.type == "cuda":
            self._copy.copy_(x, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """The tensor on the CPU, from any thread."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def _pinned_like(x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):  # as above
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return torch.empty(x.shape, dtype=x.dtype)  # the copy into it waits
