"""`trueup doctor`: what this machine and installation are, and what of it will make trouble."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from trueup import __version__
from trueup.errors import ModelError

if TYPE_CHECKING:
    from rich.table import Table

#: Versions that work badly or are unsafe with what we do: (requirement that is bad, why).
KNOWN_BAD = (
    ("torch<2.10", "loading weights can corrupt memory (CVE-2026-24747)"),
    ("transformers<5.3", "a model's config.json can run code (CVE-2026-4372)"),
    ("jinja2<3.1.6", "chat templates can leave their sandbox (CVE-2025-27516)"),
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16")  # the last is ARM's
_ENVIRONMENT = (
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "USE_MODELSCOPE_HUB",
    "USE_OPENMIND_HUB",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "FORCE_TORCHRUN",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_GB = 2**30


def examine() -> dict[str, Any]:
    """Everything a bug report needs, JSON-able; no user name, no secrets (proxies only as `set`).

    Raises:
        ModelError: torch or another core package cannot be imported at all.
    """
    try:
        from trueup.training.environment import describe_environment
    except (ImportError, OSError) as error:  # OSError: a shared library of the wrong build
        raise ModelError(
            f"a core package cannot be imported: {error}",
            fix="install trueup again in a new environment",
        ) from error
    found = describe_environment()
    del found["command"]
    return {
        "trueup": __version__,
        **found,
        "executable": Path(sys.executable).name,
        "precision": precision(),
        "memory_free_gb": round(psutil.virtual_memory().available / _GB, 1),
        "disk_free_gb": {str(path): free for path in (Path.cwd(), hub_cache()) if (free := _free(path)) is not None},
        "extras": extras(),
        "environment": {n: "set" if "PROXY" in n else os.environ[n] for n in _ENVIRONMENT if n in os.environ},
        "problems": problems(),
    }


def precision() -> dict[str, Any]:
    """What low precision this machine computes natively."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in _cpu_flags()],
        "cpu_bf16": any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16", "bf16")),
        "gpu_bf16": gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": torch.backends.mps.is_available(),
    }


def hub_cache() -> Path:
    """Where downloaded models lie."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def extras() -> dict[str, list[str]]:
    """Each optional extra → the packages it lacks; an empty list is a complete extra."""
    if _version("trueup") is None:
        return {}  # run from its sources, not installed
    lacking: dict[str, list[str]] = {}
    names = metadata.metadata("trueup").get_all("Provides-Extra") or []
    for text in metadata.requires("trueup") or []:
        requirement = Requirement(text)
        for extra in names:
            if requirement.name != "trueup" and _belongs(requirement, extra):
                missing = lacking.setdefault(extra, [])
                if _version(requirement.name) is None:
                    missing.append(requirement.name)
    return lacking


def problems() -> list[str]:
    """What is known to go wrong with the versions and the disk found here."""
    found = []
    for text, why in KNOWN_BAD:
        bad = Requirement(text)
        version = _version(bad.name)
        if version is not None and Version(version) in bad.specifier:
            found.append(f"{bad.name} {version}: {why}")
    for path in (Path.cwd(), hub_cache()):
        free = _free(path)
        if free is not None and free < 2:
            found.append(f"{path}: only {free} GB free")
    return found


def render(found: dict[str, Any]) -> Table:
    """Two columns for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found).items():
        table.add_row(name, value)
    for problem in found["problems"]:
        table.add_row(Text("problem", style="bold red"), problem)
    if not found["problems"]:
        table.add_row("problems", "none known")
    return table


def _rows(found: dict[str, Any]) -> dict[str, str]:
    cpu, low, git = found["cpu"], found["precision"], found["git"]
    packages = [f"{name} {version}" for name, version in found["packages"].items()]
    gpus = [f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in found["gpus"]]
    units = ", ".join(low["cpu_flags"]) or "no vector units"
    bf16 = f"{'native' if low['cpu_bf16'] else 'emulated, slow'} on the CPU ({units})"
    complete = [name for name, missing in found["extras"].items() if not missing]
    settings = [f"{name}={value}" for name, value in found["environment"].items()]
    disks = [f"{free} GB free at {path}" for path, free in found["disk_free_gb"].items()]
    return {
        "trueup": found["trueup"] + (f" (git {git['commit'][:10]})" if git else ""),
        "python": f"{found['python']} on {found['platform']}",
        "packages": ", ".join(packages),
        "cpu": f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads for torch",
        "gpu": ", ".join(gpus) or ("mps" if low["mps"] else "none"),
        "bf16": bf16 + ("; native on the GPU" if low["gpu_bf16"] else ""),
        "memory": f"{found['memory_free_gb']} of {cpu['memory_gb']} GB free",
        "disk": ", ".join(disks),
        "extras": ", ".join(complete) or "none",
        "environment": ", ".join(settings) or "nothing set",
    }


def _belongs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return []
    return lines[0].split() if lines else []


def _free(path: Path) -> float | None:
    """Free gigabytes where `path` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return round(shutil.disk_usage(path).free / _GB, 1)
    except OSError:
        return None
