"""`trueup runs`: every run under a directory, from the files it wrote. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trueup.errors import ConfigError
from trueup.training.run_directory import (
    RUN_FILE,
    STATUS_FILE,
    TRAINER_LOG_FILE,
    read_metrics,
    read_status,
)
from trueup.training.run_files import telling

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

#: Column → metric, for the one-line view; the rest is in metrics.jsonl.
HEADLINES = {
    "loss": "loss",
    "acc": "rewards/accuracies",
    "margin": "rewards/margins",
    "kl": "kl",
    "kl/chosen": "kl/chosen",
    "eval loss": "eval_loss",
    "eval acc": "eval_rewards/accuracies",
}
_COLOURS = {"finished": "green", "running": "cyan", "starting": "cyan", "stopped": "yellow"}
_DEEPEST = 6  # directories below the one asked for
_UNLIMITED = 10_000  # columns


@dataclass(frozen=True)
class Run:
    """One run directory at a glance."""

    path: Path
    state: str  # "finished", "running", "stopped", "failed", "died" (no process, no farewell) …
    stage: str
    model: str
    step: int
    total_steps: int | None
    touched: float  # seconds since the epoch: when it last gave a sign of life
    metrics: dict[str, float] = field(default_factory=dict)
    message: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path)}


def find_runs(directory: Path) -> list[Run]:
    """All runs under `directory`, latest first. ConfigError if there is no such directory."""
    if not directory.is_dir():
        raise ConfigError(
            f"there is no directory {directory}",
            where="runs",
            fix="name the directory that holds your runs, or one run: trueup runs DIRECTORY",
        )
    found = [read_run(path) for path in run_directories(directory)]
    return sorted(found, key=lambda run: run.touched, reverse=True)


def read_run(path: Path) -> Run:
    """What the files of one run say; missing or torn files make fields empty, not errors."""
    status = read_status(path)
    config = _read_yaml(path / RUN_FILE)
    state = status["state"]
    return Run(
        path=path,
        state="died" if state == "killed" else state,
        stage=str(config.get("stage", "")),
        model=str(config.get("model_name_or_path", "")),
        step=int(status.get("step") or 0),
        total_steps=status.get("total_steps"),
        touched=float(status.get("heartbeat") or _newest(path)),
        metrics=_latest_metrics(path),
        message=status.get("message"),
    )


@dataclass(frozen=True)
class RunList:
    """Runs on a terminal, with paths relative to `directory`: a line for each where all of it fits,
    else a few lines.
    """

    runs: Sequence[Run]
    directory: Path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not self.runs:
            yield f"no runs under {self.directory}"
            return
        table = self._table()
        unlimited = options.update(max_width=_UNLIMITED)
        if console.measure(table, options=unlimited).maximum <= options.max_width:
            yield table
        else:
            yield from self._blocks()

    def _table(self) -> Table:
        from rich.table import Table

        shown = [name for name, metric in HEADLINES.items() if any(metric in run.metrics for run in self.runs)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("run", "state", "stage", "model"):
            table.add_column(name, no_wrap=True)
        for name in ("step", *shown, "age"):
            table.add_column(name, justify="right", no_wrap=True)
        for run in self.runs:
            numbers = (_number(run.metrics.get(HEADLINES[name])) for name in shown)
            row = (self._name(run), _state(run), run.stage, Path(run.model).name, _progress(run), *numbers, _age(run))
            table.add_row(*row)
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        for run in self.runs:
            yield Text(self._name(run), style="bold")
            what = [f"{run.stage} of {Path(run.model).name}"] if run.stage and run.model else []
            facts = [*what, f"step {_progress(run)}", f"{_age(run)} ago"]
            yield Padding(Text(", ").join([_state(run), *map(Text, facts)]), (0, 0, 0, 2))
            numbers = [f"{name} {_number(run.metrics[key])}" for name, key in HEADLINES.items() if key in run.metrics]
            if numbers:
                yield Padding(Text(", ".join(numbers)), (0, 0, 0, 2))

    def _name(self, run: Run) -> str:
        name = os.path.relpath(run.path, self.directory)
        return str(run.path) if name == os.curdir else name


def _state(run: Run) -> Text:
    from rich.text import Text

    return Text(run.state, style=_COLOURS.get(run.state, "red"))


def _progress(run: Run) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _age(run: Run) -> str:
    return age(time.time() - run.touched)


def age(seconds: float) -> str:
    """A duration in its largest unit: `42s`, `3m`, `5h`, `2d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def run_directories(directory: Path) -> Iterator[Path]:
    """Directories with a run's files. What is inside a run (checkpoints, logs) is not searched."""
    base = len(directory.parts)
    for folder, children, files in os.walk(directory):
        path = Path(folder)
        if STATUS_FILE in files or TRAINER_LOG_FILE in files:
            children.clear()
            yield path
        children[:] = [c for c in children if not c.startswith(".") and len(path.parts) - base < _DEEPEST]


def _latest_metrics(path: Path) -> dict[str, float]:
    """The last value of each headline metric; training and evaluation write separate rows."""
    latest: dict[str, float] = {}
    for row in read_metrics(path) or read_metrics(path, TRAINER_LOG_FILE):
        latest |= {name: row[name] for name in HEADLINES.values() if isinstance(row.get(name), int | float)}
    return telling(latest)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _newest(path: Path) -> float:
    return max((entry.stat().st_mtime for entry in path.iterdir()), default=0.0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
