"""Running a toy training in forked children: quick, as torch is imported, and safe to kill."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks children, as only POSIX can")


def fork(action: Callable[[], Any], **environment: str) -> int:
    """Start a child that runs `action`; it exits 0, with its error's exit code, or 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        os.environ.update(environment)
        action()
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The child's exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_forked(action: Callable[[], Any], **environment: str) -> int:
    """Fork, wait, return the exit code."""
    return wait(fork(action, **environment))


def run_ranks(action: Callable[[], Any], world_size: int = 2) -> list[int]:
    """Run `action` in `world_size` children under torchrun's environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return [wait(pid) for pid in [fork(action, **shared, **rank) for rank in ranks]]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def has_checkpoint(directory: Path) -> bool:
    """Whether any checkpoint was committed."""
    return any(directory.glob("checkpoint-*"))
