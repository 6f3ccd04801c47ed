"""Preferences said on the screen, as rows of a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from trueup.data.register import check_name, enter
from trueup.errors import ConfigError, ResourceError

#: what dataset_info.json says of the rows.
ENTRY: dict[str, Any] = {
    "type": "dpo", "ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}  # fmt: skip


class PairFile:
    """A JSONL file of pairs, entered in the registry of `dataset_dir` with the first.

    Args:
        path: FILE.jsonl; its name without the ending is the dataset's.

    Raises:
        ConfigError: the file is of another kind.
    """

    def __init__(self, path: Path, dataset_dir: str | Path) -> None:
        if path.suffix != ".jsonl":
            raise ConfigError(f"{path} is no place for pairs", where="--preferences", expected="a .jsonl file")
        self.path, self.dataset_dir, self.name = path, Path(dataset_dir), path.stem

    def add(self, row: dict[str, Any]) -> int:
        """Append a row of prompt, chosen and rejected, whole or not at all; returns its number, from 0.

        Raises:
            ValueError: the same pair is there already, or its opposite; the text says where.
            ConfigError: the name belongs to other data. ResourceError: it cannot be written.
        """
        check_name(self.name, self.path, self.dataset_dir, "--preferences")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                number = self._append(row)
        except OSError as error:
            raise ResourceError(f"cannot write {self.path}: {error.strerror or error}") from error
        enter(self.name, self.path, ENTRY, self.dataset_dir, "--preferences")
        return number

    def _append(self, row: dict[str, Any]) -> int:
        there = self.path.read_bytes() if self.path.exists() else b""
        lines = there.decode("utf-8", "replace").splitlines()
        _refuse_what_is_there(lines, row)
        torn = bool(there) and not there.endswith(b"\n")  # by a crash: it stays a row of its own
        text = "\n" * torn + json.dumps(row, ensure_ascii=False) + "\n"
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        return sum(bool(line.strip()) for line in lines)


def _refuse_what_is_there(lines: list[str], row: dict[str, Any]) -> None:
    wanted = (row["prompt"], row["chosen"], row["rejected"])
    opposite = (row["prompt"], row["rejected"], row["chosen"])
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            pair = (found["prompt"], found["chosen"], found["rejected"])
        except (ValueError, KeyError, TypeError):
            continue
        if pair == wanted:
            raise ValueError(f"this pair is in line {number} already")
        if pair == opposite:
            raise ValueError(f"line {number} says the opposite: take it out first")
