"""A run is a directory of plain files; this is the only thing that writes them, and it owns the
directory's lock.

    run.yaml            every key resolved             environment.json   versions, hardware, git
    status.json         state, pid, heartbeat, step    metrics.jsonl      a line per logging step
    trainer_log.jsonl   LLaMA-Factory's keys           data_report.json   kept, dropped, truncated
    checkpoint-N/       see checkpoint.py              *_results.json, *.png, README.md at the end

Torch-free, so that listing runs is quick. Only rank 0 writes; on other ranks the same calls do
nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import psutil
import yaml
from filelock import FileLock, Timeout

from trueup.errors import ConfigError, CorruptStateError, ResourceError, UserError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.checkpoint import Checkpoint
from trueup.training.compatibility import check_identity, check_resumable

if TYPE_CHECKING:
    from trueup.training.backend import Backend

LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
RUN_FILE = "run.yaml"
STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
TRAINER_LOG_FILE = "trainer_log.jsonl"

_HEARTBEAT_SECONDS = 1.0  # at most one status.json per second
_LOST_HEARTBEAT_SECONDS = 120.0  # an owner on another machine counts as dead after this
_log = logging.getLogger("trueup")


class RunDirectory:
    """The directory of one run, open for writing and locked. Use as a context manager.

    `checkpoint` is the verified checkpoint to resume from, or None for a fresh start.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, checkpoint: Checkpoint | None, writer: bool) -> None:
        self.path = path
        self.config = dict(config)
        self.checkpoint = checkpoint
        self.writer = writer
        self.allow: Collection[str] = ()
        self._lock = FileLock(path / LOCK_FILE)
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
        resume: str | Path | bool | None = None,
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
        config = plain(config or {})

        def open_here() -> RunDirectory:
            target = Path(path)
            check_target(target, resume=resume, overwrite=overwrite, new_run=new_run, join=join)
            if new_run and not _is_auto(resume):
                target = _first_free(target)
                if "output_dir" in config:  # run.yaml has to lead back here
                    config["output_dir"] = str(target)
            elif overwrite and not _continues(target, resume) and is_occupied(target):
                _move_aside(target, "overwrite_output_dir")
            found = cls._locked(target, config, resume, allow, identity or {})
            if resume and not found.checkpoint and _holds_results(target):
                found.close()
                _move_aside(target, "nothing here can be resumed, so this run starts afresh")
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
        resume: str | Path | bool | None,
        allow: Collection[str],
        identity: Mapping[str, Any],
    ) -> RunDirectory:
        """The directory, made if need be, locked, with its checkpoint; untouched if that fails."""
        made = _make(path)
        run = cls(path, config, checkpoint=None, writer=True)
        run.allow = allow
        try:
            run._acquire()
            run.checkpoint = _find_checkpoint(path, resume)
            if run.checkpoint:
                _check_config(run.checkpoint, run.config, allow)
                where = str(run.checkpoint.path)
                check_identity(run.checkpoint.manifest, identity, allow, where=where)
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
            aborted = isinstance(error, KeyboardInterrupt | SystemExit)
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
        self._release()

    # --- writing -----------------------------------------------------------------------------

    def status(self, **fields: Any) -> None:
        """Merge fields into status.json and write it now. A failure to write is only said, once."""
        if not self.writer:
            return
        self._status.update(fields, heartbeat=time.time())
        self._last_beat = time.monotonic()
        try:
            durable.write_json(self.path / STATUS_FILE, _finite(self._status), sync=False)
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
        if not self.writer:
            return
        with _writing(self.path / name):
            durable.boundary("metrics:write")
            file = self._logs.get(name) or self._open_log(name)
            file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()

    def write_json(self, name: str, value: Any) -> None:
        """Write a whole JSON file, atomically. Raises ResourceError when the disk refuses."""
        if self.writer:
            with _writing(self.path / name):
                durable.write_json(self.path / name, _finite(value))

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
            kept = _lines(path)[: lines.get(name, 0)]
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
            durable.write_text(path, "".join(line + "\n" for line in _lines(path)))
        self._logs[name] = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        return self._logs[name]

    # --- ownership ---------------------------------------------------------------------------

    def _acquire(self) -> None:
        owner_file = self.path / OWNER_FILE
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise _in_use(self.path, _read_owner(owner_file)) from None
        owner = _read_owner(owner_file)
        if _lives_elsewhere(owner, self.path):  # a file system whose locks do not reach other machines
            self._lock.release()
            raise _in_use(self.path, owner)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": boot_id()}
        with _writing(owner_file):
            durable.write_json(owner_file, owner)

    def _release(self) -> None:
        if self._lock.is_locked:
            (self.path / OWNER_FILE).unlink(missing_ok=True)
            self._lock.release()

    def _begin(self, join: bool) -> None:
        """Write what a run starts with."""
        checkpoints.remove_stale_stages(self.path)
        if self.checkpoint is None and not join:
            self.write_config()
            self.truncate_logs(0, {})
            self.set_later_checkpoints_aside(-1)
        self.status(
            state="starting",
            pid=os.getpid(),
            host=socket.gethostname(),
            started=time.time(),
            step=self.checkpoint.step if self.checkpoint else 0,
        )


