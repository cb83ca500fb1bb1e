"""Control how the C library handles memory that tensors have freed."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers for these parameters of `mallopt`."""


def keep_freed_memory() -> None:
    """Make this process keep freed memory for later tensors; this works only on Linux with glibc.

    Otherwise, the system allocates and frees every large tensor page by page; this took an eighth of the CPU
    time per frame. Call this only in a dedicated process, not in a host such as ComfyUI.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(MMAP_THRESHOLD, 2**30)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
