"""From names of datasets to lists of examples: resolve, read, parse, split, mix, and account for
every row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.counts import counted, number
from trueup.data.examples import Chat, Example, Kind, texts_of
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import Layout, choose_layout
from trueup.data.mixing import mix, sample_indices
from trueup.data.readers import Row
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.report import DataReport
from trueup.data.sources import Rows, read_rows
from trueup.errors import ConfigError, DataError, Problem
from trueup.waiting import waiting

HELD_OUT = 0.05  # share held out when evaluation is asked for without data to evaluate on
_SHOWN = 10
#: Control characters but for tab, line ends and form feed, and marks that turn the direction of writing around.
_HIDDEN = re.compile(r"[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]").search
_ID_COLUMNS = ("id", "_id", "uid", "uuid", "row_id", "example_id")
_PLACEHOLDER = re.compile(r"\{\{ *(name|author) *\}\}")
_TOKENS = {
    "huggingface": "hf_hub_token",
    "modelscope": "ms_hub_token",
    "modelers": "om_hub_token",
}


@dataclass(slots=True)
class LoadedData:
    """Examples to train on, in mixed order, and to evaluate on by name ("eval" or
    "eval_<dataset>").
    """

    train: list[Example]
    eval: dict[str, list[Example]]
    report: DataReport


@dataclass(slots=True)
class _Dataset:
    """A dataset read once: its usable examples by row index, and the rows to use in order."""

    name: str
    examples: dict[int, Example] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def picked(self, without: set[int] | frozenset[int] = frozenset()) -> list[Example]:
        return [self.examples[i] for i in self.order if i in self.examples and i not in without]


def load_examples(
    dataset: Sequence[str],
    *,
    kind: Kind,
    beside: Kind | None = None,
    eval_dataset: Sequence[str] = (),
    dataset_dir: str | Path = "data",
    hub: str = "huggingface",
    hub_token: str | None = None,
    cache_dir: str | Path | None = None,
    max_samples: int | None = None,
    val_size: float = 0.0,
    mix_strategy: str = "concat",
    interleave_probs: Sequence[float] | None = None,
    on_bad_rows: str = "skip",
    seed: int = 42,
    eval_wanted: bool = False,
    eval_on_each_dataset: bool = False,
    first: int | None = None,
) -> LoadedData:
    """Examples of `kind` from the named datasets, and the report on every row of theirs.

    Datasets that do not hold `kind` may hold `beside`, if it is given. A name given twice counts twice.
    `max_samples` takes the first rows of each dataset. `val_size` (a share below 1, or a number of rows)
    is held out of the training data before mixing, so that no copy of a held-out row is trained on;
    without any evaluation data, `eval_wanted` holds out 5 %. Files are read no further than `first` rows of a
    dataset, if it is given; what comes behind them is not known then. Raises ConfigError, DataError or
    ModelError, with every problem of all datasets at once.
    """
    names = list(dict.fromkeys([*dataset, *eval_dataset]))
    specs = dict(zip(names, resolve_datasets(names, dataset_dir, hub), strict=True))
    report = DataReport()
    loaded = _load_all(specs, (kind, beside), report, hub_token, cache_dir, max_samples, seed, first)
    report.require_usable()
    if on_bad_rows == "error":
        report.refuse_bad_rows()
    training = [loaded[name] for name in dataset]
    held_out = _hold_out(training, val_size, eval_wanted, bool(eval_dataset), seed, report)
    train = _mixed(
        [d.picked(held_out.get(d.name, set())) for d in training],
        mix_strategy,
        interleave_probs,
        seed,
    )
    evaluation = {loaded[name].name: loaded[name].picked() for name in eval_dataset}
    for data in loaded.values():
        if data.name in held_out:
            evaluation[data.name] = [data.examples[i] for i in sorted(held_out[data.name])]
    splits = name_splits(evaluation, eval_on_each_dataset)
    report.compare_rows(e for d in loaded.values() for e in d.examples.values())
    if splits:
        report.compare_splits(train, (e for examples in splits.values() for e in examples))
    report.splits = {"train": len(train), **{name: len(e) for name, e in splits.items()}}
    report.tell()
    return LoadedData(train, splits, report)


# ---- reading -------------------------------------------------------------------------------------


def _load_all(
    specs: dict[str, DatasetSpec],
    kinds: tuple[Kind, Kind | None],
    report: DataReport,
    token,
    cache_dir,
    max_samples,
    seed,
    first,
) -> dict[str, _Dataset]:
    """Every dataset, each read once. Raises DataError with the structural faults of all of them."""
    loaded: dict[str, _Dataset] = {}
    problems: list[Problem] = []
    for name, spec in specs.items():
        try:
            rows = read_rows(spec, token=token, cache_dir=cache_dir, first=first, tell=False)
            loaded[name] = _parse(spec, rows, kinds, report, max_samples, seed)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return loaded


def _parse(
    spec: DatasetSpec,
    rows: Rows,
    kinds: tuple[Kind, Kind | None],
    report: DataReport,
    max_samples: int | None,
    seed: int,
) -> _Dataset:
    entry = report.dataset(spec.name)
    entry.origin, entry.available = spec.origin, len(rows)
    for note in dict.fromkeys(rows.notes):
        report.note(f"{spec.name}: {note}")
    order = sample_indices(len(rows), spec.num_samples, seed).tolist()[:max_samples]
    result = _Dataset(spec.name, order=order)
    chosen = sorted(set(order))
    entry.read = len(chosen)
    if not chosen:
        return result  # `require_usable` says so
    layout = layout_for(spec, rows.values, *kinds)
    faults: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    with waiting(f"reading {spec.name}", len(chosen), "rows") as tell:
        for done, index in enumerate(chosen, 1):
            row = f"{spec.name}:{index}"
            try:
                result.examples[index] = parse_with(layout, row, rows[index])
            except RowProblem as problem:
                report.dropped(row, problem.reason, problem.detail or excerpt(rows[index]))
            except ShapeProblem as problem:
                faults[problem.column, problem.found, problem.expected].append(index)
            tell(done)
    if faults:
        raise DataError(_shape_problems(spec, rows, faults, len(chosen)))
    if column := _id_column(layout, rows[chosen[0]]):
        report.compare_ids((f"{spec.name}:{index}", rows[index].get(column)) for index in chosen)
    _tell_placeholders(result, report)
    _tell_hidden(result, report)
    return result


def _id_column(layout: Layout, row: Row) -> str | None:
    """The column that gives each row a name of its own, if there is one."""
    return next((name for name in _ID_COLUMNS if name in row and name not in layout.columns.values()), None)


def layout_for(spec: DatasetSpec, rows: Sequence[Row], kind: Kind, beside: Kind | None) -> Layout:
    """How to read the rows as one kind, or else as the other; what is wrong is told of the first."""
    try:
        return choose_layout(spec, rows, kind)
    except DataError as error:
        if beside is None:
            raise
        try:
            return choose_layout(spec, rows, beside)
        except DataError:
            raise error from None


def _tell_placeholders(data: _Dataset, report: DataReport) -> None:
    """`identity` sets are handed around as forms; a model learns blanks as they stand."""
    blanks = [example.row for example in data.examples.values() if has_placeholder(example)]
    if blanks:
        note = (
            f"{data.name}: {counted(len(blanks), 'row holds', 'rows hold')} a placeholder such as {{{{name}}}} "
            f"(first {blanks[0]}); replace it before training"
        )
        report.warn(note)


def _tell_hidden(data: _Dataset, report: DataReport) -> None:
    """Characters that nobody sees are trained on like any other (D24)."""
    found = [(example.row, hidden) for example in data.examples.values() if (hidden := hidden_character(example))]
    if found:
        row, hidden = found[0]
        rows = counted(len(found), "row holds", "rows hold")
        note = f"{data.name}: {rows} hidden control characters (first {hidden} in {row})"
        report.warn(note)


def hidden_character(example: Example) -> str | None:
    """The first control character of an example, other than white space, as "U+0008"."""
    for text in texts_of(example):
        found = _HIDDEN(text)
        if found:
            return f"U+{ord(found[0]):04X}"
    return None


def has_placeholder(example: Example) -> bool:
    """Whether a form was never filled in."""
    return isinstance(example, Chat) and any(
        "{{" in m.content and _PLACEHOLDER.search(m.content) is not None for m in example.messages
    )


def _shape_problems(
    spec: DatasetSpec, rows: Rows, faults: dict[tuple[str, str, str], list[int]], read: int
) -> list[Problem]:
    """One problem per column and wrong type, with the rows that have it (D6)."""
    problems = []
    ordered = sorted(faults.items(), key=lambda item: -len(item[1]))
    for (column, found, expected), indices in ordered[:_SHOWN]:
        which = ", ".join(str(i) for i in indices[:_SHOWN])
        more = f" … and {number(len(indices) - _SHOWN)} more" if len(indices) > _SHOWN else ""
        count = "every row" if len(indices) == read else f"{number(len(indices))} of {counted(read, 'row', 'rows')}"
        problems.append(
            Problem(
                f"dataset {spec.name!r}: column `{column}` holds {found} in {count} (row {which}{more})",
                where=rows.where(indices[0]),
                expected=f"{expected}, in every row",
                fix="mend or remove these rows; nothing is converted by guessing",
            )
        )
    if len(ordered) > _SHOWN:
        rest = sum(len(indices) for _, indices in ordered[_SHOWN:])
        problems.append(Problem(f"dataset {spec.name!r}: {number(rest)} more rows with faults of this sort"))
    return problems


def excerpt(row: dict) -> str:
    """Something to recognise a row by: its last text, wherever it is."""
    texts: list[str] = []
    pending = list(row.values())
    while pending and len(texts) < 1:
        value = pending.pop(0)
        if isinstance(value, str) and value.strip():
            texts.append(value)
        elif isinstance(value, dict):
            pending[:0] = [part for key, part in value.items() if key not in ("from", "role")]
        elif isinstance(value, list):
            pending[:0] = value[-1:]
    return texts[0].strip() if texts else ""


# ---- splitting and mixing ------------------------------------------------------------------------


def _hold_out(
    training: Sequence[_Dataset],
    val_size: float,
    eval_wanted: bool,
    has_eval_data: bool,
    seed: int,
    report: DataReport,
) -> dict[str, set[int]]:
    """Row indices to evaluate on, by dataset; drawn over all datasets alike. Empty if none are
    wanted.
    """
    if val_size and has_eval_data:
        raise ConfigError("`val_size` and `eval_dataset` both name the evaluation data", fix="drop one of the two")
    if not val_size and (has_eval_data or not eval_wanted):
        return {}
    distinct = list({d.name: d for d in training}.values())
    rows = [(d.name, i) for d in distinct for i in d.examples]
    size = val_size or HELD_OUT
    count = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if count >= len(rows):
        raise ConfigError(
            f"holding out {number(count)} of {number(len(rows))} usable rows leaves none to train on",
            where="val_size" if val_size else "eval_strategy",
            fix="hold out fewer rows, give an `eval_dataset`, or do not evaluate",
        )
    if not val_size:
        note = (
            f"evaluation was asked for without data: {number(count)} of {number(len(rows))} rows "
            "(5 %) are held out; set `val_size` or `eval_dataset` to choose"
        )
        report.warn(note)
    held_out: dict[str, set[int]] = defaultdict(set)
    for position in np.random.default_rng(seed).permutation(len(rows))[:count]:
        name, index = rows[position]
        held_out[name].add(index)
    return dict(held_out)


def _mixed(parts: Sequence[list[Example]], strategy: str, probs: Sequence[float] | None, seed: int) -> list[Example]:
    return [parts[d][i] for d, i in mix([len(p) for p in parts], strategy, probs, seed)]


def name_splits(evaluation: dict[str, list[Example]], each: bool) -> dict[str, list[Example]]:
    """Evaluation sets of datasets by the names that metrics go by."""
    if each:
        return {f"eval_{name}": examples for name, examples in evaluation.items()}
    together = [example for examples in evaluation.values() for example in examples]
    return {"eval": together} if together else {}


def load_examples_for(cfg: RunConfig, kind: Kind | None = None, first: int | None = None) -> LoadedData:
    """`load_examples` with what a run's configuration says; `kind` is its stage's unless it is given."""
    return load_examples(
        **{**load_settings(cfg), "kind": kind or stage_kind(cfg)},
        **hub_settings(cfg),
        on_bad_rows=cfg.data.on_bad_rows,
        first=first,
    )


def hub_settings(cfg: RunConfig) -> dict[str, Any]:
    """Of the arguments of `load_examples`, those that say how to reach a hub."""
    return {"hub_token": getattr(cfg.model, _TOKENS[cfg.model.hub]), "cache_dir": cfg.model.cache_dir}


def load_settings(cfg: RunConfig) -> dict[str, Any]:
    """Of the arguments of `load_examples`, those that decide which examples come out."""
    data, train = cfg.data, cfg.train
    return {
        "dataset": data.dataset,
        "kind": stage_kind(cfg),
        "beside": "chat" if cfg.objective.knowledge_weight else None,
        "eval_dataset": data.eval_dataset,
        "dataset_dir": data.dataset_dir,
        "hub": cfg.model.hub,
        "max_samples": data.max_samples,
        "val_size": data.val_size,
        "mix_strategy": data.mix_strategy,
        "interleave_probs": data.interleave_probs or None,
        "seed": train.seed if train.data_seed is None else train.data_seed,
        "eval_wanted": train.do_eval or train.do_predict or train.eval_strategy != "no",
        "eval_on_each_dataset": data.eval_on_each_dataset,
    }
