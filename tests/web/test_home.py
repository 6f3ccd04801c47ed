"""The first page."""

from __future__ import annotations

import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import expect  # noqa: E402

from tests.web.test_runs import write_run  # noqa: E402


def test_someone_new_finds_a_run_that_needs_nothing(studio, page):
    page.goto(studio.url)
    page.get_by_role("link", name="Try it in a minute").click()
    expect(page.get_by_text("Ready to start")).to_be_visible()
    expect(page.locator(".code-words").first).to_contain_text("sql_pairs_demo")
    expect(page.locator(".code-words").first).to_contain_text("builtin:sql-tiny")


def test_runs_are_on_the_first_page_as_they_stand(make_studio, make_page, tmp_path):
    studio = make_studio(tmp_path)
    page = make_page(studio)
    page.goto(studio.url)
    expect(page.get_by_role("link", name="Bring your data")).to_be_visible()
    write_run(tmp_path, "sql/lora/one", final=0.9)  # seen without a reload
    line = page.locator(".home-run")
    expect(line.get_by_text("finished")).to_be_visible()
    line.get_by_role("link", name="sql/lora/one").click()
    expect(page.get_by_role("heading", level=1, name="sql/lora/one")).to_be_visible()
