"""Curves as pictures: one PNG per metric, raw and smoothed, with held-out values as points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueup.training import durable
from trueup.training.events import Ended, Event
from trueup.training.run_directory import RunDirectory, read_metrics

_TITLES = {
    "loss": "Training loss",
    "rewards/accuracies": "How often the chosen answer has the higher reward",
    "rewards/margins": "Reward margin: chosen minus rejected",
    "rewards/chosen": "Reward of the chosen answers",
    "rewards/rejected": "Reward of the rejected answers",
    "reward": "Reward",
    "kl": "KL to the reference, all answers",
    "kl/chosen": "KL to the reference, chosen answers",
    "accuracy": "Accuracy",
    "margin": "Reward margin: better minus worse",
    "mean_reward": "Mean reward",
}
_RAW, _SMOOTH, _HELD_OUT = "#b9c7dd", "#2457a6", "#d9622b"


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the points, without the pull of its start at
    zero.
    """
    decay = 1.0 - 2.0 / (max(3.0, len(values) / 10) + 1.0)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        result.append(mean / weight)
    return result


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the metric."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def write_plots(rows: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Draw every known metric that the rows have, as `training_<name>.png`."""
    written = []
    for name, title in _TITLES.items():
        held_out = sorted({key for row in rows for key in row if _is_held_out(key, name)})
        if series(rows, name)[0]:
            written.append(_draw(rows, name, held_out, title, directory))
        for key in held_out:
            held_title = f"{title} (held out)"
            written.append(_draw(rows, key, [], held_title.replace("Training", "Held-out"), directory))
    return written


class Plots:
    """Draws the curves when the run is over, however it ended."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def observe(self, event: Event) -> None:
        if isinstance(event, Ended) and event.state != "aborted":
            write_plots(read_metrics(self.run.path), self.run.path)


def _is_held_out(key: str, name: str) -> bool:
    return key.startswith("eval_") and (key == f"eval_{name}" or key.endswith(f"_{name}"))


def _draw(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    held_out: Sequence[str],
    title: str,
    directory: Path,
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s that no first step should wait for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    steps, values = series(rows, name)
    if name.startswith("eval_"):
        axes.plot(steps, values, "-o", color=_HELD_OUT, markersize=4, linewidth=1.5)
    else:
        axes.plot(steps, values, color=_RAW, linewidth=1.0, label="as logged")
        axes.plot(steps, smooth(values), color=_SMOOTH, linewidth=2.0, label="smoothed")
    for key in held_out:
        axes.plot(*series(rows, key), "o--", color=_HELD_OUT, markersize=4, linewidth=1, label=key)
    if "margins" in name or name in ("rewards/chosen", "rewards/rejected"):
        axes.axhline(0.0, color="#888888", linewidth=0.8)
    if name.endswith("accuracies"):
        axes.axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.02, 1.02)
    axes.set(title=title, xlabel="step", ylabel=name)
    axes.title.set_fontsize(11)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not name.startswith("eval_"):
        axes.legend(frameon=False, fontsize=9)
    path = directory / f"training_{name.replace('/', '_')}.png"
    stage = path.with_name(f".{path.name}.tmp-0")
    FigureCanvasAgg(figure).print_png(str(stage))
    durable.replace(stage, path)
    return path
