"""Where a model's name leads: a built-in, a local directory, or a hub (Hugging Face, ModelScope, Modelers)."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from trueup.builtin import builtin_path, is_builtin
from trueup.errors import ModelError
from trueup.models.adapters import is_adapter_dir, read_base_of


@dataclass(frozen=True)
class HubAccess:
    """How to reach a hub. The token is never printed."""

    hub: str = "huggingface"
    revision: str = "main"
    token: str | None = None
    cache_dir: str | None = None


#: hub -> (import name, function, package to install)
_SNAPSHOT = {
    "modelscope": ("modelscope", "snapshot_download", "modelscope"),
    "modelers": ("openmind_hub", "snapshot_download", "openmind_hub"),
}


def locate(name: str, access: HubAccess) -> str:
    """A directory (or a Hugging Face id that transformers will download) for a model or adapter name.

    Raises:
        ModelError: a built-in that does not exist, or a hub that cannot be reached (C17).
    """
    if is_builtin(name):
        return str(builtin_path(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if access.hub == "huggingface":
        return name
    module, function, package = _SNAPSHOT[access.hub]
    try:
        download = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ModelError(
            f"hub: {access.hub} needs the package {package}", expected=f"`import {module}` to work",
            fix=f"pip install {package}, or give a local directory as model_name_or_path",
        ) from error  # fmt: skip
    try:
        return download(
            name,
            revision=None if access.revision == "main" else access.revision,
            cache_dir=access.cache_dir,
        )
    except Exception as error:  # each hub's client raises errors of its own
        raise unreachable(name, access, error) from error


def download_adapter(name: str, access: HubAccess) -> str:
    """A local directory for an adapter name; Hugging Face ids are downloaded."""
    path = locate(name, access)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=access.revision, token=access.token, cache_dir=access.cache_dir)
    except Exception as error:
        raise unreachable(name, access, error) from error


def unreachable(name: str, access: HubAccess, error: Exception) -> ModelError:
    """C17: which name, which hub, and the ways out."""
    cache = access.cache_dir or os.environ.get("HF_HOME", "~/.cache/huggingface")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot load {name!r}: no such local directory, and {access.hub} did not deliver it ({first_line})",
        where="model_name_or_path",
        expected=f"a local directory, a builtin: model, or a model on {access.hub}",
        fix=f"check the spelling; a gated model needs hf_hub_token; offline, put the files into {cache} or a local "
        "directory; another hub is chosen with hub: modelscope | modelers",
    )


def resolve_model(name: str, adapters: list[str], access: HubAccess) -> tuple[str, str, list[str]]:
    """What to load: (name of the root base, its location, adapter directories in order).

    A `name` that is a directory holding only an adapter stands for its base plus that adapter (guide G4).
    """
    location = locate(name, access)
    chain = [download_adapter(adapter, access) for adapter in adapters]
    seen = {location}
    while is_adapter_dir(location):
        chain.insert(0, location)
        name = read_base_of(location)
        location = locate(name, access)
        if location in seen:
            raise ModelError(f"the adapter at {location} names itself as its base", where="model_name_or_path")
        seen.add(location)
    return name, location, chain
