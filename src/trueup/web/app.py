"""NiceGUI behind the guard, with every page there is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from nicegui import app as nicegui_app
from nicegui import ui
from starlette.types import ASGIApp

from trueup.errors import UserError
from trueup.inference.server.settings import Settings
from trueup.web.frame import frame, problems
from trueup.web.guard import StudioGuard
from trueup.web.jobs import Jobs
from trueup.web.pages import Page, discover
from trueup.web.speakers import Speakers
from trueup.web.view import View, view_of
from trueup.web.workspace import Workspace

STATIC = Path(__file__).parent / "static"
_LANGUAGES = {"en": "en-US", "zh": "zh-CN"}
_THEMES = {"light": False, "dark": True, "auto": None}
#: A page that is not heard of for so long begins anew. NiceGUI takes 0.4 of it for a browser that does not answer:
#: a training on the same machine may well keep one from answering for some seconds.
_RECONNECT_SECONDS = 45.0
_BUILD_SECONDS = 30.0


def make_app(settings: Settings, workspace: Workspace) -> ASGIApp:
    """The studio of one workspace."""
    pages = discover()
    jobs, speakers = Jobs(workspace), Speakers(workspace)
    nicegui_app.on_shutdown(speakers.close)
    nicegui_app.add_static_files("/static", STATIC)
    styles = "".join(f'<link rel="stylesheet" href="/static/{file.name}">' for file in sorted(STATIC.glob("*.css")))
    ui.add_head_html(styles + '<script src="/static/studio.js"></script>', shared=True)
    for page in pages:
        handler = _handler(page, pages, workspace, jobs, speakers)
        ui.page(page.path, reconnect_timeout=_RECONNECT_SECONDS, response_timeout=_BUILD_SECONDS)(handler)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        app, title="trueup", favicon=STATIC / "favicon.svg", tailwind=False, show_welcome_message=False,
        reconnect_timeout=_RECONNECT_SECONDS,
    )  # fmt: skip
    return StudioGuard(app, settings)


def _handler(
    page: Page, pages: list[Page], workspace: Workspace, jobs: Jobs, speakers: Speakers
) -> Callable[[Request], Awaitable[None]]:
    async def handler(request: Request) -> None:
        view = view_of(request, workspace, jobs, speakers)
        _dress(view)
        with frame(view, page, pages):
            try:
                await _build(page, view)
            except UserError as error:  # an id that leads nowhere, a file that says nothing
                problems(error.problems)

    return handler


async def _build(page: Page, view: View) -> Any:
    done = page.build(view)
    return await done if inspect.isawaitable(done) else done


def _dress(view: View) -> None:
    """The reader's language and theme, before the first byte is sent."""
    client = ui.context.client
    client.page = copy.copy(client.page)
    client.page.language = _LANGUAGES[view.language]
    client.page.dark = _THEMES[view.theme]
