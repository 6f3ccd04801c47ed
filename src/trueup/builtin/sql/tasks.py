"""Tasks: a request in words and the right query in both spellings, from a seed or from a file.

A hash of the bare query decides on which side of the train / held-out split a task is, so no seed
crosses over, and a held-out query was never seen in any wording.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from trueup.builtin.sql.query import random_query
from trueup.builtin.sql.wording import ask, comment

Split = Literal["train", "heldout"]
_HELDOUT_SHARE = 10  # one query in ten


@dataclass(frozen=True)
class Task:
    """A request ("en" or "zh") and its query: on one bare line, and formatted and commented."""

    request: str
    language: str
    bare: str
    formatted: str

    def pair(self) -> dict[str, str]:
        """The task as a preference row: chosen is formatted and commented, rejected is bare."""
        return {
            "instruction": self.request,
            "chosen": self.formatted,
            "rejected": self.bare,
            "language": self.language,
        }


def split_of(bare: str) -> Split:
    """The side of the split that a query is on."""
    number = int.from_bytes(hashlib.sha256(bare.encode("utf-8")).digest()[:4], "big")
    return "heldout" if number % _HELDOUT_SHARE == 0 else "train"


def stream_tasks(seed: int, split: Split) -> Iterator[Task]:
    """Tasks of one split without end, English and Chinese in equal parts, no request twice."""
    rng = random.Random(f"{seed}:{split}")
    seen: set[str] = set()
    while True:
        language = rng.choice(("en", "zh"))
        query = random_query(rng, language)
        request = ask(rng, query, language)
        if split_of(query.bare()) == split and request not in seen:
            seen.add(request)
            yield Task(request, language, query.bare(), query.formatted(comment(query, language)))


def make_tasks(count: int, seed: int, split: Split = "train") -> list[Task]:
    """The first `count` tasks of the stream."""
    return list(islice(stream_tasks(seed, split), count))


def read_tasks(path: Path) -> list[Task]:
    """Tasks from a file of preference rows as `Task.pair` makes them, one JSON object a line."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Task(row["instruction"], row["language"], row["rejected"], row["chosen"]) for row in rows]


def write_pairs(tasks: list[Task], path: Path) -> None:
    """The tasks as preference rows, one JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for task in tasks:
            file.write(json.dumps(task.pair(), ensure_ascii=False) + "\n")
