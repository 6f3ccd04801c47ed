"""The first page: what runs, what ran last, and where to begin."""

from __future__ import annotations

from nicegui import ui

from trueup.web.frame import heading
from trueup.web.pages import page
from trueup.web.view import View


@page("/", icon="home", order=0)
def home(view: View) -> None:
    """The overview."""
    heading(view, view.t("home.title"), note=view.t("home.note"))
    ui.label("…")
