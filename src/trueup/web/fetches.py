"""Datasets on their way from a hub: `trueup data get` as a process of its own, watched through its files. Torch-free.

`.trueup/fetch/NAME/` holds `job.json` (the process), `result.json` (what it said at its end) and `log` (its bars).
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from trueup.data.catalog import CATALOG
from trueup.errors import ConfigError, Problem
from trueup.training import durable
from trueup.training.run_lock import is_alive, this_process
from trueup.web.jobs import command, environment, tail
from trueup.web.workspace import Workspace

_PERCENT = re.compile(r"([^\r\n]*?):?\s+(\d{1,3})%\|[^|]*\|\s*([^\r\n\[]*)")


@dataclass(frozen=True, slots=True)
class Fetch:
    """How a dataset's coming stands: running, done or failed. `share`: of the file that is coming now, if known."""

    state: str
    share: float | None = None
    said: str = ""
    problems: list[Problem] = field(default_factory=list)


def start(place: Workspace, name: str) -> bool:
    """Begin to fetch a well-known set; whether this call began it. Raises ConfigError for other names."""
    folder = _folder(place, name)
    with FileLock(place.private() / "fetch.lock", timeout=30):
        now = state(place, name)
        if now and now.state == "running":
            return False
        (folder / "result.json").unlink(missing_ok=True)
        with open(folder / "log", "wb") as log, open(folder / "result.json", "wb") as result:
            process = subprocess.Popen(
                command(["data", "get", name, "--json"]), cwd=place.root, env=environment(), stdin=subprocess.DEVNULL,
                stdout=result, stderr=log, start_new_session=True, close_fds=True,
            )  # fmt: skip
        created = psutil.Process(process.pid).create_time()
        job = {"started": time.time(), "created": created, **this_process(), "pid": process.pid}
        durable.write_json(folder / "job.json", job, sync=False)
        threading.Thread(target=process.wait, name="trueup-reaper", daemon=True).start()
    return True


def state(place: Workspace, name: str) -> Fetch | None:
    """How it stands; None if nobody has asked for it."""
    folder = _folder(place, name, make=False)
    job = _read(folder / "job.json")
    if not job:
        return None
    if _lives(job):
        share, said = progress(tail(folder / "log"))
        return Fetch("running", share, said)
    result = _read(folder / "result.json")
    if result.get("ok"):
        return Fetch("done")
    problems = [Problem(**problem) for problem in result.get("problems", [])]
    return Fetch("failed", problems=problems or [Problem("the process ended before the data were here")])


def stop(place: Workspace, name: str) -> None:
    """End it. What has come so far is there for the next time."""
    job = _read(_folder(place, name, make=False) / "job.json")
    if job and _lives(job):
        psutil.Process(int(job["pid"])).terminate()


def progress(log: str) -> tuple[float | None, str]:
    """The last bar that a log shows: its share, and its words."""
    found = _PERCENT.findall(log)
    if not found:
        return None, ""
    what, percent, amount = found[-1]
    return min(int(percent), 100) / 100, f"{what.strip()} {amount.strip()}".strip()


def _folder(place: Workspace, name: str, make: bool = True) -> Path:
    if name not in CATALOG:
        raise ConfigError(f"{name[:80]!r} is no well-known dataset", expected="a name of the catalogue")
    return place.private("fetch", name) if make else place.root / ".trueup" / "fetch" / name


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _lives(job: dict[str, Any]) -> bool:
    try:
        return is_alive(job) and abs(psutil.Process(int(job["pid"])).create_time() - float(job["created"])) < 1.0
    except psutil.NoSuchProcess:
        return False
