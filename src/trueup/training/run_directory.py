"""A run directory, open for writing: status, logs, results. Nothing else writes there, but checkpoint.py below.

What the files are: run_files.py. Whose it is: run_lock.py. Which directory, and what it goes on from: run_target.py.
Torch-free. Only rank 0 writes; on other ranks the same calls do nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import yaml

from trueup.errors import ResourceError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.checkpoint import Checkpoint
from trueup.training.compatibility import check_identity
from trueup.training.run_files import (
    METRICS_FILE,
    RUN_FILE,
    TRAINER_LOG_FILE,
    finite,
    holds_results,
    public,
    read_config,
    read_metrics,
    read_status,
    whole_lines,
)
from trueup.training.run_lock import LOCK_FILE, STATUS_FILE, RunLock, this_process
from trueup.training.run_target import Resume, check_target, find_checkpoint, make_directory, make_room, move_aside
from trueup.training.signals import Stopped

if TYPE_CHECKING:
    from trueup.training.backend import Backend

__all__ = [  # what is known of runs elsewhere is asked for here
    "METRICS_FILE",
    "RUN_FILE",
    "STATUS_FILE",
    "TRAINER_LOG_FILE",
    "RunDirectory",
    "check_target",
    "read_metrics",
    "read_status",
]

_HEARTBEAT_SECONDS = 1.0  # at most one status.json per second
_log = logging.getLogger("trueup")


class RunDirectory:
    """The directory of one run, open for writing and locked. Use as a context manager.

    `checkpoint` is the verified checkpoint to resume from, or None for a fresh start. A `guest` adds results to
    another run's directory: that run's status and logs stay as they are.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, checkpoint: Checkpoint | None, writer: bool) -> None:
        self.path = path
        self.config = dict(config)
        self.checkpoint = checkpoint
        self.writer = writer
        self.allow: Collection[str] = ()
        self.guest = False
        self._lock = RunLock(path)
        self._logs: dict[str, IO[str]] = {}
        self._status: dict[str, Any] = {}
        self._last_beat = 0.0
        self._beat_failed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        resume: Resume = None,
        overwrite: bool = False,
        new_run: bool = False,
        join: bool = False,
        allow: Collection[str] = (),
        identity: Mapping[str, Any] | None = None,
        backend: Backend | None = None,
    ) -> RunDirectory:
        """Lock the directory and make it ready. All ranks call this; rank 0 does it and tells the
        others.

        config     flat resolved configuration, for run.yaml; compared with the checkpoint's
        resume     "auto" (newest valid checkpoint, else a fresh start), a path, or None
        overwrite  move what is there aside first
        new_run    use the first free of `<path>`, `<path>-2`, `<path>-3` …
        join       add to a finished run (evaluation): neither refuse nor move anything
        allow      refused configuration changes to accept
        identity   data fingerprint and effective batch, compared with the checkpoint's

        Raises ConfigError for a directory in use by an earlier run, ResourceError when another
        process trains there, CorruptStateError for a checkpoint that does not verify or belongs to
        another run.
        """
        config = public(config or {})

        def open_here() -> RunDirectory:
            target = Path(path)
            check_target(target, resume=resume, overwrite=overwrite, new_run=new_run, join=join)
            target = make_room(target, resume=resume, overwrite=overwrite, new_run=new_run, join=join)
            if new_run and "output_dir" in config:  # run.yaml has to lead back here
                config["output_dir"] = str(target)
            found = cls._locked(target, config, resume, allow, identity or {})
            if resume and not found.checkpoint and holds_results(target):
                found.close()
                move_aside(target, "nothing here can be resumed, so this run starts afresh")
                found = cls._locked(target, config, None, allow, {})
            found._begin(join)
            return found

        if backend is None or backend.world_size == 1:
            return open_here()
        opened: list[RunDirectory] = []
        backend.on_first(lambda: opened.append(open_here()))
        told = backend.gather([(run.path, run.checkpoint) for run in opened])[0]
        if opened:
            return opened[0]
        run = cls(told[0][0], config, checkpoint=told[0][1], writer=False)
        run.allow = allow
        return run

    @classmethod
    def _locked(
        cls,
        path: Path,
        config: Mapping[str, Any],
        resume: Resume,
        allow: Collection[str],
        identity: Mapping[str, Any],
    ) -> RunDirectory:
        """The directory, made if need be, locked, with its checkpoint; untouched if that fails."""
        made = make_directory(path)
        run = cls(path, config, checkpoint=None, writer=True)
        run.allow = allow
        try:
            with _writing(path):
                run._lock.acquire()
            run.checkpoint = find_checkpoint(path, resume, run.config, allow)
            if run.checkpoint:
                check_identity(run.checkpoint.manifest, identity, allow, where=str(run.checkpoint.path))
        except BaseException:
            run.close()
            if made:
                (path / LOCK_FILE).unlink(missing_ok=True)
                path.rmdir()
            raise
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._status.get("state") not in ("finished", "stopped"):
            aborted = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
            code = getattr(error, "exit_code", getattr(error, "code", 130 if aborted else 1))
            state = "stopped" if aborted else "failed"
            self.status(state=state, exit_code=code, message=str(error)[:2000])
        self.close()

    def close(self) -> None:
        """Close the logs and give the lock back."""
        for file in self._logs.values():
            with contextlib.suppress(OSError):  # it was told when the line could not be written
                file.close()
        self._logs.clear()
        self._lock.release()

    # --- writing -----------------------------------------------------------------------------

    def status(self, **fields: Any) -> None:
        """Merge fields into status.json and write it now. A failure to write is only said, once."""
        if not self.writer or self.guest:
            return
        self._status.update(fields, heartbeat=time.time())
        self._last_beat = time.monotonic()
        try:
            durable.write_json(self.path / STATUS_FILE, finite(self._status), sync=False)
        except OSError as error:
            if not self._beat_failed:
                _log.warning("status.json cannot be written (%s); training goes on", error)
            self._beat_failed = True

    def heartbeat(self, **fields: Any) -> None:
        """`status`, but at most once per second."""
        self._status.update(fields)
        if time.monotonic() - self._last_beat >= _HEARTBEAT_SECONDS:
            self.status()

    def warn(self, text: str, step: int | None = None) -> None:
        """Say something to the user, and keep it in status.json for those who look later."""
        _log.warning(text)
        warnings = [*self._status.get("warnings", []), {"step": step, "text": text}]
        self.status(warnings=warnings[-50:])

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON line, durably enough to survive a kill. Raises ResourceError when the
        disk refuses.
        """
        if not self.writer or self.guest:
            return
        with _writing(self.path / name):
            durable.boundary("metrics:write")
            file = self._logs.get(name) or self._open_log(name)
            file.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()

    def write_json(self, name: str, value: Any) -> None:
        """Write a whole JSON file, atomically. Raises ResourceError when the disk refuses."""
        if self.writer:
            with _writing(self.path / name):
                durable.write_json(self.path / name, finite(value))

    def write_text(self, name: str, text: str) -> None:
        """Write a whole text file, atomically. Raises ResourceError when the disk refuses."""
        if self.writer:
            with _writing(self.path / name):
                durable.write_text(self.path / name, text)

    def write_config(self) -> None:
        """run.yaml. On a resume the loop calls this, once the checkpoint has turned out to fit."""
        self.write_text(RUN_FILE, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def write_results(self, split: str, results: Mapping[str, Any]) -> None:
        """`<split>_results.json`, merged into all_results.json as well (transformers' names)."""
        if not self.writer:
            return
        self.write_json(f"{split}_results.json", dict(results))
        everything = self.path / "all_results.json"
        before = durable.read_json(everything) if everything.exists() else {}
        self.write_json("all_results.json", {**before, **results})

    # --- logs --------------------------------------------------------------------------------

    def sync_logs(self) -> dict[str, int]:
        """Push the logs to the disk; the number of lines in each, for the checkpoint."""
        lines = {}
        for name in (METRICS_FILE, TRAINER_LOG_FILE):
            if (self.path / name).exists():
                durable.sync_file(self.path / name)
                lines[name] = (self.path / name).read_bytes().count(b"\n")
        return lines

    def truncate_logs(self, step: int, lines: Mapping[str, int]) -> None:
        """Cut each log back to a checkpoint: no line after it, no torn one, so that no step appears
        twice.
        """
        if not self.writer:
            return
        for name, key in ((METRICS_FILE, "step"), (TRAINER_LOG_FILE, "current_steps")):
            path = self.path / name
            if not path.exists():
                continue
            kept = whole_lines(path)[: lines.get(name, 0)]
            kept = [line for line in kept if _step_in(line, key) <= step]
            self.write_text(name, "".join(line + "\n" for line in kept))

    def set_later_checkpoints_aside(self, step: int) -> None:
        """Rename checkpoints after `step`: they belong to a continuation that is now abandoned."""
        if not self.writer:
            return
        for path in checkpoints.checkpoints(self.path):
            if checkpoints.step_of(path) > step:
                _log.warning("%s is set aside as %s", path.name, checkpoints.set_aside(path).name)

    def _open_log(self, name: str) -> IO[str]:
        path = self.path / name
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # torn by a crash
            durable.write_text(path, "".join(line + "\n" for line in whole_lines(path)))
        self._logs[name] = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        return self._logs[name]

    def _begin(self, join: bool) -> None:
        """Write what a run starts with."""
        checkpoints.remove_stale_stages(self.path)
        self.guest = join and (self.path / STATUS_FILE).exists() and read_config(self.path).get("do_train", True)
        if self.checkpoint is None and not self.guest:
            self.write_config()
            if not join:
                self.truncate_logs(0, {})
                self.set_later_checkpoints_aside(-1)
                (self.path / "divergence.json").unlink(missing_ok=True)  # of an attempt that this one replaces
        self.status(
            state="starting",
            **this_process(),
            started=time.time(),
            step=self.checkpoint.step if self.checkpoint else 0,
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path.name} cannot be written: {error.strerror or error}",
            where=str(path),
            fix="free space on the disk, then resume_from_checkpoint: auto",
        ) from error


def _step_in(line: str, key: str) -> int:
    return int(json.loads(line).get(key, 0))
