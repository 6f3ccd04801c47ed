"""The first page: what runs, three ways to begin, and what ran last."""

from __future__ import annotations

import time
from urllib.parse import quote

from nicegui import run as background
from nicegui import ui

from trueup.web.frame import card, heading, state_badge
from trueup.web.glance import Glance, glances
from trueup.web.pages import PAGES, page
from trueup.web.view import View

_SECONDS = 2.0
_NEWEST = 6
_DOORS = (
    ("try", "auto_awesome", "/train?example=quickstart"),
    ("data", "upload_file", "/data"),
    ("model", "tune", "/train?model=Qwen/Qwen2.5-0.5B-Instruct"),
)


@page("/", icon="home", order=0)
async def home(view: View) -> None:
    """The overview. Someone new sees where to begin; whoever has trained here sees that first."""
    heading(view, view.t("home.title"), note=view.t("home.note"))
    alive, doors, before = (ui.element("div") for _ in range(3))
    with doors:
        _doors(view)
    shown: list[tuple[object, ...]] = []

    async def refresh() -> None:
        found = await background.io_bound(glances, view.jobs) or []
        now = [(one.id, one.state, int(time.time() - one.touched) // 60) for one in found]
        if now == shown:
            return
        shown[:] = now
        alive.clear()
        before.clear()
        with alive:
            _running(view, [one for one in found if one.state.alive])
        with before:
            _recent(view, [one for one in found if not one.state.alive and not one.remarks.archived])

    await refresh()
    ui.timer(_SECONDS, refresh)


def _doors(view: View) -> None:
    with ui.element("nav").classes("doors").props(f'aria-label="{view.t("home.begin")}"'):
        for name, icon, address in _DOORS:
            known = address.partition("?")[0] in PAGES
            with ui.link(target=address if known else "/train").classes("door"):
                ui.icon(icon).props("aria-hidden=true")
                ui.label(view.t(f"home.{name}")).classes("h2")
                ui.label(view.t(f"home.{name}_note")).classes("muted")


def _running(view: View, found: list[Glance]) -> None:
    if found:
        with card(view.t("home.running")):
            for one in found:
                _line(view, one)
                share = one.state.step / one.state.total_steps if one.state.total_steps else 0.0
                bar = ui.linear_progress(share, show_value=False, size="4px").props("rounded color=primary")
                bar.props["aria-label"] = view.t("home.progress", run=one.id)


def _recent(view: View, found: list[Glance]) -> None:
    if found:
        with card(view.t("home.newest")):
            for one in found[:_NEWEST]:
                _line(view, one)
            if len(found) > _NEWEST:
                ui.link(view.t("home.all", count=len(found)), "/runs").classes("small home-all")


def _line(view: View, one: Glance) -> None:
    """A run in one line: its name, what it was, how far it came."""
    steps = f"{one.state.step:,} / {one.state.total_steps:,}" if one.state.total_steps else f"{one.state.step:,}"
    what = [one.stage.upper(), one.model.rstrip("/").rpartition("/")[2], view.t("home.steps", steps=steps)]
    with ui.element("div").classes("home-run"):
        with ui.element("div").classes("grow"):
            ui.link(one.id, f"/run/{quote(one.id)}").classes("home-name")
            ui.label(" · ".join(filter(None, what))).classes("muted small number")
        if not one.state.alive:
            ui.label(view.ago(one.touched)).classes("muted small home-age")
        state_badge(view, one.state.state)
