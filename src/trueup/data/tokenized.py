"""Tokenised data on disk, with the data report and what became of every row: a second start reads nothing else.

There are two places. `tokenized_path` is the user's: a copy there that was made from other data, another template,
tokenizer or length is refused, never quietly replaced. Without it, data worth the while are kept below `TRUEUP_CACHE`
(or ~/.cache/trueup) under a name that says all that decides them; the copies used longest ago go when there are too
many. A copy counts once its note is there, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from trueup import __version__
from trueup.config.methods import stage_kind
from trueup.config.schema import RunConfig
from trueup.data.chat_template import ChatTemplate
from trueup.data.digests import cache_folder
from trueup.data.encoded import EncodedDataset
from trueup.data.encoder import Policy, Tally
from trueup.data.report import DataReport
from trueup.errors import ConfigError, CorruptStateError

log = logging.getLogger("trueup")

NOTE = "about.json"
FORMAT = 3  # to be raised whenever the same data would give other tokens, or a copy is kept in another way
_MOST_BYTES = 10 * 2**30  # of all copies below the cache


@dataclass(frozen=True, slots=True)
class Tokenised:
    """All that reading and encoding found out, by split: "train" first."""

    datasets: dict[str, EncodedDataset]
    tallies: dict[str, Tally]
    #: the data report's state as reading left it, and all lengths; the rest of encoding's part is in the tallies
    report: dict[str, Any]


def facts_of(cfg: RunConfig, template: ChatTemplate, policy: Policy, tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens besides the data, by the words a user knows it by."""
    return {
        **asdict(policy),
        "kind of example": stage_kind(cfg) + (" and chat" if cfg.objective.knowledge_weight else ""),
        "template": template.fingerprint,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "version": [FORMAT, __version__, transformers.__version__, tokenizers.__version__, jinja2.__version__],
    }


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", False)], default=str)
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


# --- a copy in a folder -------------------------------------------------------------------


def write(folder: Path, tokenised: Tokenised, facts: Mapping[str, Any]) -> None:
    """Keep a copy in `folder`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).unlink(missing_ok=True)
    for name, dataset in tokenised.datasets.items():
        dataset.save(folder / name)
    note = {
        "facts": facts,
        "splits": {name: dataset.fingerprint for name, dataset in tokenised.datasets.items()},
        "tallies": {name: tally.to_dict() for name, tally in tokenised.tallies.items()},
        "report": tokenised.report,
    }
    staged = folder / f".{NOTE}-{uuid.uuid4().hex}"
    with staged.open("w", encoding="utf-8") as file:
        file.write(json.dumps(note, ensure_ascii=False))  # `dump` would be in Python, and slow
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, folder / NOTE)


def read_note(folder: Path) -> dict[str, Any] | None:
    """What is written about a copy; None if there is none. Raises CorruptStateError."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if isinstance(note["facts"], dict) and "train" in note["splits"]:
            return note
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, str(error)) from error
    raise _unreadable(folder, "its note is not one of ours")


def read(folder: Path, note: dict[str, Any]) -> Tokenised:
    """The copy that `note` is about. Raises CorruptStateError if bytes have changed."""
    datasets = {}
    for name, fingerprint in note["splits"].items():
        datasets[name], _ = EncodedDataset.load(folder / name)
        if datasets[name].fingerprint != fingerprint:
            raise _unreadable(folder, f"{name} is not the one that belongs to its note")
    try:
        tallies = {name: Tally(**note["tallies"][name]) for name in datasets}
        DataReport.restored(note["report"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, str(error)) from error
    return Tokenised(datasets, tallies, note["report"])


def _unreadable(folder: Path, why: str) -> CorruptStateError:
    return CorruptStateError(
        f"the tokenised data cannot be read: {why}",
        where=str(folder),
        fix="delete the folder, or set overwrite_cache: true, to tokenise again",
    )


# --- the user's folder --------------------------------------------------------------------


class UsersCopy:
    """The copy in `tokenized_path`."""

    def __init__(self, cfg: RunConfig, facts: dict[str, Any]) -> None:
        self.folder = Path(str(cfg.data.tokenized_path))
        self.wants_evaluation = bool(cfg.data.eval_dataset or cfg.data.val_size)
        self.facts = facts
        self.note = None if cfg.data.overwrite_cache else read_note(self.folder)

    @property
    def exists(self) -> bool:
        return self.note is not None

    def find(self) -> Tokenised | None:
        """What it holds, if it is there. Raises ConfigError if it was made from something else."""
        if self.note is None:
            return None
        if self.wants_evaluation and len(self.note["splits"]) == 1:
            self._refuse("without evaluation data")
        then = self.note["facts"]
        changed = [
            f"{key} ({then.get(key)} → {value})" if isinstance(value, (int, bool)) or len(value) < 20 else key
            for key, value in self.facts.items()
            if then.get(key) != value
        ]
        if changed:
            self._refuse(f"with another {', '.join(changed)}")
        return read(self.folder, self.note)

    def keep(self, tokenised: Tokenised) -> None:
        write(self.folder, tokenised, self.facts)

    def _refuse(self, how: str) -> None:
        raise ConfigError(
            f"the tokenised data was made {how}",
            where=f"tokenized_path: {self.folder}",
            fix="set overwrite_cache: true to tokenise again, or name another folder",
        )


# --- the cache ----------------------------------------------------------------------------


class CachedCopy:
    """The copy below the cache, named by all facts. A cache never stops a run: it costs time when it fails."""

    def __init__(self, cfg: RunConfig, facts: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = cache_folder("tokenized") / key[:32]
        self.facts = facts
        self.ignored = cfg.data.overwrite_cache

    def find(self) -> Tokenised | None:
        """What it holds, if it is there and whole."""
        if self.ignored:
            return None
        try:
            note = read_note(self.folder)
            if note is None or note["facts"] != self.facts:
                return None
            found = read(self.folder, note)
            os.utime(self.folder / NOTE)
        except (CorruptStateError, OSError) as error:
            log.warning("cached tokens are made again: %s", error)
            return None
        log.info("tokens are read from the cache (%s); overwrite_cache: true makes them again", self.folder)
        return found

    def keep(self, tokenised: Tokenised) -> None:
        """Put it there whole or not at all, and let go of the oldest copies if there are too many."""
        staged = self.folder.with_name(f".{self.folder.name}-{uuid.uuid4().hex}")
        try:
            write(staged, tokenised, self.facts)
            shutil.rmtree(self.folder, ignore_errors=True)
            staged.rename(self.folder)
            _shrink(self.folder.parent, spared=self.folder)
        except OSError as error:
            log.warning("the tokens could not be cached at %s: %s", self.folder, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _shrink(root: Path, spared: Path) -> None:
    """Remove the copies that were used longest ago, until the others fit."""
    copies = sorted((folder for folder in root.iterdir() if folder != spared), key=_last_used, reverse=True)
    room = _MOST_BYTES - _size(spared)
    for folder in copies:
        room -= _size(folder)
        if room < 0:
            shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    for path in (folder / NOTE, folder):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
