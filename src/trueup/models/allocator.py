"""glibc told to keep the memory it has: a step takes and gives back the same gigabytes every time.

By default every block above a few megabytes comes fresh from the kernel and goes back when it is freed, so each step
pays for its memory in page faults, page by page. The variables of the environment that change this are read before a
program begins; `mallopt` does the same from inside. The price is that a process does not shrink until it ends.
"""

from __future__ import annotations

import ctypes
import platform

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Stop glibc from returning memory to the kernel; False where there is no glibc (then nothing is changed)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _MMAP_MAX: 0,  # large blocks come from the heap, which is used again
        _TRIM_THRESHOLD: -1,  # never give its end back (size_t: the largest number)
        _TOP_PAD: 64 * 2**20,
    }
    return all(mallopt(option, value) == 1 for option, value in settings.items())
