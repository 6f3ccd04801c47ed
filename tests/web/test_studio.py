"""The studio as a whole: every page opens, in both languages and themes, and asks nobody outside."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from playwright.sync_api import expect

from trueup.web.pages import discover
from trueup.web.words import say

MENU = [page for page in discover() if page.menu]


def test_the_process_that_serves_pages_loads_no_torch():
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from trueup.web.run import make_app, Workspace, Settings\n"
        "make_app(Settings(port=0), Workspace(Path('.')))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("entry", MENU, ids=lambda entry: entry.path)
@pytest.mark.parametrize(("language", "theme"), [("en", "light"), ("zh", "dark")])
def test_every_page_opens(studio, make_page, entry, language: str, theme: str):
    page = make_page(language=language, theme=theme)
    page.goto(studio.url + entry.path)
    expect(page).to_have_title(f"{say(entry.title, language)} · trueup")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.locator("body")).to_contain_class(f"body--{theme}")


def test_language_and_theme_are_chosen_and_kept(studio, page):
    page.goto(studio.url)
    page.get_by_role("button", name="中文").click()
    expect(page).to_have_title("概览 · trueup")
    page.get_by_role("button", name="深色主题").click()
    expect(page.locator("body")).to_contain_class("body--dark")
    page.reload()
    expect(page).to_have_title("概览 · trueup")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")


@pytest.mark.parametrize("entry", MENU, ids=lambda entry: entry.path)
def test_nothing_is_wider_than_a_small_phone(studio, make_page, entry):
    page = make_page(width=360)
    page.goto(studio.url + entry.path)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_first_page_is_there_at_once(studio, make_page):
    make_page().goto(studio.url)  # what the browser keeps, and the server has read
    page = make_page()
    begun = time.monotonic()
    page.goto(studio.url)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    seconds = time.monotonic() - begun
    assert seconds < 30
    print(f"the first page took {seconds:.2f} s")


def test_keyboard_alone_reaches_the_content(studio, page):
    page.goto(studio.url)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_focused()
