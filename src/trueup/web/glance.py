"""Every run of a workspace at a glance: a row each, cheap enough to be made every other second. Torch-free."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trueup.errors import ConfigError
from trueup.inference.runs import run_directories
from trueup.training.run_files import METRICS_FILE, RUN_FILE, telling
from trueup.web import series
from trueup.web.compare import JUDGED_BY, read_config
from trueup.web.jobs import Jobs, RunState
from trueup.web.remarks import Remarks, read_remarks
from trueup.web.workspace import check_id

log = logging.getLogger("trueup")
#: Columns of the table of runs, beside those by which runs are judged.
SHOWN = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "kl",
    "kl/chosen",
    "eval_loss",
    "eval_rewards/accuracies",
    "reward",
)
_METRICS = tuple(dict.fromkeys((*SHOWN, *(metric for metric, _ in JUDGED_BY))))


@dataclass(frozen=True)
class Glance:
    """One run. `touched`: seconds since the epoch at its last sign of life."""

    id: str
    state: RunState
    stage: str
    model: str
    touched: float
    metrics: dict[str, float]
    remarks: Remarks


def glances(jobs: Jobs) -> list[Glance]:
    """All runs, latest first."""
    saves = jobs.workspace.root / "saves"
    if not saves.is_dir():
        return []
    names = [path.relative_to(saves).as_posix() for path in run_directories(saves) if path != saves]
    found = [glance(jobs, name) for name in names if _can_be_asked_for(name)]
    return sorted(found, key=lambda one: one.touched, reverse=True)


def newest_result(jobs: Jobs) -> str | None:
    """The run with a model that ended last: what somebody who comes without one in mind most likely means."""
    return next((one.id for one in glances(jobs) if not one.state.alive and jobs.workspace.has_model(one.id)), None)


def glance(jobs: Jobs, run_id: str) -> Glance:
    """One run as it stands now."""
    path = jobs.workspace.run(run_id)
    state = jobs.state(run_id)
    stage, model = _what(path, _stamp(path / RUN_FILE))
    metrics = _latest(path, _stamp(path / METRICS_FILE))
    touched = float(state.status.get("heartbeat") or _stamp(path / METRICS_FILE)[0] or path.stat().st_mtime)
    return Glance(run_id, state, stage, model, touched, metrics, read_remarks(path))


@lru_cache(maxsize=2048)
def _can_be_asked_for(name: str) -> bool:
    """Whether an address can have a run's name; said once for each that was given in a shell and cannot."""
    try:
        check_id(name)
    except ConfigError:
        log.warning("saves/%r is not shown: rename it to letters, digits and -_. to see it", name)
        return False
    return True


def _stamp(file: Path) -> tuple[float, int]:
    """What changes when a file does."""
    try:
        found = file.stat()
    except OSError:
        return 0.0, -1
    return found.st_mtime, found.st_size


@lru_cache(maxsize=2048)
def _what(path: Path, stamp: tuple[float, int]) -> tuple[str, str]:
    """A run's stage and model; `stamp` makes it read again what has changed."""
    config = read_config(path)
    return str(config.get("stage") or ""), str(config.get("model_name_or_path") or "")


@lru_cache(maxsize=2048)
def _latest(path: Path, stamp: tuple[float, int]) -> dict[str, float]:
    table = series.read(path)
    return telling({name: value for name in _METRICS if (value := table.last(name)) is not None})
