"""Every run in one table; several of them beside each other, as curves and by what their configs differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from nicegui import run as background
from nicegui import ui
from nicegui.events import GenericEventArguments

from trueup.web import charts, series
from trueup.web.compare import best, differences, read_config
from trueup.web.frame import button, card, empty, heading, row
from trueup.web.glance import SHOWN, Glance, glances
from trueup.web.pages import page
from trueup.web.remarks import read_remarks, tidy, write_remarks
from trueup.web.view import View

REFRESH_SECONDS = 2.0
_BETWEEN = "|"  # of ids in an address: no id has it
_FIRST_METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "kl/chosen",
    "kl",
    "reward",
    "eval_loss",
    "eval_rewards/accuracies",
)
_AXES = ("step", "tokens", "time")
_NAME_CELL = """
<q-td :props="props" class="run-cell">
  <q-icon v-if="props.row.best" name="star" class="run-best" :aria-label="props.row.best">
    <q-tooltip>{{ props.row.best }}</q-tooltip>
  </q-icon>
  <a :href="props.row.address">{{ props.row.id }}</a>
  <span v-for="tag in props.row.tags.split('\\n').filter(Boolean)" class="run-tag">{{ tag }}</span>
  <div v-if="props.row.note" class="run-note">{{ props.row.note }}</div>
</q-td>
"""
_STATE_CELL = """
<q-td :props="props"><span :class="'badge badge-' + props.row.state">{{ props.row.state_word }}</span></q-td>
"""
_CHOOSE_ALL = '<q-checkbox v-model="props.selected" dense aria-label="{label}"></q-checkbox>'
_CHOOSE_CELL = '<q-checkbox v-model="props.selected" dense :aria-label="props.row.choose_word"></q-checkbox>'
_ACTION_CELL = """
<q-td :props="props" auto-width>
  <q-btn flat round dense icon="edit_note" class="button-quiet" :aria-label="props.row.edit_word"
         @click="() => $parent.$emit('remark', props.row.id)"></q-btn>
