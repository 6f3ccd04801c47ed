"""`trueup data split`: rows to train on and rows to evaluate on, in two files.

Rows with the same question stay together: an answer must not be known from training.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from trueup.data.report import number, prompt_fingerprint
from trueup.data.rowset import Outcome, RowSet, entry_of, read_set
from trueup.data.write import write_rows
from trueup.errors import ConfigError


def split(
    name: str,
    train: Path,
    held_out: Path,
    val_size: float = 0.1,
    seed: int = 42,
    dataset_dir: str | Path = "data",
    hub: str = "huggingface",
) -> Outcome:
    """Write about `val_size` of the rows (a share below 1, or a number) to `held_out` and the others to `train`.

    Deterministic: the same rows and seed give the same files. Rows keep their order and their form.

    Raises:
        ConfigError: nothing would be left on one of the sides. DataError: from reading.
    """
    source = read_set(name, dataset_dir, hub)
    total = len(source.rows)
    wanted = int(val_size) if val_size >= 1 else max(1, round(val_size * total))
    chosen = _choose(source, wanted, seed)
    if not 0 < len(chosen) < total:
        raise ConfigError(
            f"holding out {number(wanted)} of {number(total)} rows leaves none on one side",
            where="--val_size",
            expected="a share below 1, or fewer rows than there are",
            fix="rows with the same question stay together" if len(set(_groups(source))) == 1 else None,
        )
    parts = {train: [i for i in range(total) if i not in chosen], held_out: sorted(chosen)}
    for path, indices in parts.items():
        write_rows(path, [source.rows[index] for index in indices])
    notes = []
    if len(chosen) != wanted:
        notes.append(f"{number(len(chosen))} held out rather than {number(wanted)}: equal questions stay together")
    files = {str(path): len(indices) for path, indices in parts.items()}
    return Outcome("split", total, total, [], files, notes, dict.fromkeys(files, entry_of(source.spec)))


def _groups(source: RowSet) -> list[bytes]:
    """For each row what it asks; for one that cannot be read, its own text."""
    return [
        prompt_fingerprint(source.examples[index])
        if index in source.examples
        else json.dumps(row, sort_keys=True, default=str).encode()
        for index, row in enumerate(source.rows)
    ]


def _choose(source: RowSet, wanted: int, seed: int) -> set[int]:
    members: dict[bytes, list[int]] = defaultdict(list)
    for index, group in enumerate(_groups(source)):
        members[group].append(index)
    groups = list(members.values())
    chosen: set[int] = set()
    for position in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) >= wanted:
            break
        chosen.update(groups[position])
    return chosen
