"""What a server tells glibc and oneDNN, seen in a process of its own: it cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ARENAS = """
import ctypes, os, sys, threading
from trueup.models.allocator import stay_small

stay_small()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
threads = [threading.Thread(target=libc.malloc, args=(100,)) for _ in range(4)]
for one in threads:
    one.start()
for one in threads:
    one.join()
libc.fopen.argtypes, libc.malloc_info.argtypes = [ctypes.c_char_p] * 2, [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
told = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, told)
libc.fclose(told)
print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other arenas")
def test_a_servers_threads_share_one_heap_and_what_was_set_stays(tmp_path) -> None:
    told = tmp_path / "arenas.xml"
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {"LRU_CACHE_CAPACITY": "7"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    found = subprocess.run(
        [sys.executable, "-c", ARENAS, str(told)], capture_output=True, text=True, check=True, env=environment
    )
    assert told.read_text(encoding="utf-8").count("<heap nr=") == 1
    assert found.stdout.split() == ["7", "128"]
