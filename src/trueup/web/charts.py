"""How every chart of the studio looks: colours, fonts, axes and numbers, in one place.

Drawn as SVG with the page's own CSS variables, so that a chart follows the theme without being drawn again. The
colours are Okabe and Ito's, told apart by people who do not see red and green.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

#: CSS variables of static/studio.css, which has a value for each theme.
COLOURS = tuple(f"var(--series-{number})" for number in range(1, 9))
_INK, _QUIET, _LINE = "var(--ink-2)", "var(--ink-3)", "var(--grid)"
_FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
_NAMES_WIDTH = 148  # of the names at the side of lying figures
Points = Sequence[Sequence[float]]

#: a number in few characters; JavaScript that ECharts calls, the same everywhere. No user text gets in.
_SHORT = (
    "v => { const a = Math.abs(v); return a === 0 ? '0' : a >= 1e12 || a < 1e-3 ? "
    "(+v.toPrecision(4)).toExponential().replace('e+', 'e') : a >= 1e9 ? +(v/1e9).toPrecision(3) + 'G' "
    ": a >= 1e6 ? +(v/1e6).toPrecision(3) + 'M' : a >= 1e4 ? +(v/1e3).toPrecision(3) + 'k' "
    ": +v.toPrecision(4) + '' }"
)
_SECONDS = (
    "v => v >= 3600 ? +(v/3600).toPrecision(3) + ' h' : v >= 60 ? +(v/60).toPrecision(3) + ' min' "
    ": Math.round(v) + ' s'"
)


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, its points, its colour's number; `raw` is drawn faintly behind it."""

    name: str
    points: Points
    colour: int = 0
    raw: Points | None = None
    dashed: bool = False
    dots: bool = False


