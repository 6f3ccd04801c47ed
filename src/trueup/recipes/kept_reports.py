"""Data reports kept from an earlier start: as long as nothing has changed that decides one, none is made again.

Neither a row nor a tokenizer is read for that, and no library that takes long: a report of 100,000 rows is there in a
second. What decides it is the data's bytes, the config, the tokenizer's files, and the program and its libraries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import trueup
from trueup.builtin import is_builtin
from trueup.config.schema import SECRETS, SECTION_OF, RunConfig
from trueup.data.digests import cache_folder, data_digest, file_digest, is_worth_keeping, local_files
from trueup.data.report import DataReport
from trueup.data.write import write_text
from trueup.errors import UserError
from trueup.models.hub import hub_access, resolve_model

log = logging.getLogger("trueup")

_MOST = 200  # reports
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
#: Keys that decide nothing of a report.
_IDLE = SECRETS | {"overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size"}


class KeptReport:
    """The place of one report below the cache."""

    def __init__(self, file: Path, ignored: bool) -> None:
        self.file, self.ignored = file, ignored
        self._notices: list[tuple[int, str]] = []

    @classmethod
    def of(cls, cfg: RunConfig) -> KeptReport | None:
        """That of a run's data; None where the data are small, or data and tokenizer are not files of this machine."""
        if cfg.data.streaming or cfg.data.tokenized_path or not cfg.data.dataset:
            return None
        files, folders = local_files(cfg), _tokenizer_folders(cfg)
        if files is None or folders is None or not is_worth_keeping(files):
            return None
        facts = {
            "config": {key: cfg[key] for key in sorted(SECTION_OF.keys() - _IDLE)},
            "data": data_digest(cfg, files),
            "tokenizer": [_digest_of(folder) for folder in folders],
            "template": _template_digest(cfg),
            "program": [trueup.__version__, _program_digest(), *(version(name) for name in _LIBRARIES)],
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return cls(cache_folder("reports") / f"{key[:32]}.json", cfg.data.overwrite_cache)

    def find(self) -> DataReport | None:
        """The report, with all that was said when it was made; None if it is not there, or not whole."""
        if self.ignored:
            return None
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            report = DataReport.restored(kept["report"])
            notices = [(int(level), str(text)) for level, text in kept["notices"]]
            os.utime(self.file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        for level, text in notices:
            log.log(level, "%s", text)
        report.heard(text for _, text in notices)
        log.info("nothing has changed since this report was made; overwrite_cache: true makes it again")
        return report

    @contextmanager
    def listening(self) -> Iterator[None]:
        """What is said within the block will be said again with the report."""
        listener = _Listener(self._notices)
        log.addHandler(listener)
        try:
            yield
        finally:
            log.removeHandler(listener)

    def keep(self, report: DataReport) -> None:
        """Put it there, and let go of those that were used longest ago. A cache that fails costs time, no more."""
        try:
            write_text(self.file, json.dumps({"report": report.state(), "notices": self._notices}, ensure_ascii=False))
            kept = sorted(self.file.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in kept[:-_MOST]:
                file.unlink(missing_ok=True)
        except (OSError, UserError) as error:
            log.info("the report could not be kept: %s", error)


class _Listener(logging.Handler):
    """Collects warnings; what is only noted is in the report's notes, or true of one start alone."""

    def __init__(self, notices: list[tuple[int, str]]) -> None:
        super().__init__(logging.WARNING)
        self._notices = notices

    def emit(self, record: logging.LogRecord) -> None:
        self._notices.append((record.levelno, record.getMessage()))


# ---- what decides a report -----------------------------------------------------------------------


def _tokenizer_folders(cfg: RunConfig) -> list[Path] | None:
    """The folders that a run's tokenizer may come from; None if one of them is not on this machine."""
    named = [str(cfg.model.model_name_or_path), *cfg.model.adapter_name_or_path]
    if not all(is_builtin(name) or Path(name).expanduser().is_dir() for name in named):
        return None
    try:
        _, location, adapters = resolve_model(named[0], named[1:], hub_access(cfg.model))
    except UserError:
        return None  # loading it says what is wrong
    folders = [Path(folder) for folder in (*adapters, location)]
    return folders if all(folder.is_dir() for folder in folders) else None


def _digest_of(folder: Path) -> list[tuple[str, str]]:
    """Names and contents of a model's files, weights aside."""
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return [
        (str(path.relative_to(folder)), file_digest(path))
        for path in sorted(files)
        if path.is_file() and path.suffix not in _WEIGHTS
    ]


def _template_digest(cfg: RunConfig) -> str | None:
    path = Path(str(cfg.data.template)).expanduser()
    return file_digest(path) if cfg.data.template and path.is_file() else None


@cache
def _program_digest() -> str:
    """Of this package's own files that read, tokenise and count: whoever changes them gets the new report."""
    root = Path(trueup.__file__).parent
    parts = ("data/*.py", "builtin/templates/*", "models/tokenizer.py", "recipes/dataset*.py", "recipes/batches.py")
    files = sorted(path for part in parts for path in root.glob(part))
    return hashlib.sha256(
        "".join(f"{path.relative_to(root)} {file_digest(path)}\n" for path in files).encode()
    ).hexdigest()
