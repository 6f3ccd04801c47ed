"""Which charts the page of a run shows, and with which of its numbers. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trueup.web import charts
from trueup.web.series import AXIS_COLUMNS, Table

_COMPONENT = re.compile(r"rewards/(?P<name>.+)/mean")
_HIDDEN = {*AXIS_COLUMNS, "seconds"}


@dataclass(frozen=True)
class Plot:
    """A chart: its key (a word of words/live.json, or a metric's name), and its metrics by their curves' names."""

    key: str
    metrics: dict[str, str]
    positive: bool = False  # may have a logarithmic axis


PLOTS = (
    Plot("loss", {"train": "loss", "eval": "eval_loss"}, positive=True),
    Plot("rewards", {
        "chosen": "rewards/chosen", "rejected": "rewards/rejected", "reward": "reward", "eval": "eval_reward",
    }),
    Plot("accuracy", {"train": "rewards/accuracies", "eval": "eval_rewards/accuracies"}),
    Plot("margin", {"train": "rewards/margins", "eval": "eval_rewards/margins"}),
    Plot("kl", {"kl": "kl", "chosen": "kl/chosen", "rejected": "kl/rejected"}, positive=True),
    Plot("logps", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    Plot("entropy", {"entropy": "entropy"}),
    Plot("lengths", {"mean": "completions/mean_length", "max": "completions/max_length",
                     "chosen": "completions/chosen_length", "rejected": "completions/rejected_length"}),
    Plot("grad_norm", {"grad_norm": "grad_norm"}, positive=True),
    Plot("learning_rate", {"learning_rate": "learning_rate"}),
    Plot("speed", {"tokens": "tokens_per_second"}),
    Plot("memory", {"memory": "memory_gb"}),
)  # fmt: skip
_PLACED = {metric for plot in PLOTS for metric in plot.metrics.values()}


@dataclass(frozen=True)
class Look:
    """How curves are looked at: `x` as series.py has it, `span` as shares of it from 0 to 1."""

    x: str = "step"
    smoothing: float = 0.0
    log: bool = False
    span: tuple[float, float] = (0.0, 1.0)


def front(table: Table) -> list[Plot]:
    """The charts that have something to show, first things first."""
    names = set(table.names)
    parts = {match["name"]: name for name in sorted(names) if (match := _COMPONENT.fullmatch(name))}
    found = [plot for plot in PLOTS if names & set(plot.metrics.values())]
    if len(parts) > 1:  # else it is the reward itself
        found.insert(2, Plot("components", parts))
    return found


def others(table: Table) -> list[Plot]:
    """A chart for each number that has no place in front."""
    names = [name for name in table.names if name not in _HIDDEN | _PLACED]
    held = {name.removeprefix("eval_") for name in names if name.startswith("eval_")}
    plain = [name for name in names if not (name.startswith("eval_") and name.removeprefix("eval_") in names)]
    return [
        Plot(name, {"train": name} | ({"eval": f"eval_{name}"} if name in held else {}))
        for name in sorted(plain)
        if not _COMPONENT.fullmatch(name)
    ]


def options(plot: Plot, table: Table, look: Look, say: Callable[[str], str | None]) -> dict[str, Any] | None:
    """ECharts options; None if there is nothing to draw. `say` finds a word of words/live.json."""
    low, high = table.extent(look.x)
    span = None
    if look.span != (0.0, 1.0):
        span = low + look.span[0] * (high - low), low + look.span[1] * (high - low)
    curves: list[charts.Line] = []
    for name, metric in plot.metrics.items():
        evaluated = metric.startswith("eval_")
        smoothing = 0.0 if evaluated else look.smoothing
        if points := table.curve(metric, x=look.x, smoothing=smoothing, span=span):
            raw = table.curve(metric, x=look.x, span=span) if smoothing else None
            shown = say(f"curve_{name}") or name
            curves.append(charts.Line(shown, points, colour=len(curves), raw=raw, dashed=evaluated, dots=evaluated))
    if not curves:
        return None
    log = look.log and plot.positive and _positive([*(c.points for c in curves), *(c.raw or () for c in curves)])
    kind = "seconds" if look.x == "time" else "number"
    return charts.lines(curves, x_label=say(f"x_{look.x}") or look.x, log=log, x_kind=kind)


def _positive(found: Sequence[charts.Points]) -> bool:
    return all(np.asarray(points)[:, 1].min() > 0 for points in found if len(points))
