"""The data report: what became of every row, on a terminal and as data_report.json.

For every dataset and at any time: read = kept + the sum of all dropped. Rows are known by their id
("dataset:17"), and a row that is used twice (a dataset listed twice, or for training and
evaluation) is still one row: saying the same thing about it again changes nothing.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text as RichText

from trueup.data.examples import Chat, Example, Feedback, Messages, Pair, Prompt, Ranking, Text
from trueup.data.report_page import report_page
from trueup.errors import DataError, Problem

log = logging.getLogger("trueup")

_KEPT_IDS = 20  # row ids kept per reason; the count is exact
_SHOWN_IDS = 4
_EXCERPT = 60
_WIDTH = 80


@dataclass(slots=True)
class Rows:
    """A count of rows, the first of their ids, and an excerpt of the first."""

    count: int = 0
    ids: list[str] = field(default_factory=list)
    excerpt: str = ""

    def add(self, row: str, excerpt: str = "") -> None:
        self.count += 1
        if len(self.ids) < _KEPT_IDS:
            self.ids.append(row)
        self.excerpt = self.excerpt or shorten(excerpt)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rows": self.ids, "excerpt": self.excerpt}


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
    truncated: dict[str, Rows] = field(default_factory=dict)  # by part: prompt, answer, chosen …
    labels: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # rows of which some part was truncated

    @property
    def kept(self) -> int:
        return self.read - self.num_dropped

    @property
    def num_dropped(self) -> int:
        return sum(rows.count for rows in self.dropped.values())

    def arithmetic(self) -> str:
        """ "0 of 1 200 rows usable: 1 150 too long, 50 equal pair"."""
        reasons = ", ".join(f"{number(r.count)} {reason}" for reason, r in _largest(self.dropped))
        return f"{number(self.kept)} of {number(self.read)} rows usable" + (f": {reasons}" if reasons else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "available": self.available,
            "read": self.read,
            "kept": self.kept,
            "dropped": {reason: rows.to_dict() for reason, rows in sorted(self.dropped.items())},
            "truncated": {part: rows.to_dict() for part, rows in sorted(self.truncated.items())},
            "labels": dict(sorted(self.labels.items())),
        }


def _fields(part: Rows | DatasetReport) -> dict[str, Any]:
    """One level of a part; `asdict` would count the items of a Counter (before Python 3.12)."""
    return {field.name: getattr(part, field.name) for field in fields(part)}


class DataReport:
    """Collects what reading and encoding find out; nothing in here decides anything.

    `splits` tells how many examples each of "train", "eval", … holds after mixing.
    """

    def __init__(self) -> None:
        self.datasets: dict[str, DatasetReport] = {}
        self.splits: dict[str, int] = {}
        self.duplicates = Rows()
        self.reversed_pairs = Rows()
        self.overlap = Rows()  # evaluation rows whose prompt is trained on as well
        self.notes: list[str] = []
        self._said: set[str] = set()
        self._dropped: set[str] = set()
        self._truncated: set[tuple[str, str]] = set()
        self._measured: set[str] = set()
        self._cut: set[str] = set()
        self._lengths: dict[str, Counter[int]] = defaultdict(Counter)  # part → how many rows have so many tokens

    # ---- keeping ----

    def state(self) -> dict[str, Any]:
        """What reading found out, as JSON for `restored`; encoding's part is in its tallies."""
        kept = ("splits", "duplicates", "reversed_pairs", "overlap", "notes")
        found = {name: getattr(self, name) for name in kept}
        found["lengths"] = {part: sorted(counts.items()) for part, counts in self._lengths.items()}
        found |= {"dropped_rows": sorted(self._dropped), "datasets": list(self.datasets.values())}
        return json.loads(json.dumps(found, default=_fields))

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DataReport:
        """The report whose `state` this was."""
        report = cls()
        report.splits, report.notes = dict(state["splits"]), list(state["notes"])
        for name in ("duplicates", "reversed_pairs", "overlap"):
            setattr(report, name, Rows(**state[name]))
        report._dropped = set(state["dropped_rows"])
        for part, counts in state.get("lengths", {}).items():
            report._lengths[part] = Counter(dict(counts))
        for entry in state["datasets"]:
            losses = {
                part: {reason: Rows(**rows) for reason, rows in entry[part].items()}
                for part in ("dropped", "truncated")
            }
            report.datasets[entry["name"]] = DatasetReport(**{**entry, **losses, "labels": Counter(entry["labels"])})
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
            for part, count in tokens.items():
                self._lengths[part][count] += 1

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

    def include(self, other: DataReport) -> None:
        """Take over what is known of other datasets."""
        self.datasets |= other.datasets
        self.splits |= {name: self.splits.get(name, 0) + count for name, count in other.splits.items()}
        for mine, theirs in (
            (self.duplicates, other.duplicates),
            (self.reversed_pairs, other.reversed_pairs),
            (self.overlap, other.overlap),
        ):
            mine.count, mine.ids = mine.count + theirs.count, [*mine.ids, *theirs.ids][:_KEPT_IDS]
            mine.excerpt = mine.excerpt or theirs.excerpt
        for note in other.notes:
            self.note(note)
        self._dropped |= other._dropped
        self._truncated |= other._truncated
        self._measured |= other._measured
        self._cut |= other._cut
        for part, lengths in other._lengths.items():
            self._lengths[part].update(lengths)

    def compare_rows(self, examples: Iterable[Example]) -> None:
        """Count duplicates and reversed pairs among distinct rows (D9, D10)."""
        seen: dict[bytes, str] = {}
        pairs: dict[bytes, str] = {}
        for example in examples:
            key = fingerprint(example)
            first = seen.setdefault(key, example.row)
            if first != example.row:
                self.duplicates.add(example.row, f"same as {first}")
            if isinstance(example, Feedback):
                label = "desirable" if example.desirable else "undesirable"
                self.of_row(example.row).labels[label] += 1
            if sides := _two_sides(example):
                better, worse = sides
                mirror = pairs.get(_digest(example.prompt, worse, better))
                if mirror:
                    self.reversed_pairs.add(example.row, f"the reverse of {mirror}")
                pairs.setdefault(_digest(example.prompt, better, worse), example.row)

    def compare_splits(self, train: Iterable[Example], evaluation: Iterable[Example]) -> None:
        """Count evaluation rows whose prompt (or, without prompts, text) is trained on as well
        (D11).
        """
        trained = {prompt_fingerprint(example): example.row for example in train}
        for example in evaluation:
            twin = trained.get(prompt_fingerprint(example))
            if twin:
                self.overlap.add(example.row, f"same prompt as {twin}")

    # ---- refusing ----

    def require_usable(self) -> None:
        """Raise DataError if a dataset has no usable row (D18), with the arithmetic."""
        problems = []
        for d in self.datasets.values():
            if d.kept > 0:
                continue
            first = _largest(d.dropped)[0][1] if d.dropped else None
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
            for reason, rows in _largest(d.dropped)
        ]
        if problems:
            raise DataError(problems)

    # ---- showing ----

    def statistics(self) -> dict[str, dict[str, float]]:
        """part → p50, p95, max, mean of its token counts; empty before encoding."""
        return {
            part: {
                "p50": percentile(counts, 0.5),
                "p95": percentile(counts, 0.95),
                "max": max(counts),
                "mean": sum(value * count for value, count in counts.items()) / counts.total(),
            }
            for part, counts in self._lengths.items()
        }

    def warnings(self) -> Iterator[str]:
        """What a user should hear even if nobody looks at the report, a sentence each."""
        for d in self.datasets.values():
            if d.num_dropped:
                reasons = ", ".join(f"{number(r.count)} {why}" for why, r in _largest(d.dropped))
                yield (
                    f"dataset {d.name}: {number(d.num_dropped)} of {number(d.read)} rows are left "
                    f"out ({reasons}); `on_bad_rows: error` refuses them instead"
                )
        for rows, what in (
            (self.duplicates, "rows are exact duplicates of earlier ones"),
            (self.reversed_pairs, "pairs contradict another row (chosen and rejected swapped)"),
            (self.overlap, "evaluation rows have a prompt that is also trained on"),
        ):
            if rows.count:
                yield f"{number(rows.count)} {what}: {some_ids(rows)} ({rows.excerpt})"

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
            "datasets": {name: d.to_dict() for name, d in self.datasets.items()},
            "duplicates": self.duplicates.to_dict(),
            "reversed_pairs": self.reversed_pairs.to_dict(),
            "train_eval_overlap": self.overlap.to_dict(),
            "tokens": self.statistics(),
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
        return report_page(self.to_dict(), self._lengths)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._table_of_datasets()]
        if any(d.dropped for d in self.datasets.values()):
            parts.append(self._table_of_losses("dropped", "dropped"))
        if any(d.truncated for d in self.datasets.values()):
            parts.append(self._table_of_losses("truncated", "cut"))
        if self._lengths:
            parts.append(self._table_of_lengths())
        remarks = [RichText(f"• {line}", style="yellow") for line in self._remarks()]
        remarks += [RichText(f"• {note}", style="dim") for note in self.notes]
        if remarks:
            parts.append(Group(*remarks))
        return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))

    def _table_of_datasets(self) -> Table:
        table = _table("dataset", *(">" + h for h in ("rows", "read", "kept", "dropped", "cut")))
        for d in self.datasets.values():
            table.add_row(
                RichText(d.name),
                *(number(n) for n in (d.available, d.read, d.kept)),
                _flag(d.num_dropped),
                _flag(d.cut),
            )
        if self.splits:
            table.caption = "  ".join(f"{name} {number(n)}" for name, n in self.splits.items())
            table.caption_justify = "left"
        return table

    def _table_of_losses(self, attribute: str, title: str) -> Table:
        table = _table(title, ">rows", "which", "first")
        for d in self.datasets.values():
            losses: dict[str, Rows] = d.dropped if attribute == "dropped" else d.truncated
            for reason, rows in _largest(losses):
                name = reason if len(self.datasets) == 1 else f"{d.name}: {reason}"
                # As Text, because what data say is never markup.
                table.add_row(*map(RichText, (name, number(rows.count), _short_ids(rows), rows.excerpt)))
        which, first = table.columns[2:]
        which.no_wrap = first.no_wrap = True
        first.overflow, first.ratio, table.expand = "ellipsis", 1, True
        return table

    def _table_of_lengths(self) -> Table:
        table = _table("tokens", ">p50", ">p95", ">max", ">mean")
        for part, stats in self.statistics().items():
            table.add_row(part, *(number(round(stats[key])) for key in ("p50", "p95", "max", "mean")))
        return table

    def _remarks(self) -> Iterator[str]:
        for d in self.datasets.values():
            if d.labels:
                balance = ", ".join(f"{number(n)} {label}" for label, n in d.labels.most_common())
                yield f"{d.name}: {balance}"
        for rows, what in (
            (self.duplicates, "duplicate rows"),
            (self.reversed_pairs, "reversed pairs"),
            (self.overlap, "evaluation rows whose prompt is trained on"),
        ):
            if rows.count:
                yield f"{number(rows.count)} {what}: {some_ids(rows)}"


