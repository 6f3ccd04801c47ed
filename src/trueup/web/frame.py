"""What surrounds every page: header, navigation, title; and the few parts that pages are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nicegui import ui

from trueup.errors import Problem
from trueup.web.draft import Checked
from trueup.web.pages import Page
from trueup.web.phrases import translated
from trueup.web.view import View, reader
from trueup.web.words import LANGUAGES

_STATE_ICONS = {
    "preparing": "hourglass_top", "starting": "hourglass_top", "running": "play_arrow", "stalled": "warning",
    "finished": "check", "stopped": "pause", "failed": "error_outline",
}  # fmt: skip
_THEMES = {"auto": ("light", "light_mode"), "light": ("dark", "dark_mode"), "dark": ("auto", "brightness_auto")}


@contextmanager
def frame(view: View, page: Page, pages: Sequence[Page]) -> Iterator[None]:
    """The page's surroundings; what is built inside is its content."""
    title = view.t(page.title)
    ui.page_title(f"{title} · trueup")
    ui.link(view.t("frame.skip"), "#content").classes("skip")
    with ui.element("div").classes("shell"):
        with ui.element("div").classes("side"):
            with ui.link(target="/").classes("brand"):
                ui.element("span").classes("brand-mark")
                ui.label("trueup")
            with ui.element("nav").props(f'aria-label="{view.t("frame.navigation")}"').classes("menu"):
                for each in pages:
                    if each.menu:
                        _entry(view, each, page)
            _switches(view)
        with ui.element("div").props('id="content" tabindex="-1"').classes("main"):
            yield


def heading(view: View, title: str, *, note: str | None = None) -> ui.element:
    """The page's first line. Returns the place at its right, for buttons."""
    with ui.element("header").classes("heading"):
        with ui.element("div").classes("heading-text"):
            ui.label(title).props("role=heading aria-level=1").classes("h1")
            if note:
                ui.label(note).classes("muted")
        return ui.element("div").classes("toolbar")


def card(title: str | None = None, *, note: str | None = None) -> ui.element:
    """A section with a title of its own; use as a context."""
    section = ui.element("section").classes("card")
    with section:
        if title:
            ui.label(title).props("role=heading aria-level=2").classes("h2")
        if note:
            ui.label(note).classes("muted card-note")
    return section


def row() -> ui.element:
    """Things side by side, wrapping where there is no room."""
    return ui.element("div").classes("toolbar")


def button(
    text: str,
    on_click: Callable[..., Any] | None = None,
    *,
    icon: str | None = None,
    kind: str = "plain",
    label: str = "",
) -> ui.button:
    """A button. `kind`: "primary" (one on a page), "plain", "quiet", "danger"; `label`: what one without text does."""
    props = "no-caps unelevated" + (" round dense" if not text else "")
    shown = ui.button(text, icon=icon, color=None, on_click=on_click).props(props).classes(f"button button-{kind}")
    if label:
        shown.props["aria-label"] = label
    return shown


def state_badge(view: View, state: str) -> ui.element:
    """A run's state: colour, icon and word."""
    with ui.element("span").classes(f"badge badge-{state}") as badge:
        ui.icon(_STATE_ICONS.get(state, "help_outline")).props("aria-hidden=true")
        ui.label(view.maybe(f"frame.state_{state}") or state)
    return badge


def problems(found: Sequence[Problem]) -> ui.element:
    """Errors and what to do about them, in the reader's language as far as we have words for them."""
    language = reader()
    with ui.element("div").classes("problems").props("role=alert") as box:
        for problem in found:
            what, expected, fix = (
                translated(text or "", language) for text in (problem.what, problem.expected, problem.fix)
            )
            with ui.element("div").classes("problem"):
                ui.label(f"{problem.where}: {what}" if problem.where else what).classes("problem-what")
                if expected:
                    ui.label(f"→ {expected}").classes("muted")
                if fix:
                    ui.label(fix).classes("problem-fix")
    return box


def verdict(view: View, checked: Checked) -> None:
    """What a form's check found: what is wrong, or that nothing is and what is worth knowing."""
    if checked.problems:
        problems(checked.problems)
        return
    all_well(view.t("frame.valid"))
    for notice in checked.notices:
        ui.label(view.said(notice)).classes("muted small")


def all_well(text: str) -> None:
    """A line that says what is right."""
    with ui.element("div").classes("all-well"):
        ui.icon("check_circle").props("aria-hidden=true")
        ui.label(text)


def empty(icon: str, text: str) -> ui.element:
    """What stands where there is nothing yet; use as a context for a button."""
    box = ui.element("div").classes("empty")
    with box:
        ui.icon(icon).props("aria-hidden=true")
        ui.label(text)
    return box


def figure(label: str, value: str, *, note: str = "") -> tuple[ui.label, ui.label]:
    """A number that is read at a glance. Returns its value's and its note's label, to change them."""
    with ui.element("div").classes("figure"):
        ui.label(label).classes("figure-label")
        shown = ui.label(value).classes("figure-value")
        below = ui.label(note).classes("figure-note")
    return shown, below


def copy_block(view: View, text: str) -> ui.element:
    """Text in a box, with a button that copies it."""
    with ui.element("div").classes("code") as box:
        body = ui.element("pre").classes("code-text").props("tabindex=0")
        with body:
            ui.label(text).classes("code-words")
        copy = button("", icon="content_copy", kind="quiet", label=view.t("frame.copy")).classes("code-copy")
        copy.on("click", js_handler="(event) => trueupCopy(event)")
    return box


def set_code(block: ui.element, text: str) -> None:
    """Other text in a `copy_block`."""
    (words,) = [one for one in block.descendants() if isinstance(one, ui.label)]
    words.set_text(text)


def _entry(view: View, page: Page, open_now: Page) -> None:
    """An entry of the menu, marked if the open page is this one or below it."""
    current = page.path in (open_now.path, open_now.below)
    link = ui.link(target=page.path).classes("menu-entry" + (" menu-current" if current else ""))
    if current:
        link.props(f"aria-current={'page' if page is open_now else 'true'}")
    with link:
        ui.icon(page.icon).props("aria-hidden=true")
        ui.label(view.t(page.title))


def _switches(view: View) -> None:
    """Language and theme: cookies of the browser, read again with the page."""
    other = next(name for name in LANGUAGES if name != view.language)
    theme, icon = _THEMES[view.theme]
    with ui.element("div").classes("switches"):
        language = button(LANGUAGES[other], kind="quiet").props(f'lang="{other}"')
        language.on("click", js_handler=f"() => trueupChoose('language', '{other}')")
        shade = button("", icon=icon, kind="quiet", label=view.t(f"frame.theme_{theme}"))
        shade.on("click", js_handler=f"() => trueupChoose('theme', '{theme}')")
