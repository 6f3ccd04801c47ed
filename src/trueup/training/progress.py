"""What a person sees while it trains: a live display on a terminal, one plain line per log step
elsewhere.

Plain lines are ASCII, so that any terminal, pipe or log file takes them. NO_COLOR is rich's
business and obeyed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from trueup.training.events import (
    Ended,
    Evaluated,
    EvaluationProgress,
    Event,
    Logged,
    Observer,
    Saved,
    Started,
    Stepped,
)
from trueup.training.run_files import telling

#: What is shown of a row, in this order, under these names; the names of preference training in
#: full.
_SHOWN = (
    ("loss", "loss"),
    ("rewards/accuracies", "rewards/accuracies"),
    ("rewards/margins", "rewards/margins"),
    ("rewards/chosen", "rewards/chosen"),
    ("rewards/rejected", "rewards/rejected"),
    ("reward", "reward"),
    ("accuracy", "accuracy"),
    ("kl", "kl"),
    ("kl/chosen", "kl/chosen"),
    ("learning_rate", "lr"),
    ("tokens_per_second", "tok/s"),
    ("memory_gb", "GB"),
)
_SKIPPED_IN_EVALUATION = ("step", "epoch", "time", "eval_runtime", "eval_samples_per_second")


def number(value: Any) -> str:
    """A number in at most eight characters."""
    if not isinstance(value, int | float):
        return "-"
    if abs(value) >= 100_000:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(row: Mapping[str, Any]) -> list[str]:
    """`name value` of what a person wants to see of a training row."""
    row = telling(row)
    return [f"{label} {number(row[key])}" for key, label in _SHOWN if key in row]


def shown_evaluation(row: Mapping[str, Any]) -> list[str]:
    """`name value` of what a person wants to see of an evaluation row."""
    names = [name for name in telling(row) if name not in _SKIPPED_IN_EVALUATION]
    wanted = [n for n in names if n.endswith(("loss", "accuracies", "margins", "accuracy", "kl", "kl/chosen"))]
    return [f"{name} {number(row[name])}" for name in (wanted or names)[:6]]


class TimeLeft:
    """An estimate from the steps of this process."""

    def __init__(self, step: int, total_steps: int) -> None:
        self.first, self.total = step, total_steps
        self.begun = time.monotonic()

    def __call__(self, step: int) -> str:
        done = step - self.first
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self.begun) / done * (self.total - step)
        return str(timedelta(seconds=round(seconds)))


class PlainLines:
    """One line per logged row, for pipes, files and terminals that cannot do more."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.left = TimeLeft(0, 0)

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self.left = TimeLeft(event.step, event.total_steps)
                begins = f"resuming after step {event.step}" if event.step else "training"
                self._say(f"{begins}: {event.total_steps} steps -> {event.directory}")
            case Logged():
                head = f"step {event.step}/{self.left.total} | epoch {number(event.row['epoch'])}"
                self._say(" | ".join([head, *shown(event.row), f"left {self.left(event.step)}"]))
            case Evaluated():
                best = ["best so far"] if event.improved else []
                facts = [f"evaluation at step {event.step}", *shown_evaluation(event.row), *best]
                self._say(" | ".join(facts))
            case Saved():
                self._say(f"saved {event.path.name}")
            case Ended():
                self._say(f"{event.state} at step {event.step}/{event.total_steps}")
            case _:
                pass

    def _say(self, line: str) -> None:
        encoding = self.stream.encoding or "ascii"
        print(line.encode(encoding, "replace").decode(encoding), file=self.stream, flush=True)


class LiveDisplay:
    """A bar with the newest numbers below it; evaluations and checkpoints scroll by above. Fits 80
    columns.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            expand=True,
        )
        self.task = self.bar.add_task("train", total=None, left="?")
        self.left = TimeLeft(0, 0)
        self.live = Live(self.bar, console=self.console, refresh_per_second=4)

    def observe(self, event: Event) -> None:
        match event:
            case Started():
                self.left = TimeLeft(event.step, event.total_steps)
                self.bar.update(self.task, total=event.total_steps, completed=event.step)
                self.live.start()
            case Stepped():
                left = self.left(event.step)
                self.bar.update(self.task, completed=event.step, left=left, description="train")
            case EvaluationProgress():
                self.bar.update(self.task, description="evaluate")
            case Logged():
                numbers = [Text(fact) for fact in shown(event.row)]
                self.live.update(Group(self.bar, Columns(numbers, padding=(0, 3))))
            case Evaluated():
                best = ["best so far"] if event.improved else []
                facts = [f"step {event.step}", *shown_evaluation(event.row), *best]
                self.console.print(Text("   ".join(facts), style="cyan"))
            case Saved():
                self.console.print(Text(f"saved {event.path.name}", style="dim"))
            case Ended():
                self.bar.update(self.task, description=event.state)
                self.live.stop()


def make_display(quiet: bool = False, plain: bool = False) -> list[Observer]:
    """The display that fits where standard output goes; none when quiet."""
    if quiet:
        return []
    if sys.stdout.isatty() and not plain:
        return [LiveDisplay()]
    return [PlainLines()]
