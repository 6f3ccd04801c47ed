"""Calls of `trueup` in processes of their own, forked from a server that has imported everything: a
second or two each instead of ten, and safe to kill.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import peft  # noqa: F401 (imported once by the server, not by every attempt)
import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import trueup.recipes.offline  # noqa: F401
from trueup.cli import main


def start(words: list[str], log: Path, **environment: str) -> BaseProcess:
    """`trueup WORDS` in the background, under these variables; its output is added to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_call, args=(words, log, {**_steering(), **environment}))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Its exit code, negative for the signal that ended it."""
    process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def call(words: list[str], log: Path, **environment: str) -> int:
    """`start`, then `finish`."""
    return finish(start(words, log, **environment))


def _steering() -> dict[str, str]:
    """Variables that a test may have set after the server was started."""
    prefixes = ("TRUEUP_", "HF_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _call(words: list[str], log: Path, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = ["trueup", *words]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    main(words)
