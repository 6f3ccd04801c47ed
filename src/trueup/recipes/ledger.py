"""What an endpoint was asked, in this run of a build and in all of them: a kill and a resume add up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trueup.recipes.journal import Journal, digest
from trueup.rollout.endpoint import Endpoint, Spent

_COUNTS = ("requests", "retries", "prompt_tokens", "completion_tokens")


class Ledger:
    """An endpoint's counts in the journal, beside each of its replies. What is under way at a kill is not in them."""

    def __init__(self, journal: Journal, role: str, endpoint: Endpoint) -> None:
        self._journal, self._endpoint = journal, endpoint
        self._key = f"spent {digest(role, endpoint.identity)}"
        found = journal.get(self._key) or {}
        self._before = {name: int(found.get(name, 0)) for name in _COUNTS}

    def put(self, key: str, value: Any) -> None:
        """A reply, and what has been spent up to it."""
        self._journal.put(key, value, {self._key: self._total()})

    def close(self) -> None:
        """What was asked since the last reply, too: requests that failed."""
        if self._total() != (self._journal.get(self._key) or self._before):
            self._journal.put(self._key, self._total())

    def in_words(self) -> str:
        """As `Spent.in_words`, of all runs."""
        return self._all().in_words()

    def to_dict(self) -> dict[str, Any]:
        """Counts of all runs, and of this one; the cost of all of them is at the price that is given now."""
        return {**self._all().to_dict(), "this_run": self._endpoint.spent.to_dict()}

    def _total(self) -> dict[str, int]:
        now = self._endpoint.spent
        return {name: count + getattr(now, name) for name, count in self._before.items()}

    def _all(self) -> Spent:
        return replace(self._endpoint.spent, **self._total())
