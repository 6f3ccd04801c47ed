"""`trueup data check` and `stats`, and the config of a run on datasets named on the command line.

What needs a tokenizer is in `dataset_views.py`, imported when it is needed: a report that is kept takes no second.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.builtin import BUILTIN_MODELS
from trueup.config.load import given, load_config
from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.examples import Kind
from trueup.data.layout import PEEKED, kind_of
from trueup.data.load import load_examples_for
from trueup.data.registry import resolve_datasets
from trueup.data.report import DataReport
from trueup.data.sources import read_rows
from trueup.data.stats import DatasetStats, Stats, measure
from trueup.data.write import check_free, write_text
from trueup.errors import ConfigError
from trueup.recipes.kept_reports import KeptReport

log = logging.getLogger("trueup")

_STAGES: dict[Kind, str] = {"text": "pt", "chat": "sft", "pair": "dpo", "ranking": "rm", "feedback": "kto"}
#: A dataset looked at by itself: nothing held out, mixed, streamed or kept.
ALONE: dict[str, Any] = {
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
    return kind_of(spec, read_rows(spec, first=PEEKED).values)


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
        cfg = cfg.replace(**{**ALONE, "max_samples": cfg.data.max_samples, "on_bad_rows": cfg.data.on_bad_rows})
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
    """The report of a run's data with tokens: that of an earlier start, if nothing has changed since."""
    kept = KeptReport.of(cfg)
    if kept and (found := kept.find()):
        return found
    from trueup.recipes.dataset_views import counted

    if kept is None:
        return counted(cfg)
    with kept.listening():
        report = counted(cfg)
    kept.keep(report)
    return report


def measure_datasets(names: Sequence[str], source: str | None, words: Sequence[str]) -> Stats:
    """The numbers of datasets: in tokens with a model, else in characters."""
    known = given(source, words)
    found: list[DatasetStats] = []
    for name in _named(names, known):
        cfg, kind = dataset_config([name], source, words)
        cfg = cfg.replace(**{**ALONE, "max_samples": cfg.data.max_samples}, dataset=[name])
        loaded = load_examples_for(cfg, kind)
        lengths, counts = measure(loaded.train)
        unit = "characters"
        if names_model(source, words):
            from trueup.recipes.dataset_views import token_lengths

            lengths, unit = token_lengths(cfg, loaded), "tokens"
        (entry,) = loaded.report.datasets.values()
        for note in loaded.report.notes:
            log.info("%s", note)
        words_for = kind or stage_kind(cfg)
        found.append(DatasetStats(entry.name, words_for, entry.read, entry.kept, unit, lengths, **counts))
    return Stats(found)


def _named(names: Sequence[str], known: dict[str, Any]) -> list[str]:
    found = list(names) or _listed(known.get("dataset"))
    if not found:
        raise ConfigError("no dataset is named", fix="give a name of `trueup data list`, a file, or a config")
    return list(dict.fromkeys(found))


def write_page(path: Path, html: str, force: bool) -> None:
    """Write a page that `--html` asked for."""
    check_free(path, force, "--html")
    write_text(path, html)
