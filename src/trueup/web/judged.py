"""Labels and datasets: items from a dataset's pairs, and datasets of pairs or labelled answers from labels.

Torch-free.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from trueup.data.examples import Example, Feedback, Message, Messages, Pair, Ranking
from trueup.data.express import entry_for, express
from trueup.data.register import check_name, enter
from trueup.data.write import write_rows
from trueup.errors import ConfigError, DataError
from trueup.web.labels import SKIP, TIE, Item, Project, Turns
from trueup.web.rows import Table
from trueup.web.workspace import Workspace

Kind = Literal["pair", "feedback"]
_WINDOW = 500
_MOST_PAIRS = 6  # of one ranking's answers


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What labels amount to: `examples` of a dataset, and the reasons for which others are none.

    `votes`: by example's row, how many for, against and undecided; and by whom.
    """

    examples: list[Example] = field(default_factory=list)
    votes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


# ---- items ---------------------------------------------------------------------------------------


def items_of(table: Table, count: int, seed: int = 0) -> list[Item]:
    """At most `count` items of a dataset's pairs and rankings, drawn by chance from all of its rows.

    Which answer is the first of an item is by chance, too; the better one of the data is in its provenance.

    Raises:
        DataError: it has no pairs of turns.
    """
    draw, kept, seen, start = random.Random(seed), [], 0, 0
    more = True
    while more:
        window = table.window(start, _WINDOW)
        for item in (item for row in window.rows for item in _of_example(row.example)):
            seen += 1
            place = len(kept) if len(kept) < count else draw.randrange(seen)
            if place < count:
                kept[place : place + 1] = [item]
        start, more = start + _WINDOW, window.more
    if not kept:
        raise DataError(
            f"{table.spec.name} has no two answers to choose from", fix="use a dataset of pairs or rankings"
        )
    return kept


def _of_example(example: Example | None) -> Iterator[Item]:
    if isinstance(example, Pair):
        answers = [example.chosen, example.rejected]
    elif isinstance(example, Ranking):
        answers = list(example.answers)
    else:
        return
    if example.plain or not example.prompt:
        return
    prompt = [message.to_dict() for message in example.prompt]
    for better, worse in list(combinations(answers, 2))[:_MOST_PAIRS]:
        sides = [[message.to_dict() for message in side] for side in (better, worse)]
        by_chance = sorted((0, 1), key=lambda side: Item.of(prompt, [sides[side], sides[side]]).id)
        yield Item.of(
            prompt, [sides[side] for side in by_chance], tools=example.tools,
            provenance={"row": example.row, "chosen": by_chance.index(0)},
        )  # fmt: skip


# ---- verdicts ------------------------------------------------------------------------------------


def verdicts(project: Project, kind: Kind) -> Verdicts:
    """Pairs, or single answers with a label, that most labels agree on."""
    found = Verdicts()
    sides: dict[Messages, dict[bool, str]] = defaultdict(dict)
    for number, (item, one, other, votes, people) in enumerate(_matches(project)):
        left, right, ties = votes[0], votes[1], votes[TIE]
        if max(left, right) <= ties or left == right:
            found.left_out["tie" if ties >= max(left, right) else "undecided"] += 1
            continue
        better, worse = (one, other) if left > right else (other, one)
        prompt, chosen, rejected = _messages(item.prompt), _messages(better), _messages(worse)
        said = {
            "votes": {"for": max(left, right), "against": min(left, right), "tie": ties},
            "annotators": sorted(people),
        }
        row = f"{project.name}:{number}"
        if kind == "pair":
            found.examples.append(Pair(prompt, chosen, rejected, row, item.tools))
            found.votes[row] = said
            continue
        for answer, wanted in ((chosen, True), (rejected, False)):
            known = sides[(*prompt, *answer)]
            if wanted not in known:
                known[wanted] = f"{row}.{int(wanted)}"
                found.examples.append(Feedback(prompt, answer, wanted, known[wanted], item.tools))
                found.votes[known[wanted]] = said
    if kind == "feedback":  # an answer that won here and lost there says nothing
        both = {row for known in sides.values() if len(known) == 2 for row in known.values()}
        found.examples[:] = [example for example in found.examples if example.row not in both]
        found.left_out["both"] += len(both) // 2
    found.left_out["skip"] = sum(label.choice == SKIP for label in project.labels.values())
    return found


def _matches(project: Project) -> Iterator[tuple[Item, Turns, Turns, Counter[Any], set[str]]]:
    """Every two answers to a question that somebody has set against each other, with the votes for each."""
    votes: dict[tuple[str, str, str], Counter[Any]] = defaultdict(Counter)
    items: dict[tuple[str, str, str], tuple[Item, Turns, Turns]] = {}
    people: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for label in project.labels.values():
        item = project.items[label.item]
        if label.choice == SKIP:
            continue
        for one, other in combinations(sorted(label.order), 2):  # those that were shown
            if label.choice != TIE and label.choice not in (one, other):
                continue
            texts = [repr(item.answers[number]) for number in (one, other)]
            if texts[0] == texts[1]:
                continue
            first, second = (one, other) if texts[0] < texts[1] else (other, one)
            key = (repr(item.prompt), min(texts), max(texts))
            items.setdefault(key, (item, item.answers[first], item.answers[second]))
            votes[key][TIE if label.choice == TIE else int(label.choice == second)] += 1
            people[key].add(label.annotator)
    for key, (item, one, other) in items.items():
        yield item, one, other, votes[key], people[key]


def _messages(turns: Turns) -> Messages:
    return tuple(
        Message(
            turn["role"], str(turn.get("content") or ""), tuple(turn["tool_calls"]) if turn.get("tool_calls") else None
        )
        for turn in turns
    )


# ---- datasets ------------------------------------------------------------------------------------


def rows_of(found: Verdicts) -> list[dict[str, Any]]:
    """Rows in TRL's columns, with the votes beside them."""
    return [express(example, "trl") | found.votes[example.row] for example in found.examples]


def write_dataset(place: Workspace, project: Project, kind: Kind, name: str) -> tuple[Path, int]:
    """Write what most labels agree on as `data/NAME.jsonl`, and register it; an earlier file goes to the trash.

    Returns:
        the file, and its rows.

    Raises:
        ConfigError: no such name, or other data have it. DataError: there is nothing to write.
    """
    if "/" in name or "." in name:
        raise ConfigError(f"{name!r} is no name for a dataset", expected="letters, digits, - and _")
    path, folder = place.data(f"{name}.jsonl"), place.root / "data"
    rows = rows_of(verdicts(project, kind))
    if not rows:
        raise DataError("nothing has been decided yet", fix="label some pairs first")
    folder.mkdir(exist_ok=True)
    check_name(name, path, folder, "name")
    if path.exists():
        place.trash(path)
    write_rows(path, rows)
    columns: Sequence[str] = list(rows[0])
    enter(name, path, entry_for(kind, "trl", columns), folder, "name")
    return path, len(rows)
