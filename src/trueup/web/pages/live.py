"""A run, live: how it stands, its curves, what it says; stop, resume, duplicate. All of it from the run's files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import run as background
from nicegui import ui

from trueup.errors import ConfigError, UserError
from trueup.web import charts
from trueup.web.answers import read as read_answers
from trueup.web.frame import button, card, figure, heading, problems, state_badge
from trueup.web.jobs import RunState
from trueup.web.pages import PAGES, page
from trueup.web.plots import Look, Plot, front, options, others
from trueup.web.series import Table, read
from trueup.web.view import View

_SECONDS = 1.0
_COMPLETIONS = 8  # of a step
_NEWEST = 20  # rows, from which the time left is told
_ONWARD = {"chat": "forum", "evaluate": "analytics", "export": "ios_share"}  # pages that take a run → their icons
_AXES = ("step", "epoch", "tokens", "time")


@page("/run/{run:path}", icon="monitoring", order=41, below="/runs")
def live(view: View) -> None:
    """One run."""
    if not view.workspace.run(view.path["run"]).is_dir():
        raise ConfigError(f"there is no run {view.path['run']}")
    LivePage(view).build()


@dataclass
class Seen:
    """What one look at a run's files found; of charts and answers, what is new in them."""

    state: RunState
    log: str
    table: Table
    charts: list[tuple[Plot, dict[str, Any]]]
    others: list[tuple[Plot, dict[str, Any]]]
    has_others: bool
    steps: list[int]
    answers: tuple[int, int, list[dict[str, Any]]] | None  # step, how many it has, some of them


