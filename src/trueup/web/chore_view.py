"""What the pages of evaluations and exports have in common: the list of them, and one that is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from trueup.quantities import sized
from trueup.web.chores import Chore, Chores
from trueup.web.frame import button, card, copy_block, empty, heading, state_badge
from trueup.web.verb_form import written
from trueup.web.view import View

_SECONDS = 1.0
_MOST = 100


def chores_list(view: View, chores: Chores, address: str, title: str, nothing: str, icon: str) -> None:
    """All chores of a verb, newest first; looked at again every few seconds."""
    with card(title):
        place = ui.element("div").classes("chores")
    seen: list[Any] = []

    async def refresh() -> None:
        found = (await asyncio.to_thread(chores.all))[:_MOST]
        now = [(one.id, one.state, int(time.time() - one.touched) // 60) for one in found]
        if now == seen and place.default_slot.children:
            return
        seen[:] = now
        place.clear()
        with place:
            for one in found:
                with ui.link(target=f"{address}/{quote(one.id)}").classes("chore"):
                    ui.label(one.id).classes("chore-name")
                    state_badge(view, one.state)
                    ui.label(view.ago(one.touched)).classes("muted small number")
            if not found:
                empty(icon, nothing)

    ui.timer(0.01, refresh, once=True)
    ui.timer(3 * _SECONDS, refresh)


class ChorePage:
    """One chore: how it stands, what it says, and when it has ended well, what `result` draws."""

    def __init__(self, view: View, chores: Chores, again: str, result: Callable[[Path], None]) -> None:
        self.view, self.chores, self.again, self.result = view, chores, again, result
        self.id = view.path["chore"]
        self.seen: tuple[Any, ...] = ()

    def build(self) -> None:
        """Everything, and then a look every second as long as it runs. Raises ConfigError if there is none."""
        t = self.view.t
        chore = self.chores.state(self.id)
        with heading(self.view, self.id):
            self.badge = ui.element("span").props("role=status")
            self.buttons = ui.element("div").classes("toolbar")
        self.now = ui.element("div").classes("stack live-reason")
        self.done = ui.element("div")
        self.words = self.chores.words(self.id)
        self.how = card(t("chores.how"))
        with self.how, ui.element("div").classes("stack"):
            if self.words:
                copy_block(self.view, written(self.chores.verb, self.words))
            self.log = ui.label("").classes("log").props(f'role=log tabindex=0 aria-label="{t("live.log")}"')
        self._refresh(chore)
        ui.timer(_SECONDS, lambda: self._refresh(self.chores.state(self.id)))

    def _refresh(self, chore: Chore) -> None:
        log = self.chores.log(self.id)
        now = (chore.state, chore.doing, chore.share, chore.touched, log)
        if now == self.seen:
            return
        ended = not self.seen or self.seen[0] != chore.state
        self.seen = now
        self.log.set_text(log)
        self.log.set_visibility(bool(log))
        self.how.set_visibility(bool(log) or bool(self.words))
        self._under_way(chore)
        if ended:
            self._stand(chore)

    def _stand(self, chore: Chore) -> None:
        for place in (self.badge, self.buttons, self.done):
            place.clear()
        with self.badge:
            state_badge(self.view, chore.state)
        t = self.view.t
        with self.buttons:
            if chore.alive:
                button(t("live.stop_now"), lambda: self.chores.stop(self.id), icon="stop", kind="danger")
            elif chore.state != "finished" and self.chores.words(self.id):
                button(t("chores.once_more"), self._restart, icon="play_arrow", kind="primary")
        if chore.state == "finished":
            with self.done:
                self.result(self.chores.path(self.id))

    def _under_way(self, chore: Chore) -> None:
        self.now.clear()
        with self.now:
            if chore.alive:
                bar = ui.linear_progress(chore.share or 0.0, show_value=False, size="6px")
                bar.props("rounded color=primary" + ("" if chore.share is not None else " indeterminate"))
                bar.props["aria-label"] = self.view.t("live.progress")
                ui.label(self.view.said(chore.doing) or self.view.t("chores.beginning")).classes("muted")
            elif chore.state == "failed":
                with ui.element("div").classes("problem").props("role=alert"):
                    ui.label(self.view.said_lines(chore.reason) or self.view.t("chores.gone")).classes("live-why")

    async def _restart(self) -> None:
        await asyncio.to_thread(self.chores.start, self.chores.words(self.id), self.id)
        self._refresh(self.chores.state(self.id))


def files(view: View, folder: Path, names: Sequence[str] | None = None) -> None:
    """Files of a result, to be fetched one by one."""
    present = [folder / name for name in names] if names else sorted(folder.iterdir())
    with card(view.t("chores.files")), ui.element("div").classes("chores"):
        for path in (one for one in present if one.is_file()):
            with ui.element("div").classes("chore"):
                ui.label(path.name).classes("chore-name mono")
                ui.label(sized(path.stat().st_size)).classes("muted small number")
                label = view.t("chores.fetch", name=path.name)
                button("", lambda path=path: ui.download.file(path), icon="download", kind="quiet", label=label)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, label: str) -> None:
    """A plain table of texts; the first column says what a row is."""
    box = ui.element("div").classes("table-box").props("tabindex=0 role=region")
    box.props["aria-label"] = label
    with box, ui.element("table").classes("table"):
        with ui.element("thead"), ui.element("tr"):
            for cell in head:
                with ui.element("th").props("scope=col"):
                    ui.label(cell)
        with ui.element("tbody"):
            for row in rows:
                with ui.element("tr"):
                    for number, cell in enumerate(row):
                        with ui.element("td") if number else ui.element("th").props("scope=row"):
                            ui.label(cell)
