"""`trueup data convert` and `unpair`: the rows of a dataset in another format, and as another kind.

Every row that was written is read back and compared with the example it came from; one that would
say something else is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from trueup.data.examples import Chat, Example, Feedback, Kind, Messages, Pair, Prompt, Ranking, Text
from trueup.data.express import Format, Row, entry_for, express
from trueup.data.formats import RowProblem, ShapeProblem, parse_with
from trueup.data.layout import NOUNS, USUAL_NAMES, Layout, choose_layout
from trueup.data.registry import DatasetSpec, spec_of
from trueup.data.report import number
from trueup.data.rowset import Outcome, Peek, RowSet, dropped_row, read_set
from trueup.data.write import new_rows
from trueup.errors import DataError
from trueup.waiting import waiting

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


def convert(name: str, to: str, output: Path, dataset_dir: str | Path = "data", hub: str = "huggingface") -> Outcome:
    """Write the rows of `name` to `output` in the format `to`.

    Raises:
        DataError: nothing of it can be said so. ConfigError, DataError, ModelError: from reading it.
    """
    form, kind = TARGETS[to]
    source = _read(name, to, kind, dataset_dir, hub)
    plan = _plan(source, to, form, kind, output)
    dropped: list[tuple[str, str, str]] = []
    kept = rows = losing_ids = 0
    with new_rows(output) as write, waiting(f"writing {output.name}", len(source), "rows") as tell:
        for index, row, example in source:
            tell(index + 1)
            try:
                parts = _written(example, form, kind)
                for part, said in parts:
                    _read_back(plan.layout, part, said, to)
            except RowProblem as problem:
                dropped.append(dropped_row(source.row_id(index), problem))
                continue
            for part, said in parts:
                write(said | {name: row[name] for name in plan.carried if name in row})
                losing_ids += plan.bare_calls and _has_call_ids(part)
            kept, rows = kept + 1, rows + len(parts)
        if not kept:
            raise _nothing(source, to, [reason for _, reason, _ in dropped])
    notes = list(_notes(source, kind, plan, losing_ids))
    return Outcome("convert", len(source), kept, dropped, {str(output): rows}, notes, {str(output): plan.entry})


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all rows of the new file have in common."""

    entry: Row
    layout: Layout  # how the new rows are read
    carried: list[str]  # columns without a role, that go along
    left_out: list[str]  # … whose names would be misread
    bare_calls: bool  # calls of tools lose their ids


def _plan(source: RowSet, to: str, form: Format, kind: Kind | None, output: Path) -> _Plan:
    """Found in a pass of its own: a column that only the last row has belongs to all. Raises DataError."""
    peek, first, reasons = Peek(), None, dict[str, None]()
    for _, _, example in source:
        try:
            for part, said in _written(example, form, kind):
                first = first or part
                peek.add(said)
        except RowProblem as problem:
            reasons[problem.reason] = None
    if first is None:
        raise _nothing(source, to, reasons)
    plain = not isinstance(first, Text) and first.plain
    entry = entry_for(_kind(first), form, list(peek.columns), plain)
    spec: DatasetSpec = spec_of(output.stem, {"file_name": output.name, **entry}, str(output))
    carried, left_out = _other_columns(source, peek.columns)
    bare = "tool_calls" not in str(peek.first[0])
    return _Plan(entry, choose_layout(spec, peek.rows(), _kind(first)), carried, left_out, bare)


def _written(example: Example | RowProblem, form: Format, kind: Kind | None) -> list[tuple[Example, Row]]:
    """What becomes of a row. Raises RowProblem."""
    if isinstance(example, RowProblem):
        raise example
    return [(part, express(part, form)) for part in _as_kind(example, kind)]


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


def _kind(example: Example) -> Kind:
    names = {Text: "text", Chat: "chat", Pair: "pair", Ranking: "ranking", Feedback: "feedback", Prompt: "prompt"}
    return cast(Kind, names[type(example)])


def _read_back(layout: Layout, example: Example, said: Row, to: str) -> None:
    """Raises RowProblem if the row does not read as it was meant."""
    try:
        again = parse_with(layout, example.row, said)
        if again == example or again == _without_call_ids(example):
            return
        detail = "it reads back as something else"
    except (RowProblem, ShapeProblem) as problem:
        detail = str(problem)
    raise RowProblem(f"{to} would change it", detail)


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


def _other_columns(source: RowSet, taken: Collection[str]) -> tuple[list[str], list[str]]:
    """Columns without a role in the rows: those that go along, and those whose names would be misread."""
    roles = {*_ROLES[source.kind], *_ROLES[source.layout.gives]}
    used = {column for role, column in source.layout.columns.items() if role in roles}
    others = [name for name in source.columns if name not in used]
    carried = [name for name in others if name not in _RESERVED and name not in taken]
    return carried, [name for name in others if name not in carried]


def _notes(source: RowSet, kind: Kind | None, plan: _Plan, losing_ids: int) -> Iterator[str]:
    if plan.carried:
        yield f"columns taken along: {', '.join(plan.carried)}"
    if plan.left_out:
        yield f"columns left out, whose names mean something else here: {', '.join(plan.left_out)}"
    if losing_ids:
        yield f"{number(losing_ids)} rows lose the ids of their tool calls, which this format has not"
    if kind in ("feedback", "pair") and source.layout.gives == "ranking":
        yield "of each ranking, its best and its worst answer are taken"


def _nothing(source: RowSet, to: str, reasons: Iterable[str]) -> DataError:
    why = ", ".join(dict.fromkeys(reasons))
    what = f"0 of {number(len(source))} rows of dataset {source.spec.name!r} can be written as {to}: {why}"
    return DataError(what, where=source.spec.origin)
