"""The data half of a run in one call: names of datasets in, token ids and the data report out.

`encoder.py` turns examples into ids, `tokenized.py` keeps them for the next start; here are the
refusals and the report.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.digests import data_digest, is_worth_keeping, local_files
from trueup.data.encoded import Answer, Encoded, EncodedDataset
from trueup.data.encoder import (
    PROMPT_TOO_LONG,
    TOO_LONG,
    Policy,
    Tally,
    Truncation,
    encode_examples,
    say,
    tell,
    tell_lengths,
)
from trueup.data.examples import Example
from trueup.data.load import LoadedData, load_examples_for
from trueup.data.report import DataReport, number
from trueup.data.streaming import TokenStream, open_stream
from trueup.data.templates import ChatTemplate, load_template, own_source
from trueup.data.tokenized import CachedCopy, Tokenised, UsersCopy, facts_of
from trueup.errors import ConfigError, DataError, Problem
from trueup.garbage import no_collection

__all__ = [
    "Answer",
    "Encoded",
    "EncodedDataset",
    "Prepared",
    "encode_dataset",
    "prepare",
    "run_template",
]

_SHOWN = 10
_WORTH_ROWS = 5_000  # not of files; fewer are tokenised about as fast as they are looked up


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run takes from its data."""

    train: EncodedDataset
    eval: dict[str, EncodedDataset]  # "eval", or "eval_<dataset>" each
    report: DataReport
    template: ChatTemplate
    stream: TokenStream | None = None  # with streaming, `train` is only its first buffer


def prepare(cfg: RunConfig, tokenizer: Any) -> Prepared:
    """Read, parse, split, mix and encode the data of a run, or take them from an earlier one.

    Raises ConfigError, DataError or ModelError with every problem of a step; rows that are left out
    are in the report.
    """
    template = run_template(cfg, tokenizer)
    policy = _policy(cfg)
    if cfg.data.streaming:
        return _prepare_stream(cfg, template, policy)
    copy, data = _copy_of(cfg, template, policy, tokenizer)
    found = kept = copy.find() if copy else None
    if found:
        report = _report_of(found, data)
        for tally in found.tallies.values():
            say(tally, template, policy)
    else:
        data = data or _load(cfg)
        report = data.report
        found = _encode(cfg, data, template, policy)
    tallies = list(found.tallies.values())
    for tally in tallies:
        tell(report, tally)
    refuse(report, tallies, cfg.data.on_bad_rows, cfg.data.truncation)
    if cfg.data.dataset:
        report.require_usable()
    _require_splits(found.datasets, tallies)
    if copy and not kept and os.environ.get("RANK", "0") == "0":  # the first process of a run writes
        copy.keep(found)
    report.splits = {name: len(dataset) for name, dataset in found.datasets.items()}
    report.cutoff_len = policy.cutoff_len
    evaluation = {name: dataset for name, dataset in found.datasets.items() if name != "train"}
    return Prepared(found.datasets["train"], evaluation, report, template)


def _policy(cfg: RunConfig) -> Policy:
    data = cfg.data
    return Policy(data.cutoff_len, data.truncation, data.train_on_prompt, data.mask_history, data.mask_thinking)


def _prepare_stream(cfg: RunConfig, template: ChatTemplate, policy: Policy) -> Prepared:
    """The same with `streaming`: what trains is read while it trains; what evaluates is read now."""

    def refused(report: DataReport, tallies: Sequence[Tally]) -> None:
        refuse(report, tallies, cfg.data.on_bad_rows, cfg.data.truncation)

    # The stream's thread has a tokenizer of its own: two threads must not use one at the same time.
    begin, examples, report = open_stream(cfg, deepcopy(template), policy, refused)
    report.cutoff_len = policy.cutoff_len
    evaluation = {}
    for name, of_split in examples.items():
        evaluation[name], tally = encode_examples(of_split, template, policy)
        tell(report, tally)
        refused(report, [tally])
        report.splits[name] = len(evaluation[name])
    if not cfg.train.do_train:
        return Prepared(EncodedDataset.of([]), evaluation, report, template)
    stream = begin()
    return Prepared(stream.dataset, evaluation, report, template, stream)


def _report_of(found: Tokenised, data: LoadedData | None) -> DataReport:
    """The report on rows whose tokens were found: that of reading them, if they had to be read."""
    if data is None:
        report = DataReport.restored(found.report)
        report.tell()
        return report
    data.report.take_lengths(DataReport.restored(found.report))
    return data.report