def percentile(counts: Mapping[int, int], share: float) -> float:
    """Of numbers given by how often each occurs; between two of them as numpy does it."""
    values = np.array(sorted(counts), dtype=np.float64)
    ends = np.cumsum([counts[value] for value in sorted(counts)])
    place = share * (int(ends[-1]) - 1)
    below, above = (values[np.searchsorted(ends, rank, side="right")] for rank in (int(place), int(np.ceil(place))))
    return float(below + (above - below) * (place - int(place)))


def number(value: float) -> str:
    """1 234 567: grouped by a narrow space that every terminal has."""
    return f"{value:,}".replace(",", " ")


def shorten(text: str, limit: int = _EXCERPT) -> str:
    """A text on one line, at most `limit` characters, safe to print."""
    line = " ".join(text[: 4 * limit].split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def some_ids(rows: Rows, limit: int = _SHOWN_IDS) -> str:
    """The first ids, and how many more there are."""
    more = f" … and {number(rows.count - limit)} more" if rows.count > limit else ""
    return ", ".join(rows.ids[:limit]) + more


def _short_ids(rows: Rows) -> str:
    ids = ", ".join(row.rpartition(":")[2] for row in rows.ids[:_SHOWN_IDS])
    return ids + (" …" if rows.count > _SHOWN_IDS else "")


def _largest(losses: dict[str, Rows]) -> list[tuple[str, Rows]]:
    return sorted(losses.items(), key=lambda item: (-item[1].count, item[0]))


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _flag(count: int) -> RichText:
    return RichText(number(count), style="yellow" if count else "dim")


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
