"""From a config to a tokenizer, without what only models need: importing peft alone takes two seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trueup import memory
from trueup.config.schema import ModelSection
from trueup.errors import ConfigError, ModelError
from trueup.garbage import no_collection
from trueup.models.hub import hub_access, resolve_model, unreachable

#: Keys that change the run's own model, as they are for a reward model or a judge: these bring their own along.
UNCHANGED: dict[str, Any] = {
    "rope_scaling": None, "rope_scaling_length": None, "resize_vocab": False, "add_tokens": [],
    "add_special_tokens": [], "new_special_tokens_config": None, "init_special_tokens": "noise_init",
}  # fmt: skip


@no_collection()
def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of the model (of the last adapter that carries one, else of its base), with the tokens to add.

    Raises:
        ModelError: there is none.
        ConfigError: `new_special_tokens_config` is no file of descriptions.
    """
    tokenizer = read_tokenizer(model)
    if model.add_tokens:
        tokenizer.add_tokens(model.add_tokens)
    if special := special_tokens(model):
        tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def special_tokens(model: ModelSection) -> list[str]:
    """Special tokens to add: those named, and those described."""
    return list(dict.fromkeys([*model.add_special_tokens, *descriptions_of(model)]))


def added_tokens(model: ModelSection) -> list[str]:
    """All tokens to add, once each."""
    return list(dict.fromkeys([*model.add_tokens, *special_tokens(model)]))


def descriptions_of(model: ModelSection) -> dict[str, str]:
    """Special token → what it means, from the file that `new_special_tokens_config` names.

    Raises:
        ConfigError: it cannot be read, or is no mapping of tokens to texts.
    """
    if model.new_special_tokens_config is None:
        return {}
    path = Path(model.new_special_tokens_config).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", where=f"new_special_tokens_config: {path}") from error
    fits = isinstance(found, dict) and all(
        isinstance(word, str) and word.strip() for pair in found.items() for word in pair
    )
    if not fits or not found:
        raise ConfigError(
            "is no list of tokens with their descriptions", where=f"new_special_tokens_config: {path}",
            expected='YAML such as  "<think>": "the beginning of a thought"',
        )  # fmt: skip
    return found


def read_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer as it is before tokens are added; the caller's own.

    Raises:
        ModelError: there is none.
    """
    given = memory.find(tokenizer_label(str(model.model_name_or_path)))
    return _read_tokenizer(model) if given is None else copy.deepcopy(given)


def _read_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    access = hub_access(model)
    name, location, adapters = resolve_model(model.model_name_or_path, model.adapter_name_or_path, access)
    if memory.is_name(location):
        location = name
    candidates = [*reversed(adapters), location]
    for candidate in candidates:
        if memory.is_name(candidate):
            continue
        try:
            return AutoTokenizer.from_pretrained(
                candidate, revision=access.revision, token=access.token, cache_dir=access.cache_dir,
                use_fast=model.use_fast_tokenizer, trust_remote_code=model.trust_remote_code,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            if candidate == location:
                raise unreachable(name, access, error) from error
            # an adapter directory without tokenizer files: the base has them
    raise ModelError(
        "the model in memory does not say where it came from", where="model_name_or_path",
        fix="give its tokenizer beside it",
    )  # fmt: skip


def tokenizer_label(model_name: str) -> str:
    """Under which a program holds the tokenizer of a model (see `trueup.memory`)."""
    return f"tokenizer of {model_name}"
