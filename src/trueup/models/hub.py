"""Where a model's name leads: a built-in, a local directory, or a hub (Hugging Face, ModelScope, Modelers)."""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from trueup import memory
from trueup.builtin import builtin_path, is_builtin
from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.network import mind_the_hub

ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?").fullmatch


def is_adapter_dir(path: str | Path) -> bool:
    """Whether a directory holds an adapter and no full model."""
    path = Path(path)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def read_base_of(path: str | Path) -> str:
    """The base model an adapter directory was trained on."""
    config = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "the adapter does not say which base model it stands on",
            where=str(Path(path) / ADAPTER_CONFIG),
            fix="give the base as model_name_or_path and this directory as adapter_name_or_path",
        )
    return base


@dataclass(frozen=True)
class HubAccess:
    """How to reach a hub. The token is never printed."""

    hub: str = "huggingface"
    revision: str = "main"
    token: str | None = None
    cache_dir: str | None = None


def hub_access(model: ModelSection) -> HubAccess:
    """The hub settings of a config."""
    token = {
        "huggingface": model.hf_hub_token,
        "modelscope": model.ms_hub_token,
        "modelers": model.om_hub_token,
    }
    return HubAccess(model.hub, model.model_revision, token[model.hub], model.cache_dir)


#: hub -> the module whose `snapshot_download` fetches a repository
_CLIENTS = {"modelscope": "modelscope", "modelers": "openmind_hub"}


def locate(name: str, access: HubAccess, key: str = "model_name_or_path") -> str:
    """A directory (or a Hugging Face id that transformers will download) for a model or adapter name.

    Raises:
        ModelError: a built-in or a path that does not exist, or a hub that cannot be reached (C17). `key` says
            which key named it.
    """
    if memory.is_name(name):
        return name
    if is_builtin(name):
        return str(builtin_path(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if not _HUB_ID(name):
        raise _missing_directory(name, key)
    if access.hub == "huggingface":
        mind_the_hub()
        return name
    module = _CLIENTS[access.hub]
    try:
        download = importlib.import_module(module).snapshot_download
    except ImportError as error:
        raise ModelError(
            f"hub: {access.hub} needs its client", expected=f"`import {module}` to work",
            fix="pip install 'trueup[hubs]', or give a local directory as model_name_or_path",
        ) from error  # fmt: skip
    try:
        return download(
            name,
            revision=None if access.revision == "main" else access.revision,
            cache_dir=access.cache_dir,
            **({"token": access.token} if access.token else {}),
        )
    except Exception as error:  # each hub's client raises errors of its own
        raise unreachable(name, access, error, key) from error


def download_adapter(name: str, access: HubAccess, key: str = "adapter_name_or_path") -> str:
    """A local directory that holds an adapter; Hugging Face ids are downloaded. `key` named it.

    What follows two slashes is a folder in a directory or a repository (`adapter_folder`).
    """
    root, _, folder = name.rpartition("//")
    if not root or Path(name).expanduser().is_dir():
        root, folder = name, ""
    path = locate(root, access, key)
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        only = f"{folder}/*" if folder else None
        try:
            path = snapshot_download(
                path, revision=access.revision, token=access.token, cache_dir=access.cache_dir, allow_patterns=only
            )
        except Exception as error:
            raise unreachable(root, access, error, key) from error
    path = str(Path(path, folder))
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        raise _no_adapter(Path(path), key)
    return path


def _missing_directory(name: str, key: str) -> ModelError:
    """A name that can only be a path, and is none: what is there instead."""
    tried = Path(name).expanduser().absolute()
    parent = next(folder for folder in tried.parents if folder.is_dir())
    present = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    shown = ", ".join(present[:8]) + (" …" if len(present) > 8 else "")
    return ModelError(
        f"no such directory: {tried}", where=key,
        fix=f"in {parent} there is: {shown}" if present else f"there is no directory in {parent}",
    )  # fmt: skip


def _no_adapter(path: Path, key: str) -> ModelError:
    checkpoints = sorted(folder.parent.name for folder in path.glob(f"*/{ADAPTER_CONFIG}"))
    if (path / "config.json").is_file():
        fix = "this is a whole model: give it as model_name_or_path"
    elif checkpoints:
        fix = f"below it there are: {', '.join(checkpoints[:8])}"
    else:
        fix = "give the output directory, or a checkpoint-N, of a run with finetuning_type: lora"
    return ModelError(f"{path} holds no adapter", where=key, expected=f"a directory with {ADAPTER_CONFIG}", fix=fix)


def unreachable(name: str, access: HubAccess, error: Exception, key: str = "model_name_or_path") -> ModelError:
    """C17: which name, which hub, and the ways out."""
    cache = access.cache_dir or os.environ.get("HF_HOME", "~/.cache/huggingface")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).expanduser().is_dir():
        return ModelError(
            f"cannot load the model in {Path(name).expanduser().absolute()}: {first_line}", where=key,
            expected="config.json, the tokenizer's files and *.safetensors, of an architecture transformers knows",
        )  # fmt: skip
    return ModelError(
        f"cannot load {name!r}: no such local directory, and {access.hub} did not deliver it ({first_line})",
        where=key,
        expected=f"a local directory, a builtin: model, or a model on {access.hub}",
        fix=f"check the spelling; a gated model needs hf_hub_token; offline, put the files into {cache} or a local "
        "directory; another hub is chosen with hub: modelscope | modelers",
    )


def resolve_model(
    name: str,
    adapters: list[str],
    access: HubAccess,
    keys: tuple[str, str] = ("model_name_or_path", "adapter_name_or_path"),
) -> tuple[str, str, list[str]]:
    """What to load: (name of the root base, its location, adapter directories in order).

    `keys` are the config's keys that named the model and its adapters, for messages.

    A `name` that is a directory holding only an adapter stands for its base plus that adapter (guide G4); so does one
    of a peft model in memory.
    """
    location = locate(name, access, keys[0])
    chain = [a if memory.is_name(a) else download_adapter(a, access, keys[1]) for a in adapters]
    if memory.is_name(name):
        given = memory.held(name, keys[0])
        own = [name] if given.has_adapter and name not in chain else []
        return given.name or name, name, [*own, *chain]
    seen = {location}
    while is_adapter_dir(location):
        chain.insert(0, location)
        name = read_base_of(location)
        location = locate(name, access, keys[0])
        if location in seen:
            raise ModelError(f"the adapter at {location} names itself as its base", where=keys[0])
        seen.add(location)
    return name, location, chain
