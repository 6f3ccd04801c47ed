"""From a config to a tokenizer, without what only models need: importing peft alone takes two seconds."""

from __future__ import annotations

import copy

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trueup import memory
from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.garbage import no_collection
from trueup.models.hub import hub_access, resolve_model, unreachable


@no_collection()
def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of the model (of the last adapter that carries one, else of its base)."""
    given = memory.find(tokenizer_label(str(model.model_name_or_path)))
    tokenizer = _read_tokenizer(model) if given is None else copy.deepcopy(given)
    if model.add_tokens:
        tokenizer.add_tokens(model.add_tokens)
    if model.add_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": model.add_special_tokens})
    return tokenizer


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