def lines(
    curves: Sequence[Line], *, x_label: str = "", y_label: str = "", log: bool = False, x_kind: str = "number",
    zoom: bool = True, y_range: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:  # fmt: skip
    """ECharts options of curves over steps, tokens or time (`x_kind="seconds"`)."""
    series: list[dict[str, Any]] = []
    for curve in curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        if curve.raw is not None:
            series.append(_line("", curve.raw, colour, width=1, opacity=0.25, silent=True))
        series.append(_line(curve.name, curve.points, colour, dashed=curve.dashed, dots=curve.dots))
    several = sum(bool(one["name"]) for one in series) > 1
    low, high = y_range
    return {
        **_base(),
        "grid": _grid(top=34 if several else 16, bottom=26 if x_label else 8),
        "legend": _legend([one["name"] for one in series if one["name"]]) if several else {"show": False},
        "tooltip": {**_tooltip("axis"), ":valueFormatter": _SHORT},
        "xAxis": {
            **_axis(x_label, _SECONDS if x_kind == "seconds" else _SHORT), "type": "value", "min": _begin(curves),
            "max": "dataMax", "nameLocation": "middle", "nameGap": 26, "splitLine": {"show": False},
        },
        "yAxis": {
            **_axis(y_label, _SHORT), "type": "log" if log else "value", "scale": True, "min": low, "max": high,
            "axisLine": {"show": False}, "axisTick": {"show": False},
        },
        "dataZoom": [{"type": "inside", "filterMode": "none", "zoomOnMouseWheel": "shift"}] if zoom else [],
        "series": series,
    }  # fmt: skip


def bars(
    names: Sequence[str], values: Sequence[float], *, x_label: str = "", y_label: str = "", colour: int = 0
) -> dict[str, Any]:
    """ECharts options of a histogram, or of a few figures side by side."""
    return {
        **_base(),
        "grid": _grid(top=14, bottom=26 if x_label else 8),
        "tooltip": {**_tooltip("axis"), "axisPointer": {"type": "shadow"}, ":valueFormatter": _SHORT},
        "xAxis": {
            **_axis(x_label, None), "type": "category", "data": list(names), "nameLocation": "middle", "nameGap": 26,
        },
        "yAxis": {
            **_axis(y_label, _SHORT), "type": "value", "axisLine": {"show": False}, "axisTick": {"show": False},
        },
        "series": [
            {
                "type": "bar", "data": list(values), "barCategoryGap": "12%",
                "itemStyle": {"color": COLOURS[colour % len(COLOURS)], "borderRadius": [3, 3, 0, 0]},
            }
        ],
    }  # fmt: skip


def histogram(
    series: Sequence[tuple[str, Sequence[float], int]], *, width: int, last_is_open: bool, x_label: str,
    limit: tuple[int, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """ECharts options of counts in bins of one width, laid over each other: (name, counts, colour's number).

    `limit`: a length that is marked, and what it is called.
    """
    bins = max(len(counts) for _, counts, _ in series)
    names = [f"{bin * width:,}" for bin in range(bins)]
    if last_is_open and names:
        names[-1] += "+"
    drawn: list[dict[str, Any]] = []
    for name, counts, number in series:
        colour = COLOURS[number % len(COLOURS)]
        drawn.append({
            "type": "bar", "name": name, "data": [float(count) for count in counts], "barGap": "-100%",
            "barCategoryGap": "6%", "color": colour,
            "itemStyle": {"color": colour, "opacity": 0.55 if len(series) > 1 else 0.9, "borderRadius": [2, 2, 0, 0]},
        })  # fmt: skip
    if limit and limit[0] < bins * width:
        drawn[0]["markLine"] = {
            "silent": True, "symbol": "none", "data": [{"xAxis": limit[0] // width}],
            "lineStyle": {"color": "var(--bad)", "type": "dashed", "width": 1.5},
            "label": {"formatter": limit[1], "color": "var(--bad)", "fontSize": 11, "position": "end", "distance": 4},
        }  # fmt: skip
    several = len(series) > 1
    return {
        **_base(),
        "grid": _grid(top=34 if several else 24 if "markLine" in drawn[0] else 14, bottom=26),
        "legend": _legend([name for name, _, _ in series]) if several else {"show": False},
        "tooltip": {**_tooltip("axis"), "axisPointer": {"type": "shadow"}, ":valueFormatter": _SHORT},
        "xAxis": {**_axis(x_label, None), "type": "category", "data": names, "nameLocation": "middle", "nameGap": 26},
        "yAxis": {
            **_axis("", _SHORT), "type": "value", "minInterval": 1, "axisLine": {"show": False},
            "axisTick": {"show": False},
        },
        "series": drawn,
    }  # fmt: skip


def intervals(
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    middle: float | None = None,
) -> dict[str, Any]:
    """ECharts options of figures with their intervals, lying: a row for each name and series.

    Args:
        series: by name, (value, low, high) for each of `names`.
        middle: a value that is marked.
    """
    count = len(series)
    group = count + (count > 1)  # an empty row between groups
    rows = [name if place == (count - 1) // 2 else "" for name in names for place in range(group)][
        : -1 if count > 1 else None
    ]
    drawn: list[dict[str, Any]] = []
    for place, (name, of) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        there = [(number * group + place, one) for number, one in enumerate(of) if one is not None]
        ends: list[Any] = [point for row, (_, low, high) in there for point in ([low, row], [high, row], ["-", "-"])]
        line = _line("", ends, colour, width=4, opacity=0.4, silent=True)
        dots = {"type": "scatter", "name": name, "data": [[one[0], row] for row, one in there], "symbolSize": 10,
                "itemStyle": {"color": colour}, "z": 3}  # fmt: skip
        drawn += [{**line, "showSymbol": False}, dots]
    names_axis = _axis("", None)
    names_axis["axisLabel"] = {
        **names_axis.get("axisLabel", {}), "interval": 0, "width": _NAMES_WIDTH - 12, "overflow": "break",
    }  # fmt: skip
    if middle is not None:
        drawn[0]["markLine"] = {
            "silent": True, "symbol": "none", "label": {"show": False}, "data": [{"xAxis": middle}],
            "lineStyle": {"color": _QUIET, "type": "dashed", "width": 1},
        }  # fmt: skip
    return {
        **_base(),
        "grid": {**_grid(top=34 if count > 1 else 14, bottom=28), "left": _NAMES_WIDTH, "containLabel": False},
        "legend": _legend(list(series)) if count > 1 else {"show": False},
        "tooltip": {"show": False},
        "xAxis": {**_axis("", _SHORT), "type": "value", "min": 0, "max": 1, "interval": 0.25},
        "yAxis": {
            **names_axis, "type": "category", "data": rows, "inverse": True, "axisTick": {"show": False},
            "axisLine": {"show": False}, "splitLine": {"show": False},
        },
        "series": drawn,
    }  # fmt: skip


def chart(options: dict[str, Any], label: str) -> ui.echart:
    """A chart on the page; `label` is what a screen reader says."""
    shown = ui.echart(options, renderer="svg").classes("chart")
    shown.props["role"], shown.props["aria-label"] = "img", label
    return shown


def update(shown: ui.echart, options: dict[str, Any]) -> None:
    """New options for a chart that is on the page; nothing is sent if they are the same."""
    if shown.options != options:
        shown.options.clear()
        shown.options.update(options)
        shown.update()


def _line(
    name: str, points: Points, colour: str, *, width: float = 1.6, opacity: float = 1.0, dashed: bool = False,
    dots: bool = False, silent: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "type": "line", "name": name, "data": [list(point) for point in points], "color": colour,
        "showSymbol": dots or len(points) == 1, "symbol": "circle", "symbolSize": 5, "silent": silent,
        "lineStyle": {"width": width, "opacity": opacity, "type": "dashed" if dashed else "solid", "color": colour},
        "itemStyle": {"color": colour}, "emphasis": {"disabled": True}, "z": 1 if silent else 2,
        **({"tooltip": {"show": False}} if silent else {}),
    }  # fmt: skip


def _begin(curves: Sequence[Line]) -> str | int:
    """Where the x axis begins: at its first value, or at 0 where that is the only one."""
    at = {curve.points[place][0] for curve in curves if curve.points for place in (0, -1)}
    return 0 if len(at) == 1 and min(at) > 0 else "dataMin"


def _base() -> dict[str, Any]:
    return {
        "animation": False,
        "textStyle": {"fontFamily": _FONT, "fontSize": 12, "color": _INK},
        "aria": {"show": False},
    }


def _grid(*, top: int, bottom: int) -> dict[str, Any]:
    return {"left": 8, "right": 18, "top": top, "bottom": bottom, "containLabel": True}


def _axis(name: str, formatter: str | None) -> dict[str, Any]:
    label: dict[str, Any] = {"color": _QUIET, "fontSize": 11, "hideOverlap": True}
    if formatter:
        label[":formatter"] = formatter
    return {
        "name": name, "nameTextStyle": {"color": _QUIET, "fontSize": 11}, "axisLabel": label,
        "axisLine": {"lineStyle": {"color": _LINE}}, "axisTick": {"lineStyle": {"color": _LINE}, "length": 4},
        "splitLine": {"lineStyle": {"color": _LINE}}, "splitNumber": 4,
    }  # fmt: skip


def _legend(names: list[str]) -> dict[str, Any]:
    return {
        "type": "scroll", "top": 0, "left": 4, "itemWidth": 14, "itemHeight": 3, "icon": "roundRect", "itemGap": 16,
        "textStyle": {"color": _INK, "fontSize": 12}, "data": names,
    }  # fmt: skip


def _tooltip(trigger: str) -> dict[str, Any]:
    """Styled by CSS, because it is HTML. Names in it are escaped by ECharts' own formatter."""
    return {"trigger": trigger, "className": "chart-tip", "confine": True, "renderMode": "html", "borderWidth": 0}
