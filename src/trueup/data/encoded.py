"""Examples as token ids: exactly what a trainer sees, kept in a few flat arrays.

A dataset of a million pairs is five arrays and a list of row names, not millions of small objects;
it is saved as safetensors and JSON, together with a fingerprint of every id and mask.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trueup.errors import CorruptStateError


@dataclass(frozen=True, slots=True)
class Answer:
    """One continuation of a prompt."""

    ids: np.ndarray  # int32 [A]
    mask: np.ndarray  # bool [A], True = in the loss


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its continuations: one for text, chat and feedback, two (chosen, rejected) for a
    pair, N for a
    ranking, none for a prompt. `scores` holds a ranking's scores, or 1.0 / 0.0 for wanted /
    unwanted feedback; a single one beside two answers is the margin by which the first must win."""

    row: str
    prompt: np.ndarray  # int32 [P], may be empty
    answers: tuple[Answer, ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Some examples as flat arrays: a piece of a dataset."""

    tokens: np.ndarray  # int32 [all tokens]: prompt, answers, prompt, answers, …
    mask: np.ndarray  # bool [all tokens], False on prompts
    sizes: np.ndarray  # int64 [parts]: tokens of each prompt or answer
    parts: np.ndarray  # int64 [examples]: one prompt and its answers
    rows: list[str]
    scores: list[tuple[float, ...]]

    @classmethod
    def of(cls, examples: Iterable[Encoded]) -> Block:
        """These examples, each copied once."""
        tokens: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        parts, rows, scores = [], [], []
        for example in examples:
            tokens.append(example.prompt)
            masks.append(np.zeros(len(example.prompt), bool))
            for answer in example.answers:
                tokens.append(answer.ids)
                masks.append(answer.mask)
            parts.append(1 + len(example.answers))
            rows.append(example.row)
            scores.append(tuple(example.scores))
        return cls(
            np.concatenate([np.empty(0, np.int32), *tokens]).astype(np.int32, copy=False),
            np.concatenate([np.empty(0, bool), *masks]).astype(bool, copy=False),
            np.fromiter(map(len, tokens), np.int64, len(tokens)),
            np.asarray(parts, dtype=np.int64),
            rows,
            scores,
        )


class EncodedDataset(Sequence[Encoded]):
    """A sequence of `Encoded`, read from flat arrays on demand.

    Attributes:
        lengths: int64 [n], tokens of each example with the prompt counted once.
        answer_lengths: int64 [n, most answers of an example], tokens of each answer; 0 where there
        is none.
        fingerprint: sha256 over every id, mask, border and score.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        bounds: np.ndarray,
        first: np.ndarray,
        rows: list[str],
        scores: list[tuple[float, ...]] | None = None,
    ) -> None:
        self._tokens = tokens  # int32 [all tokens]: prompt, answers, prompt, answers, …
        self._mask = mask  # bool [all tokens], False on prompts
        self._bounds = bounds  # int64 [parts + 1]: where each prompt or answer begins
        self._first = first  # int64 [n + 1]: the part that is example i's prompt
        self.rows = rows
        self._scores = scores if scores and any(scores) else None
        sizes = np.diff(bounds)
        self.lengths = bounds[first[1:]] - bounds[first[:-1]]
        answers = np.diff(first) - 1
        width = int(answers.max(initial=0))
        self.answer_lengths = np.zeros((len(rows), width), dtype=np.int64)
        for number in range(width):
            has = answers > number
            self.answer_lengths[has, number] = sizes[first[:-1][has] + 1 + number]
        self.prompt_lengths = sizes[first[:-1]]
        self.fingerprint = self._hash()

    @classmethod
    def of(cls, examples: Iterable[Encoded]) -> EncodedDataset:
        """The dataset of these examples."""
        return cls.joined([Block.of(examples)])

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> EncodedDataset:
        """The dataset of the examples of these blocks, in order."""
        sizes = np.concatenate([np.zeros(1, np.int64), *(block.sizes for block in blocks)])
        parts = np.concatenate([np.zeros(1, np.int64), *(block.parts for block in blocks)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(block.tokens for block in blocks)]),
            np.concatenate([np.empty(0, bool), *(block.mask for block in blocks)]),
            np.cumsum(sizes),
            np.cumsum(parts),
            [row for block in blocks for row in block.rows],
            [score for block in blocks for score in block.scores],
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        part, end = int(self._first[i]), int(self._first[i + 1])
        spans = [slice(int(self._bounds[p]), int(self._bounds[p + 1])) for p in range(part, end)]
        answers = tuple(Answer(self._tokens[span], self._mask[span]) for span in spans[1:])
        return Encoded(self.rows[i], self._tokens[spans[0]], answers, self._scores[i] if self._scores else ())

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for array in (self._tokens, np.packbits(self._mask), self._bounds, self._first):
            digest.update(np.ascontiguousarray(array).data)
        if self._scores:
            digest.update(json.dumps(self._scores).encode())
        return digest.hexdigest()

    # --- disk ---------------------------------------------------------------------------

    def save(self, directory: Path, about: dict[str, object] | None = None) -> None:
        """Write the dataset into `directory` in one step: it is there whole or not at all.

        `about` is kept beside it: what the tokens were made from.
        """
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            arrays = {
                "tokens": self._tokens,
                "mask": np.packbits(self._mask),
                "bounds": self._bounds,
                "first": self._first,
            }
            save_file(arrays, staging / "tokens.safetensors")
            index = {
                "rows": self.rows,
                "scores": self._scores,
                "fingerprint": self.fingerprint,
                "about": about or {},
            }
            (staging / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
            for path in staging.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            if directory.exists():
                shutil.rmtree(directory)
            staging.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def load(cls, directory: Path) -> tuple[EncodedDataset, dict[str, object]]:
        """The dataset saved in `directory`, and its `about`. Raises CorruptStateError if bytes have
        changed.
        """
        try:
            index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            arrays = load_file(directory / "tokens.safetensors")
            tokens = arrays["tokens"]
            mask = np.unpackbits(arrays["mask"], count=len(tokens)).astype(bool)
            scores = [tuple(score) for score in index["scores"]] if index["scores"] else None
            dataset = cls(tokens, mask, arrays["bounds"], arrays["first"], index["rows"], scores)
        except (OSError, ValueError, KeyError, IndexError, SafetensorError) as error:
            raise CorruptStateError(
                f"the tokenised dataset cannot be read: {error}",
                where=str(directory),
                fix="delete the directory, or set overwrite_cache: true, to tokenise again",
            ) from error
        if dataset.fingerprint != index["fingerprint"]:
            raise CorruptStateError(
                "the tokenised dataset is not the one that was written (its fingerprint differs)",
                where=str(directory),
                fix="delete the directory, or set overwrite_cache: true, to tokenise again",
            )
        return dataset, index["about"]