class LivePage:
    """One look at one run; the same for every tab, because all of it is read."""

    def __init__(self, view: View) -> None:
        self.view, self.run = view, view.path["run"]
        self.path = view.workspace.run(self.run)
        self.shown: dict[str, ui.echart] = {}
        self.drawn: tuple[Any, ...] = ()
        self.told: tuple[Any, ...] = ()
        self.stands: dict[ui.element, Any] = {}
        self.log_text = ""
        self.turn = asyncio.Lock()

    def build(self) -> None:
        """Everything, and then a look every second; the first at once, when the page is there."""
        t = self.view.t
        with heading(self.view, self.run):
            self.badge = ui.element("span").props("role=status")
            self.buttons = ui.element("div").classes("toolbar")
        self.reason = ui.element("div").classes("stack live-reason")
        self.progress = ui.linear_progress(0, show_value=False, size="6px").props("rounded color=primary")
        self.progress.props["aria-label"] = t("live.progress")
        with ui.element("div").classes("grid-4 figures"):
            self.figures = {name: figure(t(f"live.{name}"), "–") for name in ("step", "left", "loss", "speed")}
        self.warnings = ui.element("div").classes("stack live-reason").props("aria-live=polite")
        self._controls()
        self.charts = ui.element("div").classes("live-charts")
        self.more = ui.expansion(t("live.more")).classes("live-more").props("dense")
        with self.more:
            self.rest = ui.element("div").classes("live-charts")
        self.more.set_visibility(False)
        self.more.on_value_change(self._look_again)
        self._answers_card()
        self.log_card = card(t("live.log"), note=t("live.log_note"))
        with self.log_card:
            self.log = ui.label("").classes("log").props(f'role=log tabindex=0 aria-label="{t("live.log")}"')
        self.log_card.set_visibility(False)
        self._stand(self.view.jobs.state(self.run))
        ui.timer(_SECONDS, self._look_again)

    def _controls(self) -> None:
        """How curves are drawn; kept in the address."""
        t, query = self.view.t, self.view.query
        with ui.element("div").classes("toolbar live-controls"):
            x = query.get("x", "step")
            axes = {name: t(f"live.x_{name}") for name in _AXES}
            self.x = ui.select(axes, value=x if x in axes else "step", label=t("live.x"))
            self.x.props("outlined dense options-dense")
            start = min(max(_number(query.get("smooth"), 0.0), 0.0), 0.98)
            with _labelled(t("live.smoothing")):
                self.smooth = ui.slider(min=0, max=0.98, step=0.02, value=start).props("label")
                self.smooth.props["aria-label"] = t("live.smoothing")
            low, high = _span(query.get("span", ""))
            with _labelled(t("live.zoom")):
                self.span = ui.range(min=0, max=100, value={"min": low, "max": high}).props("label")
                self.span.props["aria-label"] = t("live.zoom")
                self._tell_span(low, high)
            self.log_scale = ui.switch(t("live.log_scale"), value=query.get("log") == "1")
        self.x.on_value_change(self._looked_otherwise)
        self.log_scale.on_value_change(self._looked_otherwise)
        for slider in (self.smooth, self.span):
            slider.on("change", self._looked_otherwise)

    def _answers_card(self) -> None:
        """What an online method's model wrote, at the newest step or at one that is chosen."""
        t = self.view.t
        self.answers_card = card(t("live.completions"))
        with self.answers_card:
            with ui.element("div").classes("toolbar"):
                newest = {0: t("live.newest")}
                self.at = ui.select(newest, value=0, label=t("live.at_step"), with_input=True).classes("live-step")
                self.at.props("outlined dense options-dense")
                self.count = ui.label("").classes("muted small")
            self.answers = ui.element("div")
        self.answers_card.set_visibility(False)
        self.at.on_value_change(self._look_again)

    @property
    def look(self) -> Look:
        """How curves are drawn."""
        low, high = self._shown
        return Look(
            str(self.x.value), float(self.smooth.value or 0), bool(self.log_scale.value), (low / 100, high / 100)
        )

    @property
    def _shown(self) -> tuple[int, int]:
        chosen = self.span.value or {"min": 0, "max": 100}
        return int(chosen["min"]), int(chosen["max"])

    def _tell_span(self, low: int, high: int) -> None:
        """Quasar's own value is none that a screen reader could read."""
        self.span.props.update({"aria-valuenow": high, "aria-valuetext": f"{low}–{high} %"})

    async def _looked_otherwise(self) -> None:
        look, (low, high) = self.look, self._shown
        self._tell_span(low, high)
        self.view.remember(
            x=look.x if look.x != "step" else None,
            smooth=f"{look.smoothing:g}" if look.smoothing else None,
            log="1" if look.log else None,
            span=f"{low}-{high}" if look.span != (0.0, 1.0) else None,
        )
        await self._look_again()

    # --- looking again -----------------------------------------------------------------------

    async def _look_again(self) -> None:
        async with self.turn:
            seen = await background.io_bound(self._see, self.look, bool(self.more.value), int(self.at.value or 0))
            if seen is not None:
                self._show(seen)

    def _see(self, look: Look, more: bool, at: int) -> Seen:
        """Read the files, and make curves of what is new; in a thread, since a long run has much to read."""
        state, table, answers = self.view.jobs.state(self.run), read(self.path), read_answers(self.path)
        found, rest = [], []
        drawn = table.length, look, more
        if drawn != self.drawn:
            self.drawn = drawn
            with table.lock:
                found = self._options(front(table), table, look)
                rest = self._options(others(table), table, look) if more else []
        steps, said = answers.steps, None
        step = at if at in steps else (steps[-1] if steps else 0)
        told = step, answers.count(step)
        if steps and told != self.told:
            self.told = told
            said = step, answers.count(step), answers.at(step, _COMPLETIONS)
        return Seen(state, self.view.jobs.log(self.run), table, found, rest, bool(others(table)), steps, said)

    def _options(self, plots: list[Plot], table: Table, look: Look) -> list[tuple[Plot, dict[str, Any]]]:
        say = lambda key: self.view.maybe(f"live.{key}")  # noqa: E731
        return [(plot, made) for plot in plots if (made := options(plot, table, look, say)) is not None]

    def _show(self, seen: Seen) -> None:
        self._stand(seen.state)
        self._glance(seen.state, seen.table)
        self._draw(seen.charts, self.charts)
        self._draw(seen.others, self.rest)
        if self.more.visible != seen.has_others:
            self.more.set_visibility(seen.has_others)
        self._say_answers(seen)
        if seen.log != self.log_text:
            self.log_text = seen.log
            self.log_card.set_visibility(True)
            self.log.set_text(seen.log)
            ui.run_javascript(f"trueupFollow({self.log.id})")

    def _stand(self, state: RunState) -> None:
        """State, what can be done, reason and warnings; each drawn anew only when it has changed: a click on a button
        that has just been replaced is lost.
        """
        warned = [self.view.said(str(warning.get("text", ""))) for warning in state.status.get("warnings", [])]
        parts = {
            self.badge: (state.state, lambda: state_badge(self.view, state.state)),
            self.buttons: ((state.state, state.alive, state.resumable, state.stopping), lambda: self._actions(state)),
            self.reason: ((state.state, state.reason, state.checkpoint), lambda: self._why(state)),
            self.warnings: (warned, lambda: [ui.label(text).classes("notice") for text in warned]),
        }
        for place, (stands, draw) in parts.items():
            if place not in self.stands or self.stands[place] != stands:
                self.stands[place] = stands
                place.clear()
                with place:
                    draw()

    def _actions(self, state: RunState) -> None:
        t = self.view.t
        if state.alive:
            if state.stopping:
                ui.label(t("live.stopping")).classes("muted small")
            else:
                button(t("live.stop_save"), lambda: self._do(lambda: self._stop(True)), icon="pause")
            button(t("live.stop_now"), lambda: self._do(lambda: self._stop(False)), icon="stop", kind="danger")
        elif state.resumable:
            button(t("live.resume"), lambda: self._do(self._resume), icon="play_arrow", kind="primary")
        if not state.alive and self.view.workspace.has_model(self.run):
            for name, icon in _ONWARD.items():
                if f"/{name}" in PAGES:
                    kind = "primary" if state.state == "finished" and name == "chat" else "plain"
                    open_it = partial(self.view.open, f"/{name}", run=self.run)
                    button(t(f"live.{name}"), open_it, icon=icon, kind=kind)
        if self.path.is_dir():
            button(t("live.duplicate"), lambda: self.view.open("/train", run=self.run), icon="content_copy")

    def _why(self, state: RunState) -> None:
        t = self.view.t
        if not self.path.is_dir():
            ui.label(t("live.gone")).classes("notice")
        if state.state not in ("failed", "stopped"):
            return
        text = t("live.killed", step=state.step) if state.reason == "killed" else self.view.said_lines(state.reason)
        goes_on = t("live.from_checkpoint", name=state.checkpoint) if state.checkpoint else t("live.from_start")
        with ui.element("div").classes("problem" if state.state == "failed" else "notice"):
            ui.label(text or t("live.stopped")).classes("live-why")
            ui.label(goes_on).classes("small")

    def _stop(self, save: bool) -> None:
        self.view.jobs.stop(self.run, save=save)

    def _resume(self) -> None:
        self.view.jobs.resume(self.run)

    async def _do(self, act: Callable[[], Any]) -> None:
        try:
            await asyncio.to_thread(act)
        except UserError as error:
            with self.reason:
                problems(error.problems)
        await self._look_again()

    def _glance(self, state: RunState, table: Table) -> None:
        """Step, time left, loss, speed."""
        total = state.total_steps
        share = state.step / total if total else (1.0 if state.state == "finished" else 0.0)
        if self.progress.value != share:
            self.progress.set_value(share)
        epoch = table.last("epoch")
        done = f"{state.step:,} / {total:,}" if total else f"{state.step:,}"
        self._say("step", done, _short(epoch, self.view.t("live.epoch")))
        left = self._time_left(table, state)
        took = _clock(table.extent("time")[1]) if table.length > 1 else ""
        self._say("left", "–" if left is None else _clock(left), self.view.t("live.took", time=took) if took else "")
        self._say("loss", _short(table.last("loss")), _short(table.last("eval_loss"), self.view.t("live.curve_eval")))
        memory = _short(table.last("memory_gb"), "GB", after=True)
        self._say("speed", _short(table.last("tokens_per_second")), memory)

    def _say(self, name: str, value: str, note: str) -> None:
        for label, text in zip(self.figures[name], (value, note), strict=True):
            if label.text != text:
                label.set_text(text)

    def _time_left(self, table: Table, state: RunState) -> float | None:
        """From the steps and times of the newest rows."""
        steps, times = table.column("step")[-_NEWEST:], table.column("time")[-_NEWEST:]
        if not state.alive or len(steps) < 2 or not state.total_steps:
            return None
        done, took = steps[-1] - steps[0], times[-1] - times[0]
        if not (done > 0 and took > 0):  # NaN, too
            return None
        return max((state.total_steps - steps[-1]) * took / done - (time.time() - times[-1]), 0.0)

    # --- curves and answers ------------------------------------------------------------------

    def _draw(self, found: list[tuple[Plot, dict[str, Any]]], place: ui.element) -> None:
        for plot, made in found:
            if plot.key in self.shown:
                charts.update(self.shown[plot.key], made)
            else:
                title = self.view.maybe(f"live.plot_{plot.key}") or plot.key
                with place, card(title):
                    self.shown[plot.key] = charts.chart(made, title)

    def _say_answers(self, seen: Seen) -> None:
        if seen.answers is None:
            return
        t = self.view.t
        step, count, rows = seen.answers
        self.answers_card.set_visibility(True)
        self.at.set_options({0: t("live.newest"), **{one: str(one) for one in seen.steps}})
        self.count.set_text(t("live.answers", step=step, shown=len(rows), count=count))
        self.answers.clear()
        with self.answers:
            for row in rows:
                with ui.element("article").classes("completion"):
                    ui.label(str(row.get("prompt", ""))).classes("muted small clamp")
                    ui.label(str(row.get("completion", ""))).classes("mono clamp")
                    parts = {name: row.get(name) for name in ("reward", "advantage")} | (row.get("rewards") or {})
                    texts = [f"{name} {_short(value)}" for name, value in parts.items() if value is not None]
                    ui.label(" · ".join(texts)).classes("small number")


def _labelled(text: str) -> ui.element:
    box = ui.element("div").classes("live-slider")
    with box:
        ui.label(text).classes("muted small").props("aria-hidden=true")
    return box


def _span(text: str) -> tuple[int, int]:
    """`20-100` of an address."""
    low, _, high = text.partition("-")
    first, last = (int(min(max(_number(part, other), 0), 100)) for part, other in ((low, 0), (high, 100)))
    return (first, last) if first < last else (0, 100)


def _number(text: str | None, otherwise: float) -> float:
    try:
        return float(text or otherwise)
    except ValueError:
        return otherwise


def _short(value: float | None, name: str = "", *, after: bool = False) -> str:
    """A number in few characters, beside its name; nothing for None."""
    if value is None:
        return "" if name else "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {name}".strip() if after else f"{name} {text}".strip()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"
