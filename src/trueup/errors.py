"""What went wrong, in a user's words: errors that carry what, where, what was expected and how to fix it.

One error may hold many problems, because a user who has three typos wants to hear of three typos.
The exit codes are this project's contract (see `docs/errors.md`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EXIT_OK = 0
EXIT_BUG = 1
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is a `file:line`, a key or a row; `what` stands alone as a sentence."""

    what: str
    where: str | None = None
    expected: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"    expected: {self.expected}")
        if self.fix:
            lines.append(f"    fix: {self.fix}")
        return "\n".join(lines)


class UserError(Exception):
    """Base of all errors a user can cause and mend. Printed without a traceback; the exit code tells the kind."""

    exit_code = EXIT_BUG

    def __init__(
        self,
        what: str | Iterable[Problem],
        *,
        where: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problems = [Problem(what, where, expected, fix)] if isinstance(what, str) else list(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(UserError):
    """A key, a value or a combination of keys that cannot be meant."""

    exit_code = 2


class DataError(UserError):
    """Rows, files or datasets that cannot be read as what they were said to be."""

    exit_code = 3


class ResourceError(UserError):
    """Not enough memory, disk, or another process holds what we need."""

    exit_code = 4


class DivergenceError(UserError):
    """Training left the finite numbers; the weights of the last good step are kept."""

    exit_code = 5


class ModelError(UserError):
    """A model, adapter, tokenizer, hub or library that does not fit what was asked of it."""

    exit_code = 6


class CorruptStateError(UserError):
    """Saved state whose bytes are not the ones that were written, or that belongs to another run."""

    exit_code = 7
