"""`serve --engine vllm`: vLLM's own server, with our model, adapters and address, in place of this process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trueup.config.schema import RunConfig
from trueup.errors import ConfigError, ModelError
from trueup.inference.server.settings import Settings
from trueup.models.hub import HubAccess, download_adapter, locate
from trueup.models.load import hub_access
from trueup.models.rope import read_record

log = logging.getLogger("trueup")


def hand_over(cfg: RunConfig, settings: Settings) -> None:
    """Become `vllm serve`. Does not return.

    Raises:
        ModelError: vLLM is not installed. ConfigError: what it cannot serve.
    """
    program = _program()
    words = command(cfg, settings)
    log.warning("from here on it is vLLM's server, with its own limits: it checks the token, but no Host name")
    os.execve(program, ["vllm", *words], environment(cfg, settings))


def command(cfg: RunConfig, settings: Settings) -> list[str]:
    """The words after `vllm`; no secret is among them. Raises ConfigError."""
    model, access = cfg.model, hub_access(cfg.model)
    if settings.reward_models:
        raise ConfigError("vLLM serves one model", where="--reward-model", fix="serve it by another `trueup serve`")
    if len(model.adapter_name_or_path) > 1:
        raise ConfigError(
            "vLLM lets one adapter act at a time", where="adapter_name_or_path",
            fix="merge them, or give each as --adapter NAME=DIR",
        )  # fmt: skip
    if cfg.data.template:
        raise ConfigError(
            "vLLM uses the template that the model was saved with", where="template",
            fix="drop template, or give vLLM a file by vllm_config: {chat_template: FILE}",
        )  # fmt: skip
    base = locate(str(model.model_name_or_path), access)
    adapters = {**_acting(model.adapter_name_or_path, settings.name), **settings.adapters}
    _check_positions(cfg, adapters)
    own = settings.name if settings.name and not model.adapter_name_or_path else short_name(model.model_name_or_path)
    words = ["serve", base, "--served-model-name", own, "--host", settings.host, "--port", str(settings.port)]
    words += ["--max-model-len", str(model.vllm_maxlen), "--gpu-memory-utilization", str(model.vllm_gpu_util)]
    words += ["--max-num-seqs", str(settings.limits.slots)]
    words += ["--enforce-eager"] if model.vllm_enforce_eager else []
    words += ["--trust-remote-code"] if model.trust_remote_code else []
    words += ["--revision", access.revision] if access.revision != "main" and not Path(base).is_dir() else []
    if adapters:
        words += ["--enable-lora", "--max-lora-rank", str(model.vllm_max_lora_rank), "--max-loras", str(len(adapters))]
        words += ["--lora-modules", *(f"{name}={_located(path, access)}" for name, path in adapters.items())]
    return words + _options(model.vllm_config or {})


def _check_positions(cfg: RunConfig, adapters: Mapping[str, str]) -> None:
    """vLLM reads positions as the base's files say. Raises ConfigError where the model is stretched."""
    found = {path: stretch for path in adapters.values() if (stretch := read_record(Path(path).expanduser()))}
    if not found and not cfg.model.rope_scaling:
        return
    how = ", ".join(f"{path} was trained with {stretch}" for path, stretch in found.items())
    raise ConfigError(
        f"vLLM reads positions as the model's files say, and {how or 'rope_scaling stretches them'}",
        where="adapter_name_or_path" if found else "rope_scaling",
        fix="trueup export writes a model that carries the stretch, and vLLM serves that",
    )  # fmt: skip


def environment(cfg: RunConfig, settings: Settings) -> Mapping[str, str]:
    """Ours, with the token where others cannot read it."""
    key = {"VLLM_API_KEY": settings.key} if settings.key else {}
    token = {"HF_TOKEN": cfg.model.hf_hub_token} if cfg.model.hf_hub_token else {}
    return {**os.environ, **key, **token}


def short_name(name: str | None) -> str:
    """An id, not a path."""
    path = Path(str(name)).expanduser()
    return path.resolve().name if path.exists() else path.as_posix()


def _acting(adapters: Sequence[str], name: str | None) -> dict[str, str]:
    return {name or short_name(path): path for path in adapters}


def _located(adapter: str, access: HubAccess) -> str:
    """vLLM fetches a repository itself, but knows of no folder in it."""
    return download_adapter(adapter, access) if "//" in adapter else locate(adapter, access)


def _options(given: Mapping[str, object]) -> list[str]:
    words: list[str] = []
    for key, value in given.items():
        option = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value not in (False, None):
            words += [option, value if isinstance(value, str) else json.dumps(value)]
    return words


def _program() -> str:
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ModelError(
            "vLLM is not installed", where="--engine vllm", expected="a Linux machine with a GPU",
            fix="pip install 'trueup[vllm]', or leave --engine out",
        )  # fmt: skip
    return found