def _copy_of(
    cfg: RunConfig, template: ChatTemplate, policy: Policy, tokenizer: Any
) -> tuple[UsersCopy | CachedCopy | None, LoadedData | None]:
    """Where the tokens of this run are, or will be, kept; and its data, if they had to be read to know that."""
    users = bool(cfg.data.tokenized_path)
    has_data = bool(cfg.data.dataset or cfg.data.eval_dataset)
    files = local_files(cfg) if has_data else None
    if not users and (not has_data or (files is not None and not is_worth_keeping(files))):
        return None, None
    facts = facts_of(cfg, template, policy, tokenizer)
    if not has_data:
        copy = UsersCopy(cfg, facts)
        if not copy.exists:
            raise ConfigError("no dataset is given", where="dataset", fix="dataset: NAME or a file's path")
        return copy, None
    if files is not None:
        facts["data"] = data_digest(cfg, files)
        return (UsersCopy if users else CachedCopy)(cfg, facts), None
    data = _load(cfg)  # from a hub, an address or a program: only the rows can tell whether they are the same
    splits = {"train": data.train, **data.eval}
    if not users and sum(map(len, splits.values())) < _WORTH_ROWS:
        return None, data
    facts["data"] = _examples_fingerprint(splits)
    return (UsersCopy if users else CachedCopy)(cfg, facts), data


def _load(cfg: RunConfig) -> LoadedData:
    if not cfg.data.dataset and not cfg.data.eval_dataset:
        raise ConfigError("no dataset is given", where="dataset", fix="dataset: NAME or a file's path")
    with no_collection():  # what is read here is kept
        return load_examples_for(cfg)


def _encode(cfg: RunConfig, data: LoadedData, template: ChatTemplate, policy: Policy) -> Tokenised:
    datasets: dict[str, EncodedDataset] = {}
    tallies: dict[str, Tally] = {}
    gc.freeze()  # the examples stay: neither a collection nor a forked process need look through them
    try:
        for name, examples in {"train": data.train, **data.eval}.items():
            datasets[name], tallies[name] = encode_examples(
                examples, template, policy, cfg.data.preprocessing_num_workers, cfg.data.preprocessing_batch_size
            )
    finally:
        gc.unfreeze()
    for tally in tallies.values():
        tell_lengths(data.report, tally)
    return Tokenised(datasets, tallies, data.report.state())


def run_template(cfg: RunConfig, tokenizer: Any) -> ChatTemplate:
    """The chat template of a run, to train and to talk with."""
    name = cfg.data.template
    if name is None and stage_kind(cfg) == "text" and own_source(tokenizer) is None:
        name = "empty"  # documents need no template, so there is nothing to say about a missing one
    return load_template(
        tokenizer,
        name,
        cfg.data.default_system,
        cfg.data.enable_thinking,
        cfg.data.preserve_thinking,
        cfg.data.tool_format,
        cfg.model.split_special_tokens,
    )


def encode_dataset(
    examples: Sequence[Example],
    template: ChatTemplate,
    *,
    cutoff_len: int,
    truncation: Truncation = "keep_start",
    train_on_prompt: bool = False,
    mask_history: bool = False,
    on_bad_rows: Literal["skip", "error"] = "skip",
    report: DataReport | None = None,
) -> EncodedDataset:
    """Encode examples of any kinds, counting in `report` what became of every row.

    Raises DataError for rows that are refused (`on_bad_rows: error`, `truncation: error`) and when
    a dataset that `report` knows has no usable row left.
    """
    policy = Policy(cutoff_len, truncation, train_on_prompt, mask_history)
    dataset, tally = encode_examples(examples, template, policy)
    known = report or DataReport()
    tell(known, tally)
    refuse(known, [tally], on_bad_rows, truncation)
    if report:
        report.require_usable()
    return dataset


def refuse(report: DataReport, tallies: Sequence[Tally], on_bad_rows: str, truncation: str) -> None:
    """Raise DataError for rows that the user wants to hear of rather than lose."""
    if truncation == "error":
        long = [
            Problem(f"too long: {detail}", where=row)
            for tally in tallies
            for row, reason, detail in tally.dropped
            if reason in (TOO_LONG, PROMPT_TOO_LONG)
        ]
        if long:
            more = [Problem(f"… and {number(len(long) - _SHOWN)} more rows that are too long")]
            raise DataError(long[:_SHOWN] + (more if len(long) > _SHOWN else []))
    if on_bad_rows == "error":
        report.refuse_bad_rows()


def _require_splits(encoded: dict[str, EncodedDataset], tallies: Sequence[Tally]) -> None:
    """Refuse a split of which no row is left: nothing to train on, or to evaluate (C13)."""
    problems = []
    for (name, dataset), tally in zip(encoded.items(), tallies, strict=True):
        if len(dataset) or not tally.dropped:
            continue
        reasons = Counter(reason for _, reason, _ in tally.dropped).most_common()
        why = ", ".join(f"{number(count)} {reason}" for reason, count in reasons)
        purpose = "train on" if name == "train" else "evaluate on"
        problems.append(
            Problem(
                f"0 of the {number(len(tally.dropped))} rows to {purpose} are usable: {why}",
                where="dataset" if name == "train" else f"val_size or eval_dataset ({name})",
                fix="raise cutoff_len, or choose other rows",
            )
        )
    if problems:
        raise ConfigError(problems)


def _examples_fingerprint(splits: Mapping[str, Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(name.encode())
        for example in examples:
            digest.update(repr(example).encode())
    return digest.hexdigest()
