"""Comes with the package: the tiny model `builtin:sql-tiny`, its task, sample data. Torch-free."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from trueup.errors import ModelError

PREFIX = "builtin:"
BUILTIN_MODELS = ("builtin:sql-tiny",)
BUILTIN_DATA = Path(str(files("trueup.builtin") / "data"))
QUICKSTART_CONFIG = Path(str(files("trueup.builtin") / "quickstart.yaml"))


def is_builtin(name: str) -> bool:
    """Whether a model name means one that comes with the package."""
    return name.startswith(PREFIX)


def builtin_path(name: str) -> Path:
    """The directory of a built-in model, in transformers' format. ModelError if there is none."""
    if name not in BUILTIN_MODELS:
        raise ModelError(
            f"there is no built-in model called {name!r}",
            expected=f"one of {', '.join(BUILTIN_MODELS)}",
        )
    return Path(str(files("trueup.builtin") / "models" / name.removeprefix(PREFIX)))
