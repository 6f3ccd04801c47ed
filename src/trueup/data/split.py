"""`trueup data split`: rows to train on and rows to evaluate on, in two files.

Rows with the same question stay together: an answer must not be known from training.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np

from trueup.data.examples import Example
from trueup.data.formats import RowProblem
from trueup.data.readers import Row
from trueup.data.report import number, prompt_fingerprint
from trueup.data.rowset import Outcome, RowSet, entry_of, read_set
from trueup.data.write import new_rows
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
    total = len(source)
    wanted = int(val_size) if val_size >= 1 else max(1, round(val_size * total))
    groups = _groups(source)
    chosen = _choose(groups, wanted, seed)
    count = int(chosen.sum())
    if not 0 < count < total:
        raise ConfigError(
            f"holding out {number(wanted)} of {number(total)} rows leaves none on one side",
            where="--val_size",
            expected="a share below 1, or fewer rows than there are",
            fix="rows with the same question stay together" if not groups.any() else None,
        )
    with new_rows(held_out) as evaluate, new_rows(train) as learn:
        for index, row, _ in source.passes:
            (evaluate if chosen[index] else learn)(row)
    notes = []
    if count != wanted:
        notes.append(f"{number(count)} held out rather than {number(wanted)}: equal questions stay together")
    files = {str(train): total - count, str(held_out): count}
    return Outcome("split", total, total, [], files, notes, dict.fromkeys(files, entry_of(source.spec)))


def _groups(source: RowSet) -> np.ndarray:
    """int64 [rows]: equal for rows that ask the same (or, if they cannot be read, say the same), counted from 0."""
    known: dict[bytes, int] = {}
    groups = np.empty(len(source), np.int64)
    for index, row, example in source:
        groups[index] = known.setdefault(_asks(row, example), len(known))
    return groups


def _asks(row: Row, example: Example | RowProblem) -> bytes:
    if isinstance(example, RowProblem):
        return blake2b(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "replace"), digest_size=20).digest()
    return prompt_fingerprint(example)


def _choose(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """bool [rows]: whole groups, drawn until `wanted` rows are held out."""
    sizes = np.bincount(groups)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    before = np.cumsum(sizes[drawn]) - sizes[drawn]
    return np.isin(groups, drawn[before < wanted])
