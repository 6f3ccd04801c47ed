"""`trueup data convert` and `unpair`: the rows of a dataset in another format, and as another kind.

Every row that was written is read back and compared with the example it came from; one that would
say something else is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from trueup.data.examples import Chat, Example, Feedback, Kind, Messages, Pair, Prompt, Ranking, Text
from trueup.data.express import Format, Row, entry_for, express
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import NOUNS, USUAL_NAMES, choose_layout
from trueup.data.registry import DatasetSpec, spec_of
from trueup.data.report import number, shorten
from trueup.data.rowset import Outcome, RowSet, dropped_rows, read_set
from trueup.data.write import write_rows
from trueup.errors import DataError

#: What `--to` may say → the format, and the kind of row it makes of others.
TARGETS: dict[str, tuple[Format, Kind | None]] = {
    "alpaca": ("alpaca", None),
    "sharegpt": ("sharegpt", None),
    "openai": ("openai", None),
    "trl": ("trl", None),
    "pairs": ("trl", "pair"),
    "ranking": ("trl", "ranking"),
    "kto": ("trl", "feedback"),
}
#: Columns that would be taken for another role of the row when it is read again.
_RESERVED = {name for names in USUAL_NAMES.values() for name in names} - {"margin", "score"}
_ASKING = ("prompt", "query", "history", "messages", "system", "tools")
#: Roles whose columns become part of a row of each kind; other columns go along as they are.
_ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": (*_ASKING, "response"),
    "pair": (*_ASKING, "chosen", "rejected"),
    "ranking": (*_ASKING, "answers", "response", "scores", "ranks", "chosen", "rejected", "margin"),
    "feedback": (*_ASKING, "response", "kto_tag"),
    "prompt": _ASKING,
}


@dataclass(frozen=True, slots=True)
class _Written:
    index: int
    example: Example
    row: Row


def convert(name: str, to: str, output: Path, dataset_dir: str | Path = "data", hub: str = "huggingface") -> Outcome:
    """Write the rows of `name` to `output` in the format `to`.

    Raises:
        DataError: nothing of it can be said so. ConfigError, DataError, ModelError: from reading it.
    """
    form, kind = TARGETS[to]
    source = _read(name, to, kind, dataset_dir, hub)
    dropped = dropped_rows(source)
    written: list[_Written] = []
    for index, example in source.examples.items():
        try:
            parts = list(_as_kind(example, kind))
            written += [_Written(index, part, express(part, form)) for part in parts]
        except RowProblem as problem:
            dropped.append((source.row_id(index), problem.reason, shorten(problem.detail)))
    if not written:
        raise _nothing(source, to, dropped)
    carried, left_out = _other_columns(source, written)
    entry = _entry(written, form)
    good, changed = _read_back(written, entry, output)
    bad = {item.index: detail for item, detail in changed}
    dropped += [(source.row_id(index), f"{to} would change it", detail) for index, detail in bad.items()]
    rows = [item.row | _pick(source.rows[item.index], carried) for item in good if item.index not in bad]
    if not rows:
        raise _nothing(source, to, dropped)
    write_rows(output, rows)
    kept = {item.index for item in good} - bad.keys()
    notes = list(_notes(source, kind, good, carried, left_out))
    return Outcome(
        "convert", len(source.rows), len(kept), dropped, {str(output): len(rows)}, notes, {str(output): entry}
    )


#: kind wanted → kinds it can be made of.
_MADE_OF: dict[Kind, tuple[Kind, ...]] = {
    "pair": ("pair", "ranking"),
    "ranking": ("ranking", "pair"),
    "feedback": ("feedback", "pair", "ranking"),
}


def _read(name: str, to: str, kind: Kind | None, dataset_dir: str | Path, hub: str) -> RowSet:
    source = read_set(name, dataset_dir, hub)
    if kind is None or kind == source.kind:
        return source
    if source.kind not in _MADE_OF[kind]:
        raise DataError(
            f"dataset {source.spec.name!r} holds {NOUNS[source.kind]}, of which no {to} can be made",
            where=source.spec.origin,
            expected=" or ".join(NOUNS[other] for other in _MADE_OF[kind]),
        )
    want: Kind = "ranking" if kind == "ranking" else "pair"
    return source if source.kind == want else read_set(name, dataset_dir, hub, want)


def _as_kind(example: Example, kind: Kind | None) -> Iterator[Example]:
    """A pair as two labelled answers, where those are wanted; reading has done the rest."""
    if kind == "feedback" and isinstance(example, Pair):
        if example.plain and not example.prompt:
            raise RowProblem("no prompt", "chosen and rejected are whole texts")
        for answer, desirable in ((example.chosen, True), (example.rejected, False)):
            yield Feedback(example.prompt, answer, desirable, example.row, example.tools, example.plain)
    else:
        yield example


def _entry(written: Sequence[_Written], form: Format) -> Row:
    columns = list(dict.fromkeys(name for item in written for name in item.row))
    example = written[0].example
    plain = not isinstance(example, Text) and example.plain
    return entry_for(_kind(example), form, columns, plain)


def _kind(example: Example) -> Kind:
    names = {Text: "text", Chat: "chat", Pair: "pair", Ranking: "ranking", Feedback: "feedback", Prompt: "prompt"}
    return cast(Kind, names[type(example)])


def _read_back(written: list[_Written], entry: Row, output: Path) -> tuple[list[_Written], list[tuple[_Written, str]]]:
    """Those that read as they were meant, and those that do not, with what is different."""
    spec: DatasetSpec = spec_of(output.stem, {"file_name": output.name, **entry}, str(output))
    layout = choose_layout(spec, [item.row for item in written], _kind(written[0].example))
    good, changed = [], []
    for item in written:
        try:
            again = parse_with(layout, item.example.row, item.row)
            same = again == _without_call_ids(item.example) or again == item.example
            detail = "" if same else "it reads back as something else"
        except (RowProblem, ShapeProblem) as problem:
            detail = str(problem)
        if detail:
            changed.append((item, shorten(detail)))
        else:
            good.append(item)
    return good, changed


def _without_call_ids(example: Example) -> Example:
    """The example as formats without ids of tool calls have it."""

    def bare(messages: Messages) -> Messages:
        return tuple(
            replace(m, tool_calls=tuple({k: v for k, v in call.items() if k != "id"} for call in m.tool_calls))
            if m.tool_calls
            else m
            for m in messages
        )

    match example:
        case Chat() | Prompt():
            return replace(example, messages=bare(example.messages))
        case Pair():
            return replace(
                example, prompt=bare(example.prompt), chosen=bare(example.chosen), rejected=bare(example.rejected)
            )
        case Ranking():
            return replace(example, prompt=bare(example.prompt), answers=tuple(map(bare, example.answers)))
        case Feedback():
            return replace(example, prompt=bare(example.prompt), answer=bare(example.answer))
    return example


def _has_call_ids(example: Example) -> bool:
    return _without_call_ids(example) != example


def _other_columns(source: RowSet, written: Sequence[_Written]) -> tuple[list[str], list[str]]:
    """Columns without a role in the rows: those that go along, and those whose names would be misread."""
    roles = {*_ROLES[source.kind], *_ROLES[source.layout.gives]}
    used = {column for role, column in source.layout.columns.items() if role in roles}
    taken = {name for item in written for name in item.row}
    others = dict.fromkeys(name for row in source.rows for name in row if name not in used)
    carried = [name for name in others if name not in _RESERVED | taken]
    return carried, [name for name in others if name not in carried]


def _pick(row: Any, names: Sequence[str]) -> Row:
    return {name: row[name] for name in names if name in row}


def _notes(
    source: RowSet, kind: Kind | None, good: Sequence[_Written], carried: list[str], left_out: list[str]
) -> Iterator[str]:
    if carried:
        yield f"columns taken along: {', '.join(carried)}"
    if left_out:
        yield f"columns left out, whose names mean something else here: {', '.join(left_out)}"
    ids = sum(_has_call_ids(item.example) for item in good)
    if ids and "tool_calls" not in str(good[0].row):
        yield f"{number(ids)} rows lose the ids of their tool calls, which this format has not"
    if kind in ("feedback", "pair") and source.layout.gives == "ranking":
        yield "of each ranking, its best and its worst answer are taken"


def _nothing(source: RowSet, to: str, dropped: Sequence[tuple[str, str, str]]) -> DataError:
    reasons = ", ".join(dict.fromkeys(reason for _, reason, _ in dropped))
    what = f"0 of {number(len(source.rows))} rows of dataset {source.spec.name!r} can be written as {to}: {reasons}"
    return DataError(what, where=source.spec.origin)
