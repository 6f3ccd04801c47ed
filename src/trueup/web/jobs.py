"""Trainings as processes of their own: started, watched, stopped and resumed through the files in their directories.

A child is the command line itself, in a session of its own: the server may end, the training goes on, and the next
server finds it by its files. What the studio knows beyond the run's own files is in `logs/` of the run, where a run
minds nobody: `studio.json` (the words, the process) and `studio.log` (what it printed). Torch-free.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from trueup.errors import ConfigError, ResourceError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.run_files import (
    RUN_FILE,
    UNFINISHED,
    holds_results,
    is_failed_attempt,
    is_occupied,
    read_status,
)
from trueup.training.run_lock import is_alive, this_process
from trueup.web.workspace import Workspace

RECORD, LOG = Path("logs/studio.json"), Path("logs/studio.log")
LIVING = ("preparing", *UNFINISHED)
_TAIL_BYTES = 64 * 2**10
_LET_GO_SECONDS = 5.0
_JSON_SECONDS = 600.0


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        state: preparing (its process lives, its training has not begun), starting, running, stalled, finished,
            stopped, failed, or unknown.
        reason: why it failed or stopped, in the program's words.
        resumable: whether it can go on; from `step` if there is a checkpoint.
        stopping: it lives, and has been asked to save and end.
        status: the run's status.json.
    """

    state: str
    reason: str = ""
    resumable: bool = False
    stopping: bool = False
    step: int = 0
    total_steps: int | None = None
    checkpoint: str | None = None
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.state in LIVING