def check_target(
    path: str | Path,
    *,
    resume: str | Path | bool | None = None,
    overwrite: bool = False,
    new_run: bool = False,
    join: bool = False,
) -> None:
    """Whether a run may use this directory; reads only. Raises ConfigError (exit code 2) if not,
    ResourceError (4) when another process trains there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", where="output_dir", expected="a directory")
    if resume and not _is_auto(resume) and not Path(str(resume)).is_dir():
        raise ConfigError(
            f"there is no checkpoint {Path(str(resume)).absolute()}",
            where="resume_from_checkpoint",
            expected="auto, or the path of a checkpoint-N directory",
            fix=f"checkpoints here: {_names(path)}",
        )
    if new_run and not _is_auto(resume) or not is_occupied(path):
        return
    _check_not_in_use(path)
    if _continues(path, resume) or overwrite or join:
        return
    raise ConfigError(
        f"{path} contains {_describe(path)}",
        where="output_dir",
        expected="an empty or new directory",
        fix="use resume_from_checkpoint: auto, new_run: true or overwrite_output_dir: true",
    )


def _check_not_in_use(path: Path) -> None:
    """Say it at once, not after the model was loaded. Raises ResourceError with the owner."""
    owner = _read_owner(path / OWNER_FILE)
    if owner.get("host") != socket.gethostname() or not durable.process_alive(int(owner.get("pid", 0))):
        return
    lock = FileLock(path / LOCK_FILE)  # what decides: the number may be another process's by now
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(path, owner) from None
    lock.release()


def is_occupied(path: Path) -> bool:
    """Whether there is anything but hidden files and logs."""
    if not path.is_dir():
        return False
    return any(not entry.name.startswith(".") and entry.name != "logs" for entry in path.iterdir())


def read_status(path: str | Path) -> dict[str, Any]:
    """status.json of any run, with the state corrected to "killed" when its process is gone."""
    path = Path(path)
    try:
        status = durable.read_json(path / STATUS_FILE)
    except (OSError, ValueError):
        return {"state": "unknown"}
    if status.get("state") in ("starting", "running", "stalled"):
        here = status.get("host") == socket.gethostname()
        alive = durable.process_alive(int(status.get("pid", -1))) if here else not _lost(status)
        if not alive:
            status["state"] = "killed"
    return status


def read_metrics(path: str | Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; a torn last line is left out."""
    return [json.loads(line) for line in _lines(Path(path) / name)]


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON values, without tokens, keys and passwords."""
    endings = ("_token", "api_key", "password", "_secret")
    public = {key: value for key, value in config.items() if not key.endswith(endings)}
    return json.loads(json.dumps(public, default=str))


def boot_id() -> str:
    """This machine's current boot, so that a pid from before a reboot is not believed."""
    return str(int(psutil.boot_time()) // 10 * 10)


def _is_auto(resume: str | Path | bool | None) -> bool:
    return resume is True or str(resume).lower() in ("auto", "true")


def _continues(path: Path, resume: str | Path | bool | None) -> bool:
    """Whether this would go on with the run that is in `path`."""
    if not resume or _is_auto(resume):
        return bool(resume)
    return Path(str(resume)).resolve().parent == path.resolve()


def _holds_results(path: Path) -> bool:
    """Whether a fresh start here would overwrite a model or strand checkpoints."""
    return bool(list(path.glob("*.safetensors")) or checkpoints.checkpoints(path))


def _find_checkpoint(path: Path, resume: str | Path | bool | None) -> Checkpoint | None:
    if not resume:
        return None
    if _is_auto(resume):
        return checkpoints.newest_valid(path)
    found = checkpoints.verify(Path(str(resume)))
    if not found.resumable:
        raise CorruptStateError(
            "this checkpoint holds only the model (save_only_model)",
            where=str(found.path),
            fix="give it as adapter_name_or_path or model_name_or_path instead",
        )
    return found


def _check_config(found: Checkpoint, config: Mapping[str, Any], allow: Collection[str]) -> None:
    stored = durable.read_json(found.path / checkpoints.STATE_FILE)["config"]
    check_resumable(stored, config, allow, where=str(found.path))


def _make(path: Path) -> bool:
    """Make the directory and try to write there. Returns whether it was not there before."""
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.tmp-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(
            f"the directory cannot be written: {error.strerror or error}",
            where=str(path),
            fix="choose another output_dir",
        ) from error
    return made


def _move_aside(path: Path, why: str) -> None:
    lock = FileLock(path / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(path, _read_owner(path / OWNER_FILE)) from None
    lock.release()  # Windows renames no directory with an open file in it
    _log.warning(
        "%s: the earlier contents of %s are now in %s",
        why,
        path,
        checkpoints.set_aside(path),
    )


def _first_free(path: Path) -> Path:
    number, free = 1, path
    while is_occupied(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    if free != path:
        _log.warning("new_run: this run is written to %s", free)
    return free


def _describe(path: Path) -> str:
    if not (path / RUN_FILE).exists() and not checkpoints.checkpoints(path):
        return f"files that are no run of trueup ({_names(path)})"
    status = read_status(path)
    step = status.get("step", max([0, *map(checkpoints.step_of, checkpoints.checkpoints(path))]))
    return f"run {path.name} at step {step} ({status['state']})"


def _names(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "none"


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        return dict(durable.read_json(path))
    except (OSError, ValueError):
        return {}


def _lives_elsewhere(owner: Mapping[str, Any], path: Path) -> bool:
    if not owner or owner.get("host") == socket.gethostname():
        return False  # on this machine the lock itself tells
    return not _lost(read_status(path))


def _lost(status: Mapping[str, Any]) -> bool:
    return time.time() - float(status.get("heartbeat", 0.0)) > _LOST_HEARTBEAT_SECONDS


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


def _in_use(path: Path, owner: Mapping[str, Any]) -> UserError:
    return ResourceError(
        f"another process trains in this directory: pid {owner.get('pid', 'unknown')} "
        f"on {owner.get('host', 'this machine')}",
        where=str(path),
        fix="wait for it, stop it, or choose another output_dir",
    )


def _lines(path: Path) -> list[str]:
    """Complete, parseable lines; whatever follows the last newline was torn by a crash."""
    if not path.exists():
        return []
    complete = path.read_bytes().rpartition(b"\n")[0]
    lines = complete.decode("utf-8", errors="replace").split("\n") if complete else []
    return [line for line in lines if _parses(line)]


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _step_in(line: str, key: str) -> int:
    return int(json.loads(line).get(key, 0))


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value
