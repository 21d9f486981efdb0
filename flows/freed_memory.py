"""Keep freed memory in the process instead of giving it back to the system at once."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
KEPT = 2**30  # bytes, at most
PADDING = 2**26  # bytes that the heap grows by at once
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to a gigabyte that the process has freed; return whether it does.

    By default it maps large tensors anew each time and trims the heap, so that every intermediate of a solve meets
    fresh pages, which the system first has to clear. In a `log_prob` of 10,000 points in the plane this takes half of
    the time. Nothing is changed where the environment sets any of these numbers itself, or the C library is another.
    """
    if any(name in os.environ for name in SETTINGS) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    values = {M_MMAP_THRESHOLD: KEPT, M_TRIM_THRESHOLD: KEPT, M_TOP_PAD: PADDING}
    taken = [mallopt(option, value) for option, value in values.items()]
    return all(taken)
