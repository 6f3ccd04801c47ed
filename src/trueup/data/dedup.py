"""`trueup data dedup`: rows that say what an earlier row says, exactly or nearly, left out.

Exact duplicates are the data report's: the same texts in the same roles, white space at the ends
aside. Near ones share most of their runs of three words (of characters, where a script puts no
spaces); candidates come from MinHash, and each is then compared in full.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trueup.data.counts import counted
from trueup.data.examples import Chat, Example, Feedback, Messages, Pair, Prompt, Ranking, Text
from trueup.data.formats import RowProblem
from trueup.data.report import fingerprint, prompt_fingerprint
from trueup.data.rowset import Outcome, RowSet, entry_of, read_set
from trueup.data.write import new_rows
from trueup.errors import ModelError
from trueup.waiting import waiting

By = Literal["row", "prompt"]
_PERMUTATIONS = 128
_WIDEST = 0.9  # the library finds no bands for thresholds near 1
_WORDS = 3  # in a shingle
#: Words, and single characters of scripts written without spaces.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+")


def dedup(
    name: str,
    output: Path,
    near: float | None = None,
    by: By = "row",
    dataset_dir: str | Path = "data",
    hub: str = "huggingface",
) -> Outcome:
    """Write the rows of `name` without duplicates to `output`, each as it was; the first of equals stays.

    Args:
        near: also drop rows whose similarity (Jaccard, of runs of three words) to a kept one is at least this.
        by: "prompt" compares questions only, so that each is asked once.

    Raises:
        ModelError: `near` without the library it needs. ConfigError, DataError: from reading.
    """
    similar = _Similar(near, by) if near else None
    source = read_set(name, dataset_dir, hub)
    seen: dict[bytes, int] = {}
    dropped: list[tuple[str, str, str]] = []
    with new_rows(output) as write, waiting("comparing", len(source), "rows") as tell:
        for index, row, example in source:
            tell(index + 1)
            if not isinstance(example, RowProblem):
                first = seen.setdefault(_key(example, by), index)
                if first != index:
                    dropped.append((source.row_id(index), f"same {by}", f"as {source.row_id(first)}"))
                    continue
                if similar and (found := similar.find_or_keep(index, example)):
                    twin, similarity = found
                    detail = f"{similarity:.2f} like {source.row_id(twin)}"
                    dropped.append((source.row_id(index), f"nearly the same {by}", detail))
                    continue
            write(row)
    kept = len(source) - len(dropped)
    files, entries = {str(output): kept}, {str(output): entry_of(source.spec)}
    return Outcome("dedup", len(source), kept, dropped, files, _notes(source), entries)


def _key(example: Example, by: By) -> bytes:
    return prompt_fingerprint(example) if by == "prompt" else fingerprint(example)


def _notes(source: RowSet) -> list[str]:
    if not source.unusable:
        return []
    rows = counted(source.unusable, "row is unusable in training and", "rows are unusable in training and")
    return [f"{rows} kept as written: `trueup data check`"]


# ---- near duplicates -----------------------------------------------------------------------------


class _Similar:
    """The rows kept so far, as hashes: of each its sketch, by which candidates are found, and all its runs of words."""

    def __init__(self, near: float, by: By) -> None:
        """Raises ModelError without the library."""
        self._lsh, self._near = _index(near), near
        self._by: By = by
        self._empty = _empty_sketch()
        self._shingles: dict[int, np.ndarray] = {}  # row → uint32 [S], ascending

    def find_or_keep(self, index: int, example: Example) -> tuple[int, float] | None:
        """The most similar row kept so far and how similar it is, if that is enough; else this one is kept."""
        mine = np.unique(np.fromiter(_shingles(example, self._by), np.uint32))
        sketch = self._empty.copy()
        sketch.update_batch(mine.tolist())
        similar = [(_similarity(mine, self._shingles[other]), -other) for other in self._lsh.query(sketch)]
        best, other = max(similar, default=(0.0, 0))
        if best >= self._near:
            return -other, best
        self._lsh.insert(index, sketch)
        self._shingles[index] = mine
        return None


def _index(near: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise ModelError(
            "near duplicates are found with the library datasketch, which is not installed",
            where="--near",
            fix="pip install 'trueup[data]'",
        ) from error
    # A wider net than asked for, and misses weigh more than idle candidates: each is compared in full.
    return MinHashLSH(threshold=min(near, _WIDEST), num_perm=_PERMUTATIONS, weights=(0.2, 0.8))


def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, hashfunc=int)


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if len(a) or len(b) else 1.0


def _shingles(example: Example, by: By) -> Iterator[int]:
    """Hashes of every run of three words. The same in every process, unlike Python's own."""
    for part in _texts(example, by):
        words = _WORD.findall(part.lower())
        for start in range(max(1, len(words) - _WORDS + 1)):
            yield zlib.crc32(" ".join(words[start : start + _WORDS]).encode("utf-8", "replace"))


def _texts(example: Example, by: By) -> Iterator[str]:
    match example:
        case Text():
            yield example.text
            return
        case Chat(messages):
            turns: list[Messages] = [messages[:-1] if by == "prompt" else messages]
        case Prompt(messages):
            turns = [messages]
        case Pair():
            turns = [example.prompt, *((example.chosen, example.rejected) if by == "row" else ())]
        case Ranking():
            turns = [example.prompt, *(example.answers if by == "row" else ())]
        case Feedback():
            turns = [example.prompt, *((example.answer,) if by == "row" else ())]
    yield from (message.content for messages in turns for message in messages)
