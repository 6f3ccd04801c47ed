"""The report of an evaluation as one page of HTML, pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from trueup.data.page import page
from trueup.recipes.evaluation.intervals import Estimate
from trueup.recipes.evaluation.report import INTERVALS, EvaluationReport, Measured, label_of

_COLOURS = ["#2457a6", "#d9622b", "#2a8c5a", "#8a4fb0", "#b08a1e", "#4a4f57"]
_MOST_GROUPS = 40
_STYLE = """
img { max-width: 100%; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; }
"""


def report_page(report: EvaluationReport) -> str:
    """The page: facts, tables, pictures."""
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in report.facts())
    tables = "".join(f"<h2>{escape(title)}</h2>{_table(head, rows)}" for title, head, rows in report.tables())
    pictures = "".join(
        f'<h3>{escape(title)}</h3><img alt="{escape(title)}" src="{data}">' for title, data in _pictures(report)
    )
    return page("Evaluation", f"<ul>{facts}</ul>{tables}<p class=soft>{escape(INTERVALS)}</p>{pictures}", _STYLE)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def _pictures(report: EvaluationReport) -> Iterator[tuple[str, str]]:
    """(title, PNG as a data URL) of what can be drawn."""
    models = report.models
    shares = [
        key for key in ("accuracy", "accuracy_equal_length", "longer_wins") if any(key in m.figures for m in models)
    ]
    if shares:
        yield (
            "Preferences",
            _bars({label_of(k): {m.name: m.figures[k] for m in models if k in m.figures} for k in shares}),
        )
    if any("margin" in model.rows for model in models):
        yield "Reward margins", _margins(models)
    groups = list(dict.fromkeys(name for model in models for name in model.groups))[:_MOST_GROUPS]
    if groups:
        yield "Accuracy by group", _bars({g: {m.name: m.groups[g] for m in models if g in m.groups} for g in groups})
    if report.duels:
        yield "Win rates", _bars({name: {name: duel["win_rate"]} for name, duel in report.duels.items()})


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(values: dict[str, dict[str, Estimate]]) -> str:
    """A line for each figure and model: the value, and its interval."""
    names = list(dict.fromkeys(name for of in values.values() for name in of))
    figure, axes = _figure(0.9 + 0.3 * sum(map(len, values.values())))
    place, ticks = 0.0, []
    for label, of in values.items():
        ticks.append((place + (len(of) - 1) / 2, label))
        for name, estimate in of.items():
            low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, alpha=0.5)
            axes.plot([estimate.value], [place], "o", color=colour, label=name if label == ticks[0][1] else None)
            place += 1.0
        place += 0.6
    axes.axvline(0.5, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.02, 1.02), yticks=[t for t, _ in ticks], yticklabels=[label for _, label in ticks])
    axes.invert_yaxis()
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _url(figure)


def _margins(models: Sequence[Measured]) -> str:
    """How the margins of all pairs are spread; right of zero the model agrees with the data."""
    figure, axes = _figure(3.4)
    shown = [(model.name, model.rows["margin"]) for model in models if "margin" in model.rows]
    together = np.concatenate([values for _, values in shown])
    low, high = np.quantile(together, [0.01, 0.99]) if len(together) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    for i, (name, values) in enumerate(shown):
        axes.hist(np.clip(values, edges[0], edges[-1]), bins=list(edges), histtype="step", linewidth=1.6,
                  color=_COLOURS[i % len(_COLOURS)], label=name)  # fmt: skip
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set(xlabel="chosen reward less rejected reward", ylabel="pairs")
    axes.legend(frameon=False, fontsize=8)
    return _url(figure)


def _url(figure: Any) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
