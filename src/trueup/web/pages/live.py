"""A run, live: how it stands, its curves, what it says; stop, resume, duplicate. All of it from the run's files."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from trueup.errors import ConfigError, UserError
from trueup.web import charts
from trueup.web.frame import button, card, figure, heading, problems, state_badge
from trueup.web.jobs import RunState, tail
from trueup.web.pages import page
from trueup.web.series import Table, read
from trueup.web.view import View

_SECONDS = 1.0
_COMPLETIONS = 8  # of the newest step
_COMPLETIONS_BYTES = 256 * 2**10


@dataclass(frozen=True)
class Plot:
    """A chart: a word of words/live.json, and the metrics in it by the names of their curves."""

    title: str
    metrics: dict[str, str]
    positive: bool = False  # may have a logarithmic axis


PLOTS = (
    Plot("loss", {"train": "loss", "eval": "eval_loss"}, positive=True),
    Plot("rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "reward": "reward"}),
    Plot("accuracy", {"train": "rewards/accuracies", "eval": "eval_rewards/accuracies"}),
    Plot("margin", {"train": "rewards/margins", "eval": "eval_rewards/margins"}),
    Plot("kl", {"kl": "kl", "chosen": "kl/chosen", "rejected": "kl/rejected"}, positive=True),
    Plot("entropy", {"entropy": "entropy"}),
    Plot("lengths", {"mean": "completions/mean_length", "max": "completions/max_length"}),
    Plot("grad_norm", {"grad_norm": "grad_norm"}, positive=True),
    Plot("learning_rate", {"learning_rate": "learning_rate"}),
    Plot("speed", {"tokens": "tokens_per_second"}),
    Plot("memory", {"memory": "memory_gb"}),
)


@page("/run/{run:path}", icon="monitoring", order=41, menu=False)
def live(view: View) -> None:
    """One run."""
    if not view.workspace.run(view.path["run"]).is_dir():
        raise ConfigError(f"there is no run {view.path['run']}")
    LivePage(view).build()


class LivePage:
    """One look at one run; the same for every tab, because all of it is read."""

    def __init__(self, view: View) -> None:
        self.view, self.run = view, view.path["run"]
        self.path = view.workspace.run(self.run)
        self.shown: dict[str, ui.echart] = {}
        self.drawn: tuple[Any, ...] = ()
        self.before: tuple[Any, ...] = ()
        self.log_text = ""

    def build(self) -> None:
        """Everything, and then a look every second."""
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
        self.charts = ui.element("div").classes("grid-2")
        self.answers = ui.element("div")
        with card(t("live.log")):
            self.log = ui.label("").classes("log").props(f'role=log tabindex=0 aria-label="{t("live.log")}"')
        self._refresh()
        ui.timer(_SECONDS, self._refresh)

    def _controls(self) -> None:
        """How curves are drawn; kept in the address."""
        t, query = self.view.t, self.view.query
        axes = {name: t(f"live.x_{name}") for name in ("step", "epoch", "tokens", "time")}
        with ui.element("div").classes("toolbar live-controls"):
            self.x = ui.select(axes, value=query.get("x") if query.get("x") in axes else "step", label=t("live.x"))
            self.x.props("outlined dense options-dense")
            ui.label(t("live.smoothing")).classes("muted small")
            start = min(max(_number(query.get("smooth"), 0.0), 0.0), 0.98)
            self.smooth = ui.slider(min=0, max=0.98, step=0.02, value=start).classes("live-slider")
            self.smooth.props["aria-label"] = t("live.smoothing")
            self.log_scale = ui.switch(t("live.log_scale"), value=query.get("log") == "1")
            ui.label(t("live.zoom")).classes("muted small")

        def remember() -> None:
            smooth = f"{self.smooth.value:g}" if self.smooth.value else None
            x = self.x.value if self.x.value != "step" else None
            self.view.remember(x=x, smooth=smooth, log="1" if self.log_scale.value else None)
            self._draw()

        for control in (self.x, self.smooth, self.log_scale):
            control.on_value_change(remember)

    # --- looking again -----------------------------------------------------------------------

    def _refresh(self) -> None:
        state = self.view.jobs.state(self.run)
        warned = json.dumps(state.status.get("warnings", []))
        now = (state.state, state.reason, state.checkpoint, warned)
        if now != self.before:
            self.before = now
            self._stand(state)
        self._glance(state)
        self._draw()
        log = self.view.jobs.log(self.run)
        if log != self.log_text:
            self.log_text = log
            self.log.set_text(log)

    def _stand(self, state: RunState) -> None:
        """State, reason, warnings, and what can be done about them."""
        for place in (self.badge, self.buttons, self.reason, self.warnings):
            place.clear()
        with self.badge:
            state_badge(self.view, state.state)
        with self.buttons:
            self._actions(state)
        with self.reason:
            if state.state in ("failed", "stopped"):
                self._why(state)
        with self.warnings:
            for warning in state.status.get("warnings", []):
                ui.label(str(warning.get("text", ""))).classes("notice")

    def _actions(self, state: RunState) -> None:
        t = self.view.t
        if state.alive:
            button(t("live.stop_save"), lambda: self._do(lambda: self._stop(True)), icon="pause")
            button(t("live.stop_now"), lambda: self._do(lambda: self._stop(False)), icon="stop", kind="danger")
        elif state.resumable:
            button(t("live.resume"), lambda: self._do(self._resume), icon="play_arrow", kind="primary")
        button(t("live.duplicate"), lambda: self.view.open("/train", run=self.run), icon="content_copy")

    def _why(self, state: RunState) -> None:
        t = self.view.t
        text = t("live.killed", step=state.step) if state.reason == "killed" else state.reason
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
        self._refresh()

    def _glance(self, state: RunState) -> None:
        """Step, time left, loss, speed."""
        table, total = read(self.path), state.total_steps
        share = state.step / total if total else (1.0 if state.state == "finished" else 0.0)
        if self.progress.value != share:
            self.progress.set_value(share)
        epoch = table.last("epoch")
        done = f"{state.step:,} / {total:,}" if total else f"{state.step:,}"
        self._say("step", done, _short(epoch, self.view.t("live.epoch")))
        left = self._time_left(table, state)
        self._say("left", "–" if left is None else _clock(left), "")
        self._say("loss", _short(table.last("loss")), _short(table.last("eval_loss"), "eval"))
        memory = _short(table.last("memory_gb"), "GB", after=True)
        self._say("speed", _short(table.last("tokens_per_second")), memory)

    def _say(self, name: str, value: str, note: str) -> None:
        for label, text in zip(self.figures[name], (value, note), strict=True):
            if label.text != text:
                label.set_text(text)

    def _time_left(self, table: Table, state: RunState) -> float | None:
        """From the steps and times of the newest rows."""
        steps, times = table.columns.get("step"), table.columns.get("time")
        if not state.alive or not steps or not times or len(steps) < 2 or not state.total_steps:
            return None
        back = min(len(steps), 20)
        done, took = steps[-1] - steps[-back], times[-1] - times[-back]
        left = (state.total_steps - steps[-1]) * took / done - (time.time() - times[-1]) if done > 0 else None
        return None if left is None else max(left, 0.0)

    # --- curves ------------------------------------------------------------------------------

    def _draw(self) -> None:
        table = read(self.path)
        now = (table.length, self.x.value, self.smooth.value, self.log_scale.value)
        if now == self.drawn:
            return
        self.drawn = now
        for plot in PLOTS:
            options = self._options(plot, table)
            if options is None:
                continue
            if plot.title in self.shown:
                charts.update(self.shown[plot.title], options)
            else:
                title = self.view.t(f"live.plot_{plot.title}")
                with self.charts, card(title):
                    self.shown[plot.title] = charts.chart(options, title)
        self._completions()

    def _options(self, plot: Plot, table: Table) -> dict[str, Any] | None:
        x, smoothing = str(self.x.value), float(self.smooth.value)
        curves = []
        for number, (name, metric) in enumerate(plot.metrics.items()):
            points = table.curve(metric, x=x, smoothing=smoothing)
            if points:
                evaluated = metric.startswith("eval_")
                raw = table.curve(metric, x=x) if smoothing and not evaluated else None
                shown = self.view.t(f"live.curve_{name}")
                points = table.curve(metric, x=x) if evaluated else points
                curves.append(charts.Line(shown, points, colour=number, raw=raw, dashed=evaluated, dots=evaluated))
        if not curves:
            return None
        log = bool(self.log_scale.value) and plot.positive and all(y > 0 for c in curves for _, y in c.points)
        kind = "seconds" if x == "time" else "number"
        return charts.lines(curves, x_label=self.view.t(f"live.x_{x}"), log=log, x_kind=kind)

    def _completions(self) -> None:
        """What an online method's model wrote at its newest step."""
        rows = []
        for line in tail(self.path / "completions.jsonl", _COMPLETIONS_BYTES).splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        if not rows:
            return
        newest = [row for row in rows if row.get("step") == rows[-1].get("step")][:_COMPLETIONS]
        self.answers.clear()
        with self.answers, card(self.view.t("live.completions", step=newest[0].get("step"))):
            for row in newest:
                with ui.element("article").classes("completion"):
                    ui.label(str(row.get("prompt", ""))).classes("muted small clamp")
                    ui.label(str(row.get("completion", ""))).classes("mono clamp")
                    parts = {name: row.get(name) for name in ("reward", "advantage")} | (row.get("rewards") or {})
                    texts = [f"{name} {_short(value)}" for name, value in parts.items() if value is not None]
                    ui.label(" · ".join(texts)).classes("small number")


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
