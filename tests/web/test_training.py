"""Trainings from the browser: how they are begun, and what one says that cannot begin. The long way: test_journeys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect

from trueup.web.draft import Draft

SHORT = {
    "stage": "dpo", "model_name_or_path": "builtin:sql-tiny", "dataset": "dpo_zh_demo", "cutoff_len": "256",
    "max_steps": "3", "per_device_train_batch_size": "2", "logging_steps": "1", "save_strategy": "no",
    "plot_loss": "false", "device": "cpu",
}  # fmt: skip


def open_train(page: Page, url: str, name: str, keys: dict[str, str]) -> None:
    draft = Draft({**keys, "output_dir": f"saves/{name}"})
    page.goto(f"{url}/train?{urlencode({'draft': draft.pack()})}")
    expect(page.get_by_text("Ready to start")).to_be_visible()


def start(page: Page, name: str) -> None:
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", level=1, name=name)).to_be_visible()


def state(page: Page, text: str) -> None:
    expect(page.get_by_role("status").filter(has_text=re.compile(f"{text}$"))).to_be_visible(timeout=180_000)


def pid_of(run: Path) -> int:
    return int(json.loads((run / "logs/studio.json").read_text(encoding="utf-8"))["pid"])


def test_a_run_that_cannot_begin_says_why(studio, page):
    open_train(page, studio.url, "broken", {**SHORT, "dataset": "no_such_dataset"})
    start(page, "broken")
    state(page, "failed")
    expect(page.locator(".live-reason").get_by_text("no_such_dataset").first).to_be_visible()


@pytest.mark.parametrize("address", ["/run/nothing-here", "/run/..%2f..%2fetc", "/run/%252e%252e/x"])
def test_addresses_that_lead_nowhere_say_so(studio, page, address: str):
    page.watch.allowed += ["404"]
    page.goto(studio.url + address)
    expect(page.locator("body")).to_contain_text(re.compile("no run|no name|404|not found", re.IGNORECASE))