class Jobs:
    """What runs in a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._asked: set[tuple[int, float]] = set()  # processes that were told to save and end

    # --- starting ----------------------------------------------------------------------------

    def start(self, words: Sequence[str], run_id: str) -> bool:
        """Run `trueup train` with these words, which name the run's directory as their output_dir.

        Returns:
            whether this call started it: of several that ask at the same time, one does.

        Raises:
            ConfigError: something else is in that directory.
        """
        path = self.workspace.run(run_id)
        with self._starting():
            if self.state(run_id).alive:
                return False
            if is_occupied(path) and not is_failed_attempt(path):
                raise ConfigError(
                    f"{run_id} holds a run already", where="output_dir", fix="choose another name, or resume that run"
                )
            self._spawn(["train", *words], path)
        return True

    def resume(self, run_id: str) -> bool:
        """Go on with a run, from its newest checkpoint; afresh if it has none. Returns as `start`."""
        path = self.workspace.run(run_id)
        with self._starting():
            if self.state(run_id).alive:
                return False
            if (path / RUN_FILE).is_file():
                config = (Path(self.workspace.output_dir(run_id)) / RUN_FILE).as_posix()
                words = ["train", config, "--resume_from_checkpoint", "auto"]
            else:  # it never came so far as to write its config
                words = self.record(run_id).get("words", [])
            if not words:
                raise ConfigError(f"{run_id} has no {RUN_FILE} to go on from")
            self._spawn(words, path, first=self.record(run_id).get("first"))
        return True

    def _starting(self) -> FileLock:
        return FileLock(self.workspace.private() / "start.lock", timeout=30)

    def _spawn(self, words: list[str], path: Path, first: list[str] | None = None) -> None:
        """`first`: the words that the run began with, if it is resumed."""
        (path / LOG).parent.mkdir(parents=True, exist_ok=True)
        with open(path / LOG, "ab") as log:
            process = subprocess.Popen(
                command(words), cwd=self.workspace.root, env=environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, close_fds=True,
            )  # fmt: skip
        record = {
            "words": words, "first": first or words, "started": time.time(), "created": created(process.pid),
            **this_process(), "pid": process.pid,
        }  # fmt: skip
        durable.write_json(path / RECORD, record, sync=False)
        threading.Thread(target=process.wait, name="trueup-reaper", daemon=True).start()

    # --- watching ----------------------------------------------------------------------------

    def record(self, run_id: str) -> dict[str, Any]:
        """What the studio wrote when it started a run; empty if it did not."""
        try:
            return durable.read_json(self.workspace.run(run_id) / RECORD)
        except (OSError, ValueError):
            return {}

    def state(self, run_id: str) -> RunState:
        """How a run stands, whoever started it."""
        path = self.workspace.run(run_id)
        record, status = self.record(run_id), read_status(path)
        living = lives(record)
        known = status["state"] != "unknown" and float(status.get("started", 0.0)) >= float(record.get("started", 0.0))
        if not known and living:
            return RunState("preparing", status=status, stopping=record.get("stop") == "save")
        if not known and record:
            return self._over(run_id, "failed", self._last_words(path), status)
        state = status["state"]
        if state == "killed":
            if record.get("stop") == "now":
                return self._over(run_id, "stopped", "", status)
            return self._over(run_id, "failed", "killed", status)
        if state in ("failed", "stopped"):
            return self._over(run_id, state, str(status.get("message") or ""), status)
        return self._at(status, state, stopping=state in LIVING and self._is_asked(record, status))

    def _is_asked(self, record: dict[str, Any], status: dict[str, Any]) -> bool:
        if lives(record):
            return record.get("stop") == "save"
        pid = int(status.get("pid") or 0)
        return bool(self._asked) and (pid, created(pid)) in self._asked

    def _over(self, run_id: str, state: str, reason: str, status: dict[str, Any]) -> RunState:
        found = checkpoints.checkpoints(self.workspace.run(run_id))
        newest = max(found, key=checkpoints.step_of).name if found else None
        return self._at(status, state, reason=reason, resumable=True, checkpoint=newest)

    def _at(self, status: dict[str, Any], state: str, **more: Any) -> RunState:
        return RunState(
            state, step=int(status.get("step") or 0), total_steps=status.get("total_steps"), status=status, **more
        )

    def _last_words(self, path: Path) -> str:
        """The error that a process left in its log."""
        lines = tail(path / LOG).splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(("error", "stopped"))]
        return "\n".join(lines[starts[-1] :] if starts else lines[-3:]).strip()

    def log(self, run_id: str, lines: int = 200) -> str:
        """The end of what a run printed."""
        return "\n".join(tail(self.workspace.run(run_id) / LOG).splitlines()[-lines:])

    # --- stopping ----------------------------------------------------------------------------

    def stop(self, run_id: str, *, save: bool) -> None:
        """Ask a run to save and end after its step, or end it at once. Nothing happens if it has ended, nor if it is
        asked to save once more: a second word would end it without.
        """
        with self._starting():  # two clicks are one word
            process = self._process(run_id)
            if process is None or (save and self.state(run_id).stopping):
                return
            if save:
                self._asked.add((process.pid, created(process.pid)))
            if record := self.record(run_id):
                stop = {**record, "stop": "save" if save else "now"}
                durable.write_json(self.workspace.run(run_id) / RECORD, stop, sync=False)
        try:
            process.send_signal(signal.SIGINT)
            if not save:
                threading.Thread(target=_end, args=(process,), name="trueup-end", daemon=True).start()
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise ResourceError(f"the process {process.pid} belongs to another user") from error

    def _process(self, run_id: str) -> psutil.Process | None:
        """The process to tell: ours, or whichever says that it trains there."""
        record, status = self.record(run_id), read_status(self.workspace.run(run_id))
        if lives(record):
            pid = int(record["pid"])
        elif status.get("state") in UNFINISHED and is_alive(status):
            pid = int(status["pid"])
        else:
            return None
        try:
            return psutil.Process(pid)
        except psutil.NoSuchProcess:
            return None

    # --- other verbs -------------------------------------------------------------------------

    async def run_json(self, words: Sequence[str], seconds: float = _JSON_SECONDS) -> dict[str, Any]:
        """Run a verb with `--json` and await what it says: `{"ok": …, "result": … | "problems": […], "notices": […]}`.

        Ends with the awaiting task, so that a page that is left stops what it asked for.
        """
        process = await asyncio.create_subprocess_exec(
            *command([*words, "--json"]), cwd=self.workspace.root, env=environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, limit=64 * 2**20,
        )  # fmt: skip
        try:
            out, _ = await asyncio.wait_for(process.communicate(), seconds)
            return json.loads(out)
        except (TimeoutError, ValueError):
            what = f"`trueup {words[0]}` gave no answer"
            return {"ok": False, "exit_code": process.returncode, "problems": [{"what": what}], "notices": []}
        finally:
            if process.returncode is None:
                process.kill()


def command(words: Sequence[str]) -> list[str]:
    """The program with these words."""
    return [sys.executable, "-m", "trueup", *words]


def environment() -> dict[str, str]:
    """What a child gets: ours, with plain text on its streams."""
    plain = {"NO_COLOR": "1", "COLUMNS": "110", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **plain}


def tail(path: Path, size: int = _TAIL_BYTES) -> str:
    """The last whole lines of a text file."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - size)
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if start else text


def can_restart(path: Path) -> bool:
    """Whether a directory holds nothing that a fresh start would lose."""
    return not holds_results(path)


def created(pid: int) -> float:
    """When a process began; 0 if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def lives(record: dict[str, Any]) -> bool:
    """Whether the very process of a record lives: its number may be another's by now."""
    if not record or not is_alive(record):
        return False
    return abs(created(int(record["pid"])) - float(record.get("created", 0.0))) < 1.0


def stop_process(pid: int) -> None:
    """Interrupt a process as Ctrl-C does, and end it if it does not heed that. Nothing happens if it is gone."""
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return
    threading.Thread(target=_end, args=(process,), name="trueup-end", daemon=True).start()


def _end(process: psutil.Process) -> None:
    """A second word, and then none."""
    try:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.wait(_LET_GO_SECONDS)
    except psutil.TimeoutExpired:
        for each in [*process.children(recursive=True), process]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return
