"""What a page gets: the reader's language, the address, and where things lie."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from nicegui import ui

from trueup.inference.runs import age
from trueup.web.jobs import Jobs
from trueup.web.phrases import translated, translated_lines
from trueup.web.speakers import Speakers
from trueup.web.words import DEFAULT, LANGUAGES, find, preferred, say
from trueup.web.workspace import Workspace

LANGUAGE_COOKIE, THEME_COOKIE = "trueup_language", "trueup_theme"


@dataclass(frozen=True)
class View:
    """One look at one page.

    Attributes:
        theme: "light", "dark", or "auto" as the system has it.
        path, query: the blanks of the page's address, and what follows its question mark.
        address: the page's path as it was asked for.
    """

    workspace: Workspace
    jobs: Jobs
    speakers: Speakers
    language: str
    theme: str
    address: str
    path: Mapping[str, str]
    query: dict[str, str]

    def t(self, key: str, **values: object) -> str:
        """A word or sentence in the reader's language."""
        return say(key, self.language, **values)

    def maybe(self, key: str) -> str | None:
        """The same, or None where no table has it."""
        return find(key, self.language)

    def said(self, text: str) -> str:
        """A sentence of the program in the reader's language; as it is where we have no words for it."""
        return translated(text, self.language)

    def said_lines(self, text: str) -> str:
        """The same of a process's last words."""
        return translated_lines(text, self.language)

    def ago(self, moment: float) -> str:
        """How long since a moment (seconds since the epoch), in its largest unit."""
        text = age(time.time() - moment)
        return self.t(f"frame.age_{text[-1]}", count=text[:-1])

    def remember(self, **choices: str | None) -> None:
        """Put choices into the address (None takes one out), so that a reload and a copied link keep them."""
        for name, value in choices.items():
            if value in (None, ""):
                self.query.pop(name, None)
            else:
                self.query[name] = str(value)
        target = self.address + (f"?{urlencode(self.query)}" if self.query else "")
        ui.run_javascript(f"history.replaceState(history.state, '', {_literal(target)})")

    def open(self, address: str, **query: str) -> None:
        """Go to another page."""
        ui.navigate.to(address + (f"?{urlencode(query)}" if query else ""))


def view_of(request: Request, workspace: Workspace, jobs: Jobs, speakers: Speakers) -> View:
    """The view that a request asks for."""
    language = request.cookies.get(LANGUAGE_COOKIE, "")
    theme = request.cookies.get(THEME_COOKIE, "")
    return View(
        workspace=workspace,
        jobs=jobs,
        speakers=speakers,
        language=language if language in LANGUAGES else preferred(request.headers.get("accept-language", "")),
        theme=theme if theme in ("light", "dark") else "auto",
        address=request.url.path,
        path={name: str(value) for name, value in request.path_params.items()},
        query=dict(request.query_params),
    )


def reader() -> str:
    """The language of the page that is being built, or whose event is handled."""
    language = ui.context.client.page.resolve_language() or DEFAULT
    return next((name for name in LANGUAGES if language.startswith(name)), DEFAULT)


def _literal(text: Any) -> str:
    """A JavaScript literal that no text can leave."""
    return json.dumps(text).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
