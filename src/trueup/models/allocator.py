"""glibc told to keep the memory it has: a step takes and gives back the same gigabytes every time.

By default every block above a few megabytes comes fresh from the kernel and goes back when it is freed, so each step
pays for its memory in page faults, page by page. The variables of the environment that change this are read before a
program begins; `mallopt` does the same from inside. The price is that a process does not shrink until it ends.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform

log = logging.getLogger("trueup")

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8

KERNELS = 128  # compiled products that are kept: a model has some five, for each number of tokens at once


@functools.cache
def keep_memory() -> bool:
    """Stop glibc from returning memory to the kernel; False where that is not to be had, which is said once."""
    kept = _set_thresholds()
    if not kept:
        log.info(
            "freed memory goes back to the system between steps, which takes time: this is not glibc, or it refused; "
            "another allocator (LD_PRELOAD jemalloc or tcmalloc) may keep it"
        )
    return kept


def stay_small() -> None:
    """For a process that serves for weeks: what it holds comes to an end soon. To be called before there are threads.

    In bf16 on a CPU, oneDNN compiles each product for its shape, and keeps the last 1,024: half a megabyte each, as
    ideep and oneDNN both keep its description (LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY, which they read
    at the first product). And what one thread frees another does not use, unless all share one arena. Variables of
    the environment that are set are left as they are.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL("libc.so.6").mallopt(_ARENA_MAX, 1)


def hold_nothing() -> None:
    """While weights are quantised: large blocks go back to the kernel at once, whatever threads they were of."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 2**20)


def give_back() -> None:
    """Hand what has been freed back to the kernel, as far as whole pages of it are free."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_thresholds() -> bool:
    """Whether glibc is there and took every setting; if it is not there, nothing is changed."""
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
