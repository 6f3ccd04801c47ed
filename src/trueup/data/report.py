"""The data report: what became of every row, on a terminal and as data_report.json.

For every dataset and at any time: read = kept + the sum of all dropped. Rows are known by their id
("dataset:17"), and a row that is used twice (a dataset listed twice, or for training and
evaluation) is still one row: saying the same thing about it again changes nothing.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

from rich.console import Console, RenderableType

from trueup.data.balance import Sides, label_findings
from trueup.data.counts import Rows, counted, largest, number, shorten, some_ids, statistics
from trueup.data.examples import Chat, Example, Feedback, Messages, Pair, Prompt, Ranking, Text
from trueup.data.histogram import Histogram
from trueup.data.report_page import report_page
from trueup.data.report_text import report_text
from trueup.errors import DataError, Problem

__all__ = ["DataReport", "DatasetReport", "Rows", "fingerprint", "number", "prompt_fingerprint", "shorten"]

log = logging.getLogger("trueup")

_WIDTH = 80
#: Reasons for which a pair is dropped because its sides do not differ, by the words of `formats.py` and `encoder.py`.
_EQUAL = ("equal pair", "equal answers", "equal after truncation")
_BETTER_AND_WORSE = (("chosen", "rejected"), ("best", "worst"))  # parts whose lengths are set against each other


@dataclass(slots=True)
class DatasetReport:
    """One dataset: `available` rows in its files, `read` of them looked at (max_samples,
    num_samples).
    """

    name: str
    origin: str = ""
    available: int = 0
    read: int = 0
    dropped: dict[str, Rows] = field(default_factory=dict)
    truncated: dict[str, Rows] = field(default_factory=dict)  # by part: answer, chosen, rejected …
    duplicates: Rows = field(default_factory=Rows)
    repeated_ids: Rows = field(default_factory=Rows)  # rows with the id of an earlier row
    reversed_pairs: Rows = field(default_factory=Rows)
    overlap: Rows = field(default_factory=Rows)  # evaluation rows whose prompt is trained on as well
    labels: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)  # part → how many rows have so many tokens
    sides: Sides = field(default_factory=Sides)
    cut: int = 0  # rows of which some part was truncated

    @property
    def kept(self) -> int:
        return self.read - self.num_dropped

    @property
    def num_dropped(self) -> int:
        return sum(rows.count for rows in self.dropped.values())

    @property
    def equal_pairs(self) -> int:
        return sum(self.dropped[reason].count for reason in _EQUAL if reason in self.dropped)

    def arithmetic(self) -> str:
        """ "0 of 1 200 rows usable: 1 150 too long, 50 equal pair"."""
        reasons = ", ".join(f"{number(r.count)} {reason}" for reason, r in largest(self.dropped))
        return f"{number(self.kept)} of {number(self.read)} rows usable" + (f": {reasons}" if reasons else "")

    def findings(self) -> Iterator[str]:
        """What a user should know of a dataset that no row is dropped for, a sentence each."""
        yield from self.sides.findings()
        if self.labels:
            yield from label_findings(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: read = kept + dropped + merged."""
        return {
            "origin": self.origin,
            "available": self.available,
            "read": self.read,
            "kept": self.kept,
            "merged": 0,  # no format makes one example of several rows
            "dropped": {reason: rows.to_dict() for reason, rows in sorted(self.dropped.items())},
            "truncated": {part: rows.to_dict() for part, rows in sorted(self.truncated.items())},
            "truncated_rows": self.cut,
            "equal_pairs": self.equal_pairs,
            "duplicates": self.duplicates.to_dict(),
            "repeated_ids": self.repeated_ids.to_dict(),
            "reversed_pairs": self.reversed_pairs.to_dict(),
            "train_eval_overlap": self.overlap.to_dict(),
            "labels": dict(sorted(self.labels.items())),
            "tokens": {part: statistics(counts) for part, counts in self.lengths.items()},
            "histogram": self._histogram(),
            "sides": self.sides.to_dict() if self.sides.pairs else None,
            "findings": list(self.findings()),
        }

    def _histogram(self) -> dict[str, Any] | None:
        """Rows by tokens, in bins of one width for all parts."""
        if not self.lengths:
            return None
        drawn = Histogram.of(list(self.lengths.values()))
        rows = {part: counts.tolist() for part, counts in zip(self.lengths, drawn.counts, strict=True)}
        return {"width": drawn.width, "last_is_open": drawn.has_longer, "rows": rows}

    def state(self) -> dict[str, Any]:
        """Every field, for `restored`."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**kept, "lengths": {part: sorted(counts.items()) for part, counts in self.lengths.items()}}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DatasetReport:
        """The one whose `state` this was, read from JSON."""
        made: dict[str, Any] = {**state, "labels": Counter(state["labels"]), "sides": Sides(**state["sides"])}
        for name in ("duplicates", "repeated_ids", "reversed_pairs", "overlap"):
            made[name] = Rows(**state[name])
        for name in ("dropped", "truncated"):
            made[name] = {reason: Rows(**rows) for reason, rows in state[name].items()}
        made["lengths"] = {part: Counter(dict(counts)) for part, counts in state["lengths"].items()}
        return cls(**made)


def _fields(part: Any) -> dict[str, Any]:
    """One level of a part, for JSON."""
    return part.state() if isinstance(part, DatasetReport) else {f.name: getattr(part, f.name) for f in fields(part)}


class DataReport:
    """Collects what reading and encoding find out; nothing in here decides anything.

    Attributes:
        splits: how many examples each of "train", "eval", … holds after mixing.
        cutoff_len: the most tokens of an example; None if nothing was tokenised.
        epoch_tokens: what an epoch's batches take in each layout ("padded", "separate", "shared"), where that is known.
    """

    def __init__(self) -> None:
        self.datasets: dict[str, DatasetReport] = {}
        self.splits: dict[str, int] = {}
        self.cutoff_len: int | None = None
        self.epoch_tokens: dict[str, int] = {}
        self.notes: list[str] = []
        self._said: set[str] = set()
        self._dropped: set[str] = set()
        self._truncated: set[tuple[str, str]] = set()
        self._measured: set[str] = set()
        self._cut: set[str] = set()

    @property
    def duplicates(self) -> Rows:
        return self._together("duplicates")

    @property
    def repeated_ids(self) -> Rows:
        return self._together("repeated_ids")

    @property
    def reversed_pairs(self) -> Rows:
        return self._together("reversed_pairs")

    @property
    def overlap(self) -> Rows:
        return self._together("overlap")

    def _together(self, what: str) -> Rows:
        total = Rows()
        for d in self.datasets.values():
            total.include(getattr(d, what))
        return total

    # ---- keeping ----

    def state(self) -> dict[str, Any]:
        """What reading found out, as JSON for `restored`; encoding's part is in its tallies."""
        found = {name: getattr(self, name) for name in ("splits", "cutoff_len", "epoch_tokens", "notes")}
        found |= {"dropped_rows": sorted(self._dropped), "datasets": list(self.datasets.values())}
        return json.loads(json.dumps(found, default=_fields))

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DataReport:
        """The report whose `state` this was."""
        report = cls()
        report.splits, report.notes = dict(state["splits"]), list(state["notes"])
        report.cutoff_len, report.epoch_tokens = state["cutoff_len"], dict(state["epoch_tokens"])
        report._dropped = set(state["dropped_rows"])
        report.datasets = {entry["name"]: DatasetReport.restored(entry) for entry in state["datasets"]}
        return report

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Be as when `state` was taken, but for what has been said to the user."""
        vars(self).update({**vars(DataReport.restored(state)), "_said": self._said})

    # ---- recording ----

    def dataset(self, name: str) -> DatasetReport:
        """The report of one dataset, begun if need be."""
        return self.datasets.setdefault(name, DatasetReport(name))

    def of_row(self, row: str) -> DatasetReport:
        """The dataset report that a row id belongs to."""
        return self.dataset(row.rpartition(":")[0])

    def dropped(self, row: str, reason: str, excerpt: str = "") -> bool:
        """A row will not be learnt from. Said twice of one row, the first reason stands; True if it is news."""
        if row in self._dropped:
            return False
        self._dropped.add(row)
        self.of_row(row).dropped.setdefault(reason, Rows()).add(row, excerpt)
        return True

    def truncated(self, row: str, part: str, excerpt: str = "") -> None:
        """A part of a row ("prompt", "answer", "chosen", "rejected", "text") was cut to the length
        limit.
        """
        if (row, part) not in self._truncated:
            self._truncated.add((row, part))
            self.of_row(row).truncated.setdefault(part, Rows()).add(row, excerpt)
            self.of_row(row).cut += row not in self._cut
            self._cut.add(row)

    def lengths(self, row: str, **tokens: int) -> None:
        """Token counts of a row's parts, e.g. `lengths(row, prompt=12, chosen=40, rejected=33,
        total=85)`.
        """
        if row not in self._measured:
            self._measured.add(row)
            entry = self.of_row(row)
            for part, count in tokens.items():
                entry.lengths.setdefault(part, Counter())[count] += 1
            for better, worse in _BETTER_AND_WORSE:
                if better in tokens:
                    entry.sides.add(tokens[better], tokens[worse])

    def take_lengths(self, other: DataReport) -> None:
        """The lengths that were counted in an earlier start, of the same rows."""
        for name, earlier in other.datasets.items():
            entry = self.dataset(name)
            entry.lengths, entry.sides = earlier.lengths, earlier.sides

    def told_before(self, rows: Iterable[str]) -> None:
        """Of these rows nothing more is counted as left out."""
        self._dropped.update(rows)

    def forget_rows(self) -> None:
        """Keep the counts, not which rows they count: none of the rows told of so far will be told of again."""
        for rows in (self._dropped, self._truncated, self._measured, self._cut):
            rows.clear()

    def note(self, text: str) -> None:
        """Something a reader of the report should know, once."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Something that a user should hear even if nobody looks at the report."""
        self.note(text)
        self.heard([text])
        log.warning(text)

    def heard(self, texts: Iterable[str]) -> None:
        """These sentences have been logged: where notices and report are read together, the report leaves them out."""
        self._said.update(texts)

    def was_heard(self, text: str) -> bool:
        """Whether it was logged, and is not to be said again."""
        return text in self._said and _one_stream()

    def include(self, other: DataReport) -> None:
        """Take over what is known of other datasets."""
        self.datasets |= other.datasets
        self.splits |= {name: self.splits.get(name, 0) + count for name, count in other.splits.items()}
        self.cutoff_len = self.cutoff_len or other.cutoff_len
        for layout, tokens in other.epoch_tokens.items():
            self.epoch_tokens[layout] = self.epoch_tokens.get(layout, 0) + tokens
        for note in other.notes:
            self.note(note)
        self._said |= other._said
        self._dropped |= other._dropped
        self._truncated |= other._truncated
        self._measured |= other._measured
        self._cut |= other._cut

    def compare_rows(self, examples: Iterable[Example]) -> None:
        """Count duplicates and reversed pairs among distinct rows (D9, D10)."""
        seen: dict[bytes, str] = {}
        pairs: dict[bytes, str] = {}
        for example in examples:
            key = fingerprint(example)
            first = seen.setdefault(key, example.row)
            if first != example.row:
                self.of_row(example.row).duplicates.add(example.row, f"same as {first}")
            if isinstance(example, Feedback):
                label = "desirable" if example.desirable else "undesirable"
                self.of_row(example.row).labels[label] += 1
            if sides := _two_sides(example):
                better, worse = sides
                mirror = pairs.get(_digest(example.prompt, worse, better))
                if mirror:
                    self.of_row(example.row).reversed_pairs.add(example.row, f"the reverse of {mirror}")
                pairs.setdefault(_digest(example.prompt, better, worse), example.row)

    def compare_ids(self, ids: Iterable[tuple[str, Any]]) -> None:
        """Count rows that have the id of an earlier one (D10): of (row, its id), None for a row without one."""
        seen: dict[Any, str] = {}
        for row, own in ids:
            if own is None or not isinstance(own, (str, int)):
                continue
            first = seen.setdefault(own, row)
            if first != row:
                self.of_row(row).repeated_ids.add(row, f"{own}, as {first}")

    def compare_splits(self, train: Iterable[Example], evaluation: Iterable[Example]) -> None:
        """Count evaluation rows whose prompt (or, without prompts, text) is trained on as well
        (D11).
        """
        trained = {prompt_fingerprint(example): example.row for example in train}
        for example in evaluation:
            twin = trained.get(prompt_fingerprint(example))
            if twin:
                self.of_row(example.row).overlap.add(example.row, f"same prompt as {twin}")

    # ---- refusing ----

    def require_usable(self) -> None:
        """Raise DataError if a dataset has no usable row (D18), with the arithmetic."""
        problems = []
        for d in self.datasets.values():
            if d.kept > 0:
                continue
            first = largest(d.dropped)[0][1] if d.dropped else None
            fix = f"the first such row is {first.ids[0]}: {first.excerpt}" if first else None
            problems.append(Problem(f"dataset {d.name!r}: {d.arithmetic()}", d.origin, fix=fix))
        if problems:
            raise DataError(problems)

    def refuse_bad_rows(self) -> None:
        """Raise DataError if any row was dropped: what `on_bad_rows: error` asks for."""
        problems = [
            Problem(
                f"dataset {d.name!r}: {reason} in {number(rows.count)} of {number(d.read)} rows: {some_ids(rows)}",
                d.origin,
                fix="mend or remove these rows, or set `on_bad_rows: skip` to leave them out",
            )
            for d in self.datasets.values()
            for reason, rows in largest(d.dropped)
        ]
        if problems:
            raise DataError(problems)

    # ---- showing ----

    def lengths_together(self) -> dict[str, Counter[int]]:
        """part → how many rows of all datasets have so many tokens; empty before encoding."""
        together: dict[str, Counter[int]] = defaultdict(Counter)
        for d in self.datasets.values():
            for part, counts in d.lengths.items():
                together[part].update(counts)
        return dict(together)

    def statistics(self) -> dict[str, dict[str, float]]:
        """part → p50, p95, max, mean of its token counts; empty before encoding."""
        return {part: statistics(counts) for part, counts in self.lengths_together().items()}

    def warnings(self) -> Iterator[str]:
        """What a user should hear even if nobody looks at the report, a sentence each."""
        for d in self.datasets.values():
            if d.num_dropped:
                reasons = ", ".join(f"{number(r.count)} {why}" for why, r in largest(d.dropped))
                yield (
                    f"dataset {d.name}: {number(d.num_dropped)} of {counted(d.read, 'row', 'rows')} "
                    f"{'is' if d.num_dropped == 1 else 'are'} left "
                    f"out ({reasons}); `on_bad_rows: error` refuses them instead"
                )
        yield from self.repetitions()

    def repetitions(self) -> Iterator[str]:
        """What rows say that others say too, a sentence each."""
        for rows, one, many, what in (
            (self.duplicates, "row is an exact duplicate", "rows are exact duplicates", "of earlier rows"),
            (self.repeated_ids, "row has", "rows have", "the id of an earlier row"),
            (self.reversed_pairs, "pair contradicts", "pairs contradict", "another row (chosen and rejected swapped)"),
            (self.overlap, "evaluation row has", "evaluation rows have", "a prompt that is also trained on"),
        ):
            if rows.count:
                yield f"{counted(rows.count, one, many)} {what}: {some_ids(rows)} ({rows.excerpt})"

    def tell(self) -> None:
        """Log every warning that has not been logged as it now stands."""
        for warning in self.warnings():
            if warning not in self._said:
                self._said.add(warning)
                log.warning(warning)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as stable JSON."""
        return {
            "version": 1,
            "splits": self.splits,
            "cutoff_len": self.cutoff_len,
            "datasets": {name: d.to_dict() for name, d in self.datasets.items()},
            "duplicates": self.duplicates.to_dict(),
            "repeated_ids": self.repeated_ids.to_dict(),
            "reversed_pairs": self.reversed_pairs.to_dict(),
            "train_eval_overlap": self.overlap.to_dict(),
            "tokens": self.statistics(),
            "epoch_tokens": self.epoch_tokens or None,
            "notes": self.notes,
        }

    def render(self, width: int = _WIDTH, color: bool = False) -> str:
        """The report as text for a terminal of `width` columns."""
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"

    def page(self) -> str:
        """The report as a self-contained HTML page, with histograms of the lengths."""
        return report_page(self.to_dict(), {name: d.lengths for name, d in self.datasets.items()})

    def __rich__(self) -> RenderableType:
        return report_text(self)


def _one_stream() -> bool:
    """Whether notices (stderr) and results (stdout) go to the same place."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # a stream that is no file
        return False


# ---- fingerprints --------------------------------------------------------------------------------


def fingerprint(example: Example) -> bytes:
    """16 bytes that two examples share only if they say the same, white space at the ends aside."""
    match example:
        case Text(text):
            return _digest(text)
        case Chat(messages) | Prompt(messages):
            return _digest(messages)
        case Pair(prompt, chosen, rejected):
            return _digest(prompt, chosen, rejected)
        case Ranking(prompt, answers):
            return _digest(prompt, *answers)
        case Feedback(prompt, answer, desirable):
            return _digest(prompt, answer, str(desirable))


def _two_sides(example: Example) -> tuple[Messages, Messages] | None:
    """The better and the worse answer of a pair, also where it is a ranking of two."""
    match example:
        case Pair():
            return example.chosen, example.rejected
        case Ranking(_, (better, worse)):
            return better, worse
    return None


def prompt_fingerprint(example: Example) -> bytes:
    """16 bytes of what is asked; of the whole where nothing marks the question."""
    match example:
        case Chat(messages):
            return _digest(messages[:-1])
        case Pair(prompt) | Ranking(prompt) | Feedback(prompt) if prompt:
            return _digest(prompt)
    return fingerprint(example)


def _digest(*parts: Messages | str) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        for text in (part,) if isinstance(part, str) else _texts(part):
            digest.update(text.strip().encode("utf-8"))
            digest.update(b"\x1f")
        digest.update(b"\x1e")
    return digest.digest()


def _texts(messages: Messages) -> Iterator[str]:
    for message in messages:
        yield message.role
        yield message.content
        if message.tool_calls:
            yield repr(message.tool_calls)
