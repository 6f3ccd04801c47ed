"""A run's completions.jsonl, step by step: what an online method's model wrote. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trueup.web.follow import Followed, Shelf, row_of

FILE = "completions.jsonl"


class Answers(Followed):
    """Where the answers of each step stand in the file; the answers themselves stay there."""

    def forget(self) -> None:
        self._places: dict[int, list[tuple[int, int]]] = {}  # step → (first byte, length) of each line

    def take(self, lines: list[bytes]) -> None:
        start = self.offset
        for line in lines:
            step = row_of(line).get("step")
            if isinstance(step, int):
                self._places.setdefault(step, []).append((start, len(line)))
            start += len(line)

    @property
    def steps(self) -> list[int]:
        """Steps that have answers, in their order."""
        return sorted(self._places)

    def count(self, step: int) -> int:
        """How many answers a step has."""
        return len(self._places.get(step, []))

    def at(self, step: int, most: int) -> list[dict[str, Any]]:
        """The first answers of a step."""
        rows = []
        try:
            with open(self.path, "rb") as file:
                for start, size in self._places.get(step, [])[:most]:
                    file.seek(start)
                    rows.append(row_of(file.read(size)))
        except OSError:
            return []
        return [row for row in rows if row]


_SHELF = Shelf(Answers)


def read(run: Path) -> Answers:
    """The answers of a run, current."""
    return _SHELF.read(run / FILE)
