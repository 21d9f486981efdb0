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
OLD_MOST = 2**25  # the largest threshold that older versions of glibc take


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
    if not (mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, OLD_MOST)):
        return False  # the other settings alone would map each large tensor anew
    taken = [mallopt(M_TRIM_THRESHOLD, KEPT), mallopt(M_TOP_PAD, PADDING)]
    return all(taken)
