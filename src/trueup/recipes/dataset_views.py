"""What of `trueup data` needs a tokenizer: rows as a model sees them, and their tokens counted."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import prepare, run_template
from trueup.data.encoder import Policy, encode_examples
from trueup.data.examples import Kind
from trueup.data.layout import PEEKED
from trueup.data.load import LoadedData, load_examples_for
from trueup.data.mixing import sample_indices
from trueup.data.preview import Preview, preview
from trueup.data.registry import resolve_datasets
from trueup.data.report import DataReport
from trueup.errors import ConfigError, DataError
from trueup.models.tokenizer import load_tokenizer
from trueup.recipes.batches import count_tokens, plan_batches
from trueup.recipes.datasets import ALONE, dataset_config, names_model

log = logging.getLogger("trueup")

_UNLIMITED = 1 << 30  # tokens


def preview_datasets(
    names: Sequence[str], source: str | None, words: Sequence[str], count: int = 3, row: str | None = None
) -> Preview:
    """The first `count` rows of each dataset as a run would see them, or the one with the id `row`."""
    cfg, kind = dataset_config(names, source, words)
    if not names_model(source, words):
        log.warning("No model is named: tokens are those of the built-in one. model_name_or_path=… shows your model's.")
    tokenizer = load_tokenizer(cfg.model)
    template = run_template(cfg, tokenizer)
    data = cfg.data
    policy = Policy(data.cutoff_len, _truncation(cfg), data.train_on_prompt, data.mask_history, data.mask_thinking)
    shown: Preview | None = None
    for name in cfg.data.dataset:
        loaded, wanted = _load(cfg, kind, name, count, row)
        part = preview(loaded.train, loaded.report, template, policy, wanted)
        shown = part if shown is None else Preview(shown.rows + part.rows, shown.safety or part.safety, shown.settings)
    assert shown is not None
    return Preview(shown.rows, shown.safety, {"stage": cfg.objective.stage, **shown.settings})


def _truncation(cfg: RunConfig) -> Any:
    return "drop" if cfg.data.truncation == "error" else cfg.data.truncation  # shown with its reason, not refused


def _load(cfg: RunConfig, kind: Kind | None, name: str, count: int, row: str | None) -> tuple[LoadedData, list[str]]:
    """What a dataset has of the wanted rows, and their ids. No more rows are looked at than needed."""
    (spec,) = resolve_datasets([name], cfg.data.dataset_dir, cfg.model.hub)
    alone = cfg.replace(**ALONE, dataset=[name])
    index = None if row is None else _index(row, spec.name)
    if index is None:
        alone = alone.replace(max_samples=count)
    elif spec.num_samples is None:
        alone = alone.replace(max_samples=index + 1)
    enough = max(PEEKED, alone.data.max_samples or 0) if spec.num_samples is None else None
    try:
        loaded = load_examples_for(alone, kind, first=enough)
    except DataError:  # perhaps these few cannot be used, and are to be shown with the reason
        if index is not None or count >= PEEKED:
            raise
        loaded = load_examples_for(alone.replace(max_samples=PEEKED), kind, first=enough)
    total = loaded.report.dataset(spec.name).available
    order = sample_indices(total, spec.num_samples, _seed(cfg)).tolist()
    if index is None:
        return loaded, [f"{spec.name}:{i}" for i in dict.fromkeys(order[:count])]
    if index >= total:
        raise _no_row(row, spec.name, f"a number below {total}")
    if index not in order:
        raise ConfigError(f"row {index} is not among the {spec.num_samples} that `num_samples` draws", where="--row")
    return loaded, [f"{spec.name}:{index}"]


def _seed(cfg: RunConfig) -> int:
    return cfg.train.seed if cfg.train.data_seed is None else cfg.train.data_seed


def _index(row: str, name: str) -> int:
    number = row.removeprefix(f"{name}:")
    if not number.isdigit():
        raise _no_row(row, name, f"a number, or {name}:NUMBER")
    return int(number)


def _no_row(row: str | None, name: str, expected: str) -> ConfigError:
    return ConfigError(f"there is no row {row!r} in {name}", where="--row", expected=expected)


def counted(cfg: RunConfig) -> DataReport:
    """The report of a run's data, with the tokens of its batches where their order is known beforehand."""
    prepared = prepare(cfg, load_tokenizer(cfg.model))
    if prepared.stream:
        prepared.stream.close()
    elif len(prepared.train) and cfg.objective.stage not in ONLINE:
        budget = None if cfg.data.batch_tokens == "auto" else cfg.data.batch_tokens
        whole = cfg.replace(dataloader_drop_last=False, batch_tokens=budget)
        plan, arithmetic = plan_batches(whole, prepared.train.lengths)
        prepared.report.epoch_tokens = count_tokens(prepared.train, plan, arithmetic.epochs).by_layout
    return prepared.report


def token_lengths(cfg: RunConfig, loaded: LoadedData) -> dict[str, list[int]]:
    """Tokens of each part of each row, before anything is cut."""
    template = run_template(cfg, load_tokenizer(cfg.model))
    _, tally = encode_examples(loaded.train, template, Policy(_UNLIMITED))
    lengths: dict[str, list[int]] = defaultdict(list)
    for _, parts in tally.lengths:
        for part, tokens in parts.items():
            lengths[part].append(tokens)
    return dict(lengths)
