"""Evaluations and exports as processes of their own, watched through files, as trainings are (jobs.py).

What a chore makes is in a directory of its own, which is its id; what the studio knows beyond that is in
`.trueup/chores/VERB/ID/`: `record.json` (the words, the process) and `chore.log` (what it printed). What was made in a
shell is a chore, too, that has ended. Torch-free.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from trueup.errors import ConfigError
from trueup.training import durable
from trueup.training.run_lock import this_process
from trueup.web.jobs import command, created, environment, lives, stop_process, tail
from trueup.web.workspace import Workspace, inside

#: verb → the file that says that it has been done, and where such files are looked for.
RESULTS = {"eval": ("eval_report.json", "saves"), "export": ("export.json", "exports")}
_RECORD, _LOG = "record.json", "chore.log"
_PROGRESS = re.compile(r"^note: (?P<what>.+): (?P<done>[\d,]+) of (?P<total>[\d,]+) \w+, .*left")
_LINE_SECONDS = "2"  # between two lines of progress


@dataclass(frozen=True)
class Chore:
    """How a chore stands.

    Attributes:
        id: its directory, from the studio's. touched: when it began or ended.
        state: running, finished, stopped, failed.
        reason: why it failed, in the program's words.
        doing: what it is at, and which share of that is done.
    """

    id: str
    state: str
    touched: float
    reason: str = ""
    doing: str = ""
    share: float | None = None

    @property
    def alive(self) -> bool:
        return self.state == "running"


class Chores:
    """The chores of one verb in a workspace."""

    def __init__(self, workspace: Workspace, verb: str) -> None:
        self.workspace, self.verb = workspace, verb
        self.result, self.area = RESULTS[verb]

    def path(self, chore_id: str) -> Path:
        """Where a chore's result lies. Raises ConfigError for what is no place of such results."""
        area, _, rest = chore_id.partition("/")
        if area != self.area:
            raise ConfigError(f"{chore_id[:80]!r} is no result of `trueup {self.verb}`", expected=f"{self.area}/…")
        return inside(self.workspace.root / area, rest)

    def free(self, chore_id: str) -> str:
        """`chore_id`, or the first of `chore_id-2` … where nothing is and nothing was begun."""
        number, free = 1, chore_id
        while self.path(free).exists() or self._record(free):
            number += 1
            free = f"{chore_id}-{number}"
        return free

    def start(self, words: Sequence[str], chore_id: str) -> bool:
        """Run the verb with these words, which name the chore's directory; whether this call started it."""
        self.path(chore_id)
        with FileLock(self.workspace.private() / "start.lock", timeout=30):
            if lives(self._record(chore_id)):
                return False
            folder = self._folder(chore_id)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / _LOG, "wb") as log:
                process = subprocess.Popen(
                    command([self.verb, *words]), cwd=self.workspace.root, stdin=subprocess.DEVNULL, stdout=log,
                    env={**environment(), "TRUEUP_LINE_SECONDS": _LINE_SECONDS}, stderr=subprocess.STDOUT,
                    start_new_session=True, close_fds=True,
                )  # fmt: skip
            record = {"words": list(words), "started": time.time(), "created": created(process.pid)}
            durable.write_json(folder / _RECORD, {**record, **this_process(), "pid": process.pid}, sync=False)
            threading.Thread(target=process.wait, name="trueup-reaper", daemon=True).start()
        return True

    def stop(self, chore_id: str) -> None:
        """End it. Nothing happens if it has ended; an evaluation can be begun again, and goes on."""
        record = self._record(chore_id)
        if lives(record):
            durable.write_json(self._folder(chore_id) / _RECORD, {**record, "stop": True}, sync=False)
            stop_process(int(record["pid"]))

    def state(self, chore_id: str) -> Chore:
        """How it stands. Raises ConfigError if there is no such chore."""
        record, result = self._record(chore_id), self.path(chore_id) / self.result
        ended = result.stat().st_mtime if result.is_file() else 0.0
        if not record and not ended:
            raise ConfigError(f"there is no {chore_id}")
        begun = float(record.get("started", 0.0))
        if lives(record):
            return Chore(chore_id, "running", begun, **_progress(self.log(chore_id)))
        if ended >= begun:
            return Chore(chore_id, "finished", ended)
        if record.get("stop"):
            return Chore(chore_id, "stopped", begun)
        return Chore(chore_id, "failed", begun, _last_words(self.log(chore_id)))

    def all(self) -> list[Chore]:
        """Newest first."""
        begun = self.workspace.private("chores", self.verb)
        found = {path.parent.relative_to(begun).as_posix() for path in begun.rglob(_RECORD)}
        area = self.workspace.root / self.area
        found |= {f"{self.area}/{path.parent.relative_to(area).as_posix()}" for path in area.rglob(self.result)}
        chores = []
        for one in found:
            try:
                chores.append(self.state(one))
            except (ConfigError, OSError):
                continue
        return sorted(chores, key=lambda chore: -chore.touched)

    def words(self, chore_id: str) -> list[str]:
        """What it was started with here; empty if it was started elsewhere."""
        return [str(word) for word in self._record(chore_id).get("words", [])]

    def log(self, chore_id: str) -> str:
        """The end of what it printed."""
        return tail(self._folder(chore_id) / _LOG)

    def _folder(self, chore_id: str) -> Path:
        return inside(self.workspace.private("chores", self.verb), chore_id)

    def _record(self, chore_id: str) -> dict[str, Any]:
        try:
            return durable.read_json(self._folder(chore_id) / _RECORD)
        except (OSError, ValueError):
            return {}


def _progress(log: str) -> dict[str, Any]:
    """What the newest line of the log says that is being done."""
    lines = [line for line in log.splitlines() if line.startswith(("note: ", "warning: "))]
    if not lines:
        return {}
    if match := _PROGRESS.match(lines[-1]):
        done, total = (int(match[name].replace(",", "")) for name in ("done", "total"))
        return {"doing": lines[-1].removeprefix("note: "), "share": done / total if total else None}
    return {"doing": lines[-1].partition(": ")[2]}


def _last_words(log: str) -> str:
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(("error", "stopped"))]
    return "\n".join(lines[starts[-1] :] if starts else lines[-3:]).strip()
