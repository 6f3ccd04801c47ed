"""Tokens that a model's files do not know: rows for them in embeddings and head, and what these start as.

A new row is like the ones there are: their mean, and noise of their spread, column by column, drawn by the token's id
alone. So the base has the same rows in every resume, in a later stage and in a server. Or it is the mean of the tokens
of a description.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trueup.config.schema import ModelSection
from trueup.errors import ConfigError, ModelError, Problem
from trueup.models.quantise import is_packed
from trueup.models.rows import matrices
from trueup.models.tokenizer import added_tokens, descriptions_of, read_tokenizer

log = logging.getLogger("trueup")

_SEED = 20_250_807  # any; every run has the same
_CHUNK = 8192  # rows looked at once
#: rows that a model's files have, of models that have grown: new ones are made like these, whenever they come.
_KNOWN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose rows are to start and to train.

    Attributes:
        ids: ascending.
        described: id → tokens of its description.
        noise: whether those get noise too.
    """

    ids: list[int] = field(default_factory=list)
    described: Mapping[int, list[int]] = field(default_factory=dict)
    noise: bool = True


def num_rows(base: PreTrainedModel) -> int:
    return next(iter(matrices(base).values())).weight.shape[0]


def fit_vocabulary(base: PreTrainedModel, model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With `resize_vocab`, make rows for all that the tokenizer has, and start those of new tokens; in place.

    Returns:
        Ids of the rows that have to train, for nobody has trained them yet; none without `resize_vocab`.

    Raises:
        ConfigError: descriptions cannot be read, or describe nothing.
        ModelError: the embeddings are quantised.
    """
    if not model.resize_vocab:
        _say_idle(base, model, tokenizer)
        return []
    new = new_tokens(base, model, tokenizer)
    if not new.ids:
        log.info("resize_vocab: every token has a row of its own already")
        return []
    before = num_rows(base)
    grow(base, new.ids[-1] + 1)
    start_rows(base, new, min(_KNOWN.get(base, before), new.ids[0]))
    shown = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new.ids[:8]))) + (" …" if len(new.ids) > 8 else "")
    log.info("%s new tokens (%s): the embeddings have %s rows, before %s", len(new.ids), shown, num_rows(base), before)
    return new.ids


def new_tokens(base: PreTrainedModel, model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> NewTokens:
    """What a config adds to a tokenizer, and what a tokenizer has beyond the model's rows."""
    plain = read_tokenizer(model)
    known, asked = plain.get_vocab(), dict(zip(added_tokens(model), _ids(tokenizer, added_tokens(model)), strict=True))
    ids = sorted({*range(num_rows(base), len(tokenizer)), *(i for token, i in asked.items() if token not in known)})
    described: dict[int, list[int]] = {}
    if model.new_special_tokens_config and model.init_special_tokens == "noise_init":
        log.warning("the descriptions in %s start no row: set init_special_tokens: desc_init or desc_init_w_noise",
                    model.new_special_tokens_config)  # fmt: skip
    if model.init_special_tokens != "noise_init":
        texts = {asked[token]: text for token, text in descriptions_of(model).items()}
        described = {i: plain(texts[i], add_special_tokens=False)["input_ids"] for i in ids if i in texts}
        if empty := [i for i, found in described.items() if not found]:
            shown = ", ".join(map(str, tokenizer.convert_ids_to_tokens(empty)))
            raise ConfigError(f"no word describes {shown}", where=str(model.new_special_tokens_config))
    return NewTokens(ids, described, model.init_special_tokens == "desc_init_w_noise")


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    found = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(found, list)
    return found


def _say_idle(base: PreTrainedModel, model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Spare rows are nobody's: what is in them was never trained, and an adapter does not train them."""
    if (asked := added_tokens(model)) and len(tokenizer) <= num_rows(base):
        known = read_tokenizer(model).get_vocab()
        if fresh := [token for token in asked if token not in known]:
            log.warning(
                "%s take spare rows of the embeddings as these are; resize_vocab: true starts their rows like other "
                "tokens' and trains them", ", ".join(fresh),
            )  # fmt: skip


def grow(base: PreTrainedModel, rows: int) -> PreTrainedModel:
    """At least so many rows in embeddings and head, in place; tied ones stay tied.

    Raises:
        ModelError: they are quantised.
    """
    before = num_rows(base)
    if rows <= before:
        return base
    if packed := [path for path, module in matrices(base).items() if is_packed(module)]:
        raise ModelError(
            f"{', '.join(packed)} cannot get new rows: quantised", where="resize_vocab",
            fix="take a method that leaves embeddings and head as they are (quantization_method: bnb)",
        )  # fmt: skip
    trains = [module.weight.requires_grad for module in matrices(base).values()]
    base.resize_token_embeddings(rows, mean_resizing=False)
    for module, flag in zip(matrices(base).values(), trains, strict=True):
        module.requires_grad_(flag)
    start_rows(base, NewTokens(list(range(before, rows))), _KNOWN.setdefault(base, before))
    return base


@torch.no_grad()
def start_rows(base: PreTrainedModel, new: NewTokens, known: int) -> None:
    """Give rows their first values, made of the first `known` rows of the same matrix."""
    for module in matrices(base).values():
        weight = module.weight.data
        if weight.is_meta:
            continue
        mean, spread = _statistics(weight[:known])
        bias = getattr(module, "bias", None)
        for token in new.ids:
            noise = _noise(token, weight.shape[1]).to(weight.device) * spread
            if token in new.described:
                like = weight[new.described[token]].float().mean(0)
                weight[token] = (like + noise if new.noise else like).to(weight.dtype)
            else:
                weight[token] = (mean + noise).to(weight.dtype)
            if isinstance(bias, nn.Parameter):
                bias.data[token] = bias.data[:known].float().mean().to(bias.dtype)


def _noise(token: int, columns: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(_SEED + token))


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column, fp32, some rows at a time."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    mean = sum((part.double().sum(0) for part in rows.split(_CHUNK)), total) / len(rows)
    variance = sum(((part.double() - mean).square().sum(0) for part in rows.split(_CHUNK)), total) / len(rows)
    return mean.float(), variance.sqrt().float()


def check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """C10: every id the tokenizer can produce must have an embedding row."""
    rows = num_rows(base)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embeddings only {rows} rows", where=name,
            expected="a tokenizer that belongs to this model",
            fix="set resize_vocab: true, which grows embeddings and head and trains the new rows; or use the model's "
            "own tokenizer, without add_tokens / add_special_tokens",
        )  # fmt: skip


def refuse_missing(base: PreTrainedModel, path: object, rows: int) -> None:
    """An adapter beside others of one base cannot bring tokens that the base lacks."""
    if rows > num_rows(base):
        raise ModelError(
            [
                Problem(
                    f"the adapter was trained with a vocabulary of {rows} rows, the model has {num_rows(base)}",
                    str(path), fix="load it as the model's own adapter: adapter_name_or_path",
                )
            ]
        )  # fmt: skip


def largest(ids: Iterable[int]) -> int:
    """Rows that a matrix needs to hold these ids."""
    return max((i + 1 for i in ids), default=0)
