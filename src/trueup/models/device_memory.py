"""How much memory a device has, and how much of it is free: of a GPU's, or of the machine's or its container's."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import psutil
import torch

_CONTAINER = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


def free_memory(device: torch.device) -> int:
    """Bytes this process may still take on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, _free_in_container()) // _processes()


def resident() -> int:
    """Bytes of the machine's memory that this process takes now."""
    return psutil.Process().memory_info().rss


@functools.cache
def total_memory(device: torch.device) -> int:
    """Bytes that a process would have on a device with nothing else on it: the same whenever it is asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(psutil.virtual_memory().total, _limit_of_container()) // _processes()


def _processes() -> int:
    """How many processes of this run share the machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limit_of_container(root: Path = _CONTAINER) -> int:
    """A container's limit (cgroup v2); without a limit, no bound."""
    try:
        return int((root / "memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no limit ("max"), or not Linux
        return _NO_LIMIT


def _free_in_container(root: Path = _CONTAINER) -> int:
    """What a container's limit leaves."""
    try:
        used = int((root / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(stat.get("inactive_file", 0))  # files that make way
    except (OSError, ValueError):
        return _NO_LIMIT
    return max(_limit_of_container(root) - used + cached, 0)
