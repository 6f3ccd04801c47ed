"""The data half of a run in one call: names of datasets in, token ids and the data report out.
 `encoder.py` turns examples into ids; here are the refusals, the report, and the copy on disk
(`tokenized_path`), which is used again only for the same data, template, tokenizer, lengths and
policies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.encoded import Answer, Encoded, EncodedDataset
from trueup.data.encoder import (
    PROMPT_TOO_LONG,
    TOO_LONG,
    Policy,
    Tally,
    Truncation,
    encode_examples,
    tell,
)
from trueup.data.examples import Example
from trueup.data.load import LoadedData, load_examples_for
from trueup.data.report import DataReport, number
from trueup.data.templates import ChatTemplate, load_template, own_source
from trueup.errors import ConfigError, DataError, Problem

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


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run takes from its data."""

    train: EncodedDataset
    eval: dict[str, EncodedDataset]  # "eval", or "eval_<dataset>" each
    report: DataReport
    template: ChatTemplate


def prepare(cfg: RunConfig, tokenizer: Any) -> Prepared:
    """Read, parse, split, mix and encode the data of a run.

    Raises ConfigError, DataError or ModelError with every problem of a step; rows that are left out
    are in the report.
    """
    template = run_template(cfg, tokenizer)
    policy = Policy(cfg.data.cutoff_len, cfg.data.truncation, cfg.data.train_on_prompt, cfg.data.mask_history)
    cache = _Cache(cfg, template, policy, tokenizer)
    data = _load(cfg, cache)
    report = data.report
    encoded: dict[str, EncodedDataset] = {}
    tallies: list[Tally] = []
    for name, examples in {"train": data.train, **data.eval}.items():
        encoded[name], tally = cache.encode(name, examples)
        tell(report, tally)
        tallies.append(tally)
    refuse(report, tallies, cfg.data.on_bad_rows, cfg.data.truncation)
    if cfg.data.dataset:
        report.require_usable()
    _require_splits(encoded, tallies)
    cache.save(encoded, tallies)
    report.splits = {name: len(dataset) for name, dataset in encoded.items()}
    return Prepared(encoded.pop("train"), encoded, report, template)


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


def _load(cfg: RunConfig, cache: _Cache) -> LoadedData:
    """Examples; none if only a tokenised copy is given (`tokenized_path` without `dataset`)."""
    if not cfg.data.dataset and cache.exists:
        return LoadedData([], {name: [] for name in cache.splits if name != "train"}, DataReport())
    if not cfg.data.dataset and not cfg.data.eval_dataset:
        raise ConfigError("no dataset is given", where="dataset", fix="dataset: NAME or a file's path")
    return load_examples_for(cfg)


class _Cache:
    """The tokenised copy in `tokenized_path`: a folder a split, with what it was made from."""

    def __init__(self, cfg: RunConfig, template: ChatTemplate, policy: Policy, tokenizer: Any) -> None:
        self.template = template
        self.policy = policy
        self.root = Path(cfg.data.tokenized_path) if cfg.data.tokenized_path else None
        present = self.root is not None and (self.root / "train").is_dir()
        self.exists = present and not cfg.data.overwrite_cache
        self.splits = sorted(p.name for p in self.root.iterdir()) if self.root and present else []
        self.facts: dict[str, Any] = {}
        if self.root:
            self.facts = {
                **asdict(policy),
                "kind of example": stage_kind(cfg) + (" and chat" if cfg.objective.knowledge_weight else ""),
                "template": template.fingerprint,
                "tokenizer": _tokenizer_fingerprint(tokenizer),
            }
        self._made_from: dict[str, dict[str, Any]] = {}

    def encode(self, name: str, examples: Sequence[Example]) -> tuple[EncodedDataset, Tally]:
        """The split `name`, from disk if it is there and was made from the same."""
        if not self.root:
            return encode_examples(examples, self.template, self.policy)
        facts = {**self.facts, "data": _examples_fingerprint(examples)} if examples else self.facts
        if self.exists and name not in self.splits:
            self._refuse(f"without {name}")
        if self.exists:
            dataset, about = EncodedDataset.load(self.root / name)
            self._compare(facts, about["facts"])
            return dataset, Tally(**about["tally"])
        self._made_from[name] = facts
        return encode_examples(examples, self.template, self.policy)

    def save(self, datasets: dict[str, EncodedDataset], tallies: Sequence[Tally]) -> None:
        """Keep the copy, unless it came from there; the first process of a run writes."""
        if not self.root or self.exists or os.environ.get("RANK", "0") != "0":
            return
        for (name, dataset), tally in zip(datasets.items(), tallies, strict=True):
            about = {"facts": self._made_from[name], "tally": asdict(tally)}
            dataset.save(self.root / name, about)

    def _compare(self, now: dict[str, Any], then: dict[str, Any]) -> None:
        changed = [
            f"{key} ({then.get(key)} → {value})" if isinstance(value, (int, bool)) or len(value) < 20 else key
            for key, value in now.items()
            if then.get(key) != value
        ]
        if changed:
            self._refuse(f"with another {', '.join(changed)}")

    def _refuse(self, how: str) -> None:
        raise ConfigError(
            f"the tokenised data was made {how}",
            where=f"tokenized_path: {self.root}",
            fix="set overwrite_cache: true to tokenise again, or name another folder",
        )


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _examples_fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()
