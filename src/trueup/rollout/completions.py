"""completions.jsonl: every answer a run drew, with its rewards, in the run's directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COMPLETIONS_FILE = "completions.jsonl"


class CompletionsLog:
    """Appends lines, counts them, and cuts the file back to a checkpoint, so that no answer appears twice.

    Args:
        append: writes one line: (name of the file, row). Does nothing on processes that do not write.
        writer: whether this process may change the file.
    """

    def __init__(self, directory: Path, append: Callable[[str, Mapping[str, Any]], None], writer: bool) -> None:
        self.path = directory / COMPLETIONS_FILE
        self.append = append
        self.writer = writer
        self.lines = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self.append(COMPLETIONS_FILE, row)
        self.lines += 1

    def cut(self, lines: int) -> None:
        """Keep the first `lines` lines; before anything is written by this process."""
        self.lines = lines
        if not self.writer or not self.path.exists():
            return
        kept = self.path.read_bytes().split(b"\n")[:lines]
        self.path.write_bytes(b"".join(line + b"\n" for line in kept if line))
