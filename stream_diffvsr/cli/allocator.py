"""What the C library does with memory that tensors give back."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers for these settings of `mallopt`."""


def keep_freed_memory() -> None:
    """Have this process keep freed memory for the next tensor; on Linux with glibc, else nothing happens.

    Otherwise every large tensor comes from the system and goes back to it, page by page, which took an
    eighth of the CPU's time per frame. For a process of its own, not for a host such as ComfyUI.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(MMAP_THRESHOLD, 2**30)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
