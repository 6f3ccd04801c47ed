"""What a run ran on: versions, hardware and git, for environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import psutil
import torch

from trueup.config.names import is_secret

_PACKAGES = (
    *("trueup", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors"),
    *("tokenizers", "numpy", "bitsandbytes", "deepspeed", "vllm", "flash-attn"),
)


def describe_environment() -> dict[str, Any]:
    """JSON-able; nothing personal: no user name, no environment variables."""
    return {
        "command": [os.path.basename(sys.argv[0]), *_without_secrets(sys.argv[1:])],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cpu": {
            "name": cpu_name(),
            "cores": psutil.cpu_count(logical=True),
            "threads": torch.get_num_threads(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "gpus": _gpus(),
        "git": _git(),
    }


def _without_secrets(words: Sequence[str]) -> list[str]:
    """A command's words with the values of tokens, keys and passwords blanked out."""
    shown, hide = [], False
    for word in words:
        key, equals, _ = word.partition("=")
        secret = is_secret(key.lstrip("-").replace("-", "_"))
        shown.append("<redacted>" if hide else f"{key}=<redacted>" if secret and equals else word)
        hide = secret and not equals
    return shown


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor by its maker's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 2**30, 1)} for gpu in found]


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether it has changes; None outside a repository."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True)
        return answer.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
