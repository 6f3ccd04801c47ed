"""What `trueup data` needs of a run: config, tokenizer and template, for datasets named on the command line."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from trueup.builtin import BUILTIN_MODELS
from trueup.config.load import given, load_config
from trueup.config.methods import ONLINE, stage_kind
from trueup.config.schema import RunConfig
from trueup.data.buffers import PEEKED
from trueup.data.encode import prepare, run_template
from trueup.data.encoder import Policy, encode_examples
from trueup.data.examples import Kind
from trueup.data.layout import kind_of
from trueup.data.load import LoadedData, load_examples_for
from trueup.data.mixing import sample_indices
from trueup.data.preview import Preview, preview
from trueup.data.readers import Row
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.report import DataReport
from trueup.data.row_files import RowFile
from trueup.data.sources import files_of, read_rows
from trueup.data.stats import DatasetStats, Stats, measure
from trueup.data.write import check_free, write_text
from trueup.errors import ConfigError, DataError
from trueup.models.tokenizer import load_tokenizer
from trueup.recipes.batches import count_tokens, plan_batches

log = logging.getLogger("trueup")

_STAGES: dict[Kind, str] = {"text": "pt", "chat": "sft", "pair": "dpo", "ranking": "rm", "feedback": "kto"}
_UNLIMITED = 1 << 30  # tokens
#: A dataset looked at by itself: nothing held out, mixed, streamed or kept.
_ALONE: dict[str, Any] = {
    "eval_dataset": [],
    "val_size": 0.0,
    "do_eval": False,
    "eval_strategy": "no",
    "mix_strategy": "concat",
    "interleave_probs": [],
    "tokenized_path": None,
    "max_samples": None,
    "on_bad_rows": "skip",
}


def dataset_config(names: Sequence[str], source: str | None, words: Sequence[str]) -> tuple[RunConfig, Kind | None]:
    """The config of a run on `names` (those of the config if there are none), and the kind of their rows.

    Without a `stage` it is the one that the first dataset's rows fit; without a model, the built-in one's
    tokenizer reads them, which is said.

    Raises:
        ConfigError, DataError: whatever keeps such a run from reading its data.
    """
    known = given(source, words)
    names = _named(names, known)
    extra = [f"dataset={names[0]}"]
    kind: Kind | None = None
    if "stage" not in known:
        kind = _kind(names[0], known)
        extra += [f"stage={_STAGES[kind]}"] if kind in _STAGES else []
    if "model_name_or_path" not in known:
        extra.append(f"model_name_or_path={BUILTIN_MODELS[0]}")
    cfg = load_config(source, [*words, *extra])
    return cfg.replace(dataset=names), kind


def names_model(source: str | None, words: Sequence[str]) -> bool:
    """Whether a model is given, whose tokens are then meant."""
    return "model_name_or_path" in given(source, words)


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return [str(name) for name in value or []]


def _kind(name: str, known: dict[str, Any]) -> Kind:
    (spec,) = resolve_datasets([name], known.get("dataset_dir") or "data", known.get("hub") or "huggingface")
    return kind_of(spec, _first_rows(spec))


def _first_rows(spec: DatasetSpec) -> list[Row]:
    """Enough rows to tell what they are; all, where they cannot be read one by one."""
    rows: list[Row] = []
    try:
        for file in files_of(spec):
            with closing(RowFile(file)) as opened:
                rows += [row for row, _ in islice(opened, PEEKED - len(rows))]
    except DataError:
        rows = []  # reading all of them tells all that is wrong
    return rows or read_rows(spec).values


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
    alone = cfg.replace(**_ALONE, dataset=[name])
    index = None if row is None else _index(row, spec.name)
    if index is None:
        alone = alone.replace(max_samples=count)
    elif spec.num_samples is None:
        alone = alone.replace(max_samples=index + 1)
    loaded = load_examples_for(alone, kind)
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


def check_datasets(names: Sequence[str], source: str | None, words: Sequence[str]) -> DataReport:
    """The data report of datasets, each read as the kind its rows are; of a config's data if none is named.

    With a model, its tokens are counted and cut as in training; without one, rows are only read.

    Raises:
        ConfigError, DataError, ModelError: what would stop a run; with `on_bad_rows: error` every bad row.
    """
    known = given(source, words)
    if not names and "stage" in known and names_model(source, words):
        cfg = load_config(source, words)
        return _counted(cfg)
    report = DataReport()
    for name in _named(names, known):
        cfg, kind = dataset_config([name], source, words)
        cfg = cfg.replace(**{**_ALONE, "max_samples": cfg.data.max_samples, "on_bad_rows": cfg.data.on_bad_rows})
        cfg = cfg.replace(dataset=[name])
        if names_model(source, words) and (kind is None or kind in _STAGES):
            part = _counted(cfg)
        else:
            part = load_examples_for(cfg, kind).report
        report.include(part)
    if not names_model(source, words):
        report.note("no model is named, so nothing is tokenised: model_name_or_path=… shows lengths and cuts")
    return report


def _counted(cfg: RunConfig) -> DataReport:
    """The report of a run's data, with the tokens of its batches where their order is known beforehand."""
    prepared = prepare(cfg, load_tokenizer(cfg.model))
    if prepared.stream:
        prepared.stream.close()
    elif len(prepared.train) and cfg.objective.stage not in ONLINE:
        plan, arithmetic = plan_batches(cfg.replace(dataloader_drop_last=False), prepared.train.lengths)
        prepared.report.epoch_tokens = count_tokens(prepared.train, plan, arithmetic.epochs).by_layout
    return prepared.report


def measure_datasets(names: Sequence[str], source: str | None, words: Sequence[str]) -> Stats:
    """The numbers of datasets: in tokens with a model, else in characters."""
    known = given(source, words)
    found: list[DatasetStats] = []
    for name in _named(names, known):
        cfg, kind = dataset_config([name], source, words)
        cfg = cfg.replace(**{**_ALONE, "max_samples": cfg.data.max_samples}, dataset=[name])
        loaded = load_examples_for(cfg, kind)
        lengths, counts = measure(loaded.train)
        unit = "characters"
        if names_model(source, words):
            lengths, unit = _token_lengths(cfg, loaded), "tokens"
        (entry,) = loaded.report.datasets.values()
        words_for = kind or stage_kind(cfg)
        found.append(DatasetStats(entry.name, words_for, entry.read, entry.kept, unit, lengths, **counts))
    return Stats(found)


def _named(names: Sequence[str], known: dict[str, Any]) -> list[str]:
    found = list(names) or _listed(known.get("dataset"))
    if not found:
        raise ConfigError("no dataset is named", fix="give a name of `trueup data list`, a file, or a config")
    return list(dict.fromkeys(found))


def _token_lengths(cfg: RunConfig, loaded: LoadedData) -> dict[str, list[int]]:
    """Tokens of each part of each row, before anything is cut."""
    template = run_template(cfg, load_tokenizer(cfg.model))
    _, tally = encode_examples(loaded.train, template, Policy(_UNLIMITED))
    lengths: dict[str, list[int]] = defaultdict(list)
    for _, parts in tally.lengths:
        for part, tokens in parts.items():
            lengths[part].append(tokens)
    return dict(lengths)


def write_page(path: Path, html: str, force: bool) -> None:
    """Write a page that `--html` asked for."""
    check_free(path, force, "--html")
    write_text(path, html)