</q-td>
"""


@page("/runs", icon="stacked_line_chart", order=40)
async def runs(view: View) -> None:
    """The table of runs, and below it those that are chosen."""
    with heading(view, view.t("runs.title"), note=view.t("runs.note")):
        button(view.t("runs.new"), lambda: view.open("/train"), icon="add", kind="primary")
    await Board(view).build()


class Board:
    """The page's parts, and what is chosen in them: the address has it, too."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.chosen = [name for name in view.query.get("runs", "").split(_BETWEEN) if name]
        self.archived = view.query.get("archived") == "1"
        self.found: list[Glance] = []
        self.drawn: dict[str, tuple[ui.element, ui.echart]] = {}

    async def build(self) -> None:
        await self._look()
        view = self.view
        with card():
            with row():
                search = ui.input(view.t("runs.search"), value=view.query.get("q", "")).props(
                    "outlined dense clearable"
                )
                search.classes("runs-search")
                search.on_value_change(lambda event: self._search(event.value or ""))
                hidden = ui.switch(view.t("runs.show_archived"), value=self.archived)
                hidden.on_value_change(lambda event: self._show_archived(bool(event.value)))
            self.nothing = empty("stacked_line_chart", view.t("runs.none"))
            self.table = self._table()
            self.table.set_filter(search.value or "")
        self.beside = card(view.t("runs.curves"))
        with self.beside:
            self._controls()
            self.charts = ui.element("div").classes("grid-2")
        self.differ = ui.element("div")
        self._fill()
        self._compare()
        ui.timer(REFRESH_SECONDS, self._refresh)

    # --- the table ---------------------------------------------------------------------------

    def _table(self) -> ui.table:
        t = self.view.t
        numbers = [{"name": name, "label": name, "field": name, "sortable": True} for name in SHOWN]
        columns: list[dict[str, Any]] = [
            {"name": "name", "label": t("runs.run"), "field": "id", "align": "left", "sortable": True},
            {"name": "state", "label": t("runs.state"), "field": "state_word", "align": "left", "sortable": True},
            {"name": "stage", "label": t("runs.stage"), "field": "stage", "align": "left", "sortable": True},
            {"name": "model", "label": t("runs.model"), "field": "model", "align": "left", "sortable": True},
            {"name": "step", "label": t("runs.step"), "field": "step", "sortable": True},
            *numbers,
            {"name": "age", "label": t("runs.age"), "field": "age", "sortable": True,
             ":sort": "(a, b, one, other) => other.touched - one.touched"},
            {"name": "actions", "label": "", "field": "id"},
        ]  # fmt: skip
        table = ui.table(
            columns=columns, rows=[], row_key="id", selection="multiple", pagination={"rowsPerPage": 20},
            on_select=lambda event: self._choose([str(each["id"]) for each in event.selection]),
        )  # fmt: skip
        table.classes("runs-table").props(
            f'flat :rows-per-page-options="[20, 50, 100, 0]" aria-label="{t("runs.title")}"'
        )
        table.add_slot("header-selection", _CHOOSE_ALL.format(label=t("runs.choose_all")))
        table.add_slot("body-selection", _CHOOSE_CELL)
        table.add_slot("body-cell-name", _NAME_CELL)
        table.add_slot("body-cell-state", _STATE_CELL)
        table.add_slot("body-cell-actions", _ACTION_CELL)
        table.on("remark", self._remark)
        return table

    async def _look(self) -> None:
        self.found = await background.io_bound(glances, self.view.jobs) or []

    async def _refresh(self) -> None:
        await self._look()
        self._fill()
        if any(one.id in self.chosen and one.state.alive for one in self.found):
            self._draw()

    def _fill(self) -> None:
        """Rows as files have them now; nothing is sent if they are the same."""
        shown = [one for one in self.found if self.archived or not one.remarks.archived]
        leader = best({one.id: one.metrics for one in shown})
        rows = [self._row(one, leader) for one in shown]
        self.nothing.set_visibility(not rows)
        self.table.set_visibility(bool(rows))
        if rows != self.table.rows:
            self.table.rows = rows
            self.table.selected = [each for each in rows if each["id"] in self.chosen]
            used = {name for one in shown for name in one.metrics}
            always = ["name", "state", "stage", "model", "step"]
            self.table.props["visible-columns"] = [*always, *(name for name in SHOWN if name in used), "age", "actions"]
            self.table.update()

    def _row(self, one: Glance, leader: tuple[str, str] | None) -> dict[str, Any]:
        t, total = self.view.t, one.state.total_steps
        return {
            "id": one.id, "address": f"/run/{quote(one.id)}", "state": one.state.state,
            "state_word": self.view.maybe(f"frame.state_{one.state.state}") or one.state.state,
            "stage": one.stage, "model": one.model.rstrip("/").rpartition("/")[2], "touched": one.touched,
            "step": f"{one.state.step:,} / {total:,}" if total else f"{one.state.step:,}",
            "age": self.view.ago(one.touched), "tags": "\n".join(one.remarks.tags), "note": one.remarks.note,
            "best": t("runs.best", metric=leader[1]) if leader and leader[0] == one.id else "",
            "choose_word": t("runs.choose", run=one.id), "edit_word": t("runs.edit", run=one.id),
            **{name: float(f"{one.metrics[name]:.4g}") for name in SHOWN if name in one.metrics},
        }  # fmt: skip

    def _search(self, text: str) -> None:
        self.table.set_filter(text)
        self.view.remember(q=text)

    def _show_archived(self, shown: bool) -> None:
        self.archived = shown
        self.view.remember(archived="1" if shown else None)
        self._fill()

    def _choose(self, names: Sequence[str]) -> None:
        self.chosen = [*(name for name in self.chosen if name in names), *(n for n in names if n not in self.chosen)]
        self.view.remember(runs=_BETWEEN.join(self.chosen))
        self._compare()

    # --- tags and notes ----------------------------------------------------------------------

    def _remark(self, event: GenericEventArguments) -> None:
        """What a person says of a run, in a dialog."""
        t, run_id = self.view.t, str(event.args)
        path = self.view.workspace.run(run_id)
        now = read_remarks(path)

        async def keep() -> None:
            said = replace(
                now,
                tags=tidy((tags.value or "").split(",")),
                note=(note.value or "").strip(),
                archived=bool(archived.value),
            )
            write_remarks(path, said)
            dialog.close()
            await self._refresh()

        with ui.dialog() as dialog, ui.card().classes("stack runs-dialog"):
            ui.label(run_id).classes("h2")
            tags = ui.input(t("runs.tags"), value=", ".join(now.tags)).props("outlined")
            note = ui.textarea(t("runs.remark"), value=now.note).props("outlined autogrow")
            archived = ui.switch(t("runs.archived"), value=now.archived)
            with row():
                button(t("runs.keep"), keep, kind="primary")
                button(t("frame.cancel"), dialog.close)
        dialog.on("hide", dialog.delete)
        dialog.open()

    # --- beside each other -------------------------------------------------------------------

    def _compare(self) -> None:
        """The chosen runs, as far as they are there."""
        there = {one.id for one in self.found}
        self.chosen = [name for name in self.chosen if name in there]
        self.beside.set_visibility(bool(self.chosen))
        self.differ.clear()
        if not self.chosen:
            return
        names = sorted({name for run_id in self.chosen for name in self._curves_of(run_id)})
        asked = [name for name in self.view.query.get("metrics", "").split(_BETWEEN) if name in names]
        first = [name for name in _FIRST_METRICS if name in names][:4] or names[:2]
        self.metrics.set_options(names, value=asked or first)
        self._draw()
        with self.differ:
            self._differences()

    def _controls(self) -> None:
        view, t = self.view, self.view.t
        axis = view.query.get("x", "step")

        def change(key: str, value: str | None) -> None:
            view.remember(**{key: value})
            self._draw()

        with row().classes("runs-controls"):
            self.metrics = ui.select([], value=[], label=t("runs.metrics"), multiple=True)
            self.metrics.props("outlined dense use-chips").classes("runs-metrics")
            self.metrics.on("update:model-value", lambda: change("metrics", _BETWEEN.join(self.metrics.value)))
            axes = {name: t(f"runs.by_{name}") for name in _AXES}
            self.axis = ui.toggle(axes, value=axis if axis in axes else "step")
            self.axis.props("no-caps unelevated dense").on_value_change(lambda event: change("x", event.value))
            with ui.element("div").classes("runs-smooth"):
                ui.label(t("runs.smoothing")).classes("small muted")
                self.smoothing = ui.slider(min=0, max=0.98, step=0.02, value=_number(view.query.get("smooth")))
                self.smoothing.props["aria-label"] = t("runs.smoothing")
                self.smoothing.on(
                    "change", lambda: change("smooth", f"{self.smoothing.value:g}" if self.smoothing.value else None)
                )
            self.log = ui.switch(t("runs.log"), value=view.query.get("log") == "1")
            self.log.on_value_change(lambda event: change("log", "1" if event.value else None))

    def _curves_of(self, run_id: str) -> list[str]:
        table = series.read(self.view.workspace.run(run_id))
        return [name for name in table.names if name not in series.AXIS_COLUMNS]

    def _draw(self) -> None:
        """The curves of the chosen metrics; charts that are there are changed in place."""
        if not self.chosen:
            return
        wanted, axis = [str(name) for name in self.metrics.value], str(self.axis.value)
        label, kind = self.view.t(f"runs.by_{axis}"), "seconds" if axis == "time" else "number"
        for name, (box, _) in self.drawn.items():  # hidden, since a chart that goes while it is drawn is an error
            box.set_visibility(name in wanted)
        for name in wanted:
            options = charts.lines(self._lines(name), x_label=label, x_kind=kind, log=bool(self.log.value))
            if name in self.drawn:
                charts.update(self.drawn[name][1], options)
                continue
            with self.charts, ui.element("div") as box:
                ui.label(name).classes("h3")
                self.drawn[name] = box, charts.chart(options, self.view.t("runs.chart", metric=name))

    def _lines(self, metric: str) -> list[charts.Line]:
        weight, axis = float(self.smoothing.value or 0.0), str(self.axis.value)
        found = []
        for number, run_id in enumerate(self.chosen):
            table = series.read(self.view.workspace.run(run_id))
            points = table.curve(metric, x=axis, smoothing=weight)
            raw = table.curve(metric, x=axis) if weight else None
            found.append(charts.Line(run_id, points, number, raw=raw, dots=len(points) < 12))
        return found

    def _differences(self) -> None:
        """The keys in which the chosen runs' configs differ."""
        if len(self.chosen) < 2:
            return
        t = self.view.t
        found = differences([read_config(self.view.workspace.run(run_id)) for run_id in self.chosen])
        with card(t("runs.differences"), note=None if found else t("runs.no_differences")):
            if not found:
                return
            columns: list[dict[str, Any]] = [{"name": "key", "label": t("runs.key"), "field": "key", "align": "left"}]
            columns += [
                {"name": f"run{number}", "label": run_id, "field": f"run{number}", "align": "left"}
                for number, run_id in enumerate(self.chosen)
            ]
            rows = [
                {"key": key, **{f"run{number}": _written(value) for number, value in enumerate(values)}}
                for key, values in sorted(found.items())
            ]
            ui.table(columns=columns, rows=rows, row_key="key").props("flat dense hide-bottom").classes(
                "runs-table mono"
            )


def _written(value: Any) -> str:
    """A config's value as a person reads it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _number(text: str | None) -> float:
    """A number of the address, from 0 to 0.98."""
    try:
        return min(max(float(text or 0.0), 0.0), 0.98)
    except ValueError:
        return 0.0
