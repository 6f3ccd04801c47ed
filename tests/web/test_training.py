"""Trainings from the browser: real ones, of the built-in model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest
from playwright.sync_api import Page, expect

from trueup.training.run_files import read_config, read_metrics, read_status
from trueup.web.draft import Draft

SHORT = {
    "stage": "dpo", "model_name_or_path": "builtin:sql-tiny", "dataset": "dpo_zh_demo", "cutoff_len": "256",
    "max_steps": "3", "per_device_train_batch_size": "2", "logging_steps": "1", "save_strategy": "no",
    "plot_loss": "false", "device": "cpu",
}  # fmt: skip
LONG = {**SHORT, "max_steps": "100000", "save_strategy": "steps", "save_steps": "20", "save_total_limit": "1"}


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


def test_a_newcomer_trains_the_built_in_model(studio, page):
    """G1, from the first click: at most 12."""
    clicks = 0

    def click(what) -> None:
        nonlocal clicks
        what.click()
        clicks += 1

    page.goto(studio.url)
    click(page.get_by_role("link", name="Train", exact=True))
    data = page.get_by_role("combobox", name="Dataset", exact=True)
    click(data)
    data.fill("dpo_zh")
    click(page.get_by_role("option", name="dpo_zh_demo"))
    page.get_by_role("textbox", name="Epochs").fill("1")
    page.get_by_role("textbox", name="Learning rate").fill("1e-4")
    expect(page.locator(".code-words").first).to_contain_text("--learning_rate 1e-4")
    expect(page.locator(".code-words").first).to_contain_text("dpo_zh_demo")
    click(page.get_by_role("button", name="Start", exact=True))
    state(page, "finished")
    expect(page.get_by_role("img", name="Loss").locator("svg")).to_be_visible()
    assert clicks <= 12


def test_the_previewed_command_is_the_same_run(studio, page, tmp_path):
    open_train(page, studio.url, "same/studio", SHORT)
    command = page.locator(".code-words").first.text_content()
    start(page, "same/studio")
    state(page, "finished")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["trueup", "train"]
    words[words.index("--output_dir") + 1] = "saves/same/shell"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", *words], cwd=studio.root, env=environment, check=True, capture_output=True)
    one, other = studio.root / "saves/same/studio", studio.root / "saves/same/shell"
    assert {**read_config(one), "output_dir": ""} == {**read_config(other), "output_dir": ""}
    kept = [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "rewards/margins", "kl")}
            for row in read_metrics(one)]  # fmt: skip
    assert kept == [{k: row[k] for k in row if k in kept[0]} for row in read_metrics(other)]


def test_two_contexts_start_one_run_that_outlives_the_server_and_shows_its_end(make_studio, make_page, tmp_path):
    """J2, J3 and J4 on one training."""
    studio = make_studio(tmp_path)
    first, second = make_page(studio), make_page(studio)
    run = tmp_path / "saves" / "shared"
    for one in (first, second):
        one.watch.allowed += ["ERR_CONNECTION", "WebSocket", "Failed to load resource", "xhr poll"]
        open_train(one, studio.url, "shared", LONG)
    first.get_by_role("button", name="Start", exact=True).dblclick()
    second.get_by_role("button", name="Start", exact=True).click()
    for one in (first, second):
        expect(one.get_by_role("heading", level=1, name="shared")).to_be_visible()
    state(first, "running")
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["shared"]
    pid = pid_of(run)
    expect(first.get_by_role("img", name="Loss").locator("svg")).to_be_visible()
    second.close()  # a file that it still fetches would be missed
    studio.stop(kill=True)
    assert psutil.pid_exists(pid)
    studio.start()
    first.goto(f"{studio.url}/run/shared")
    state(first, "running")
    expect(first.get_by_role("img", name="Loss").locator("svg")).to_be_visible()  # the new server talks to the page
    assert pid_of(run) == pid
    first.get_by_role("button", name="Stop and save").click()
    state(first, "stopped")
    step = read_status(run)["step"]
    first.reload()
    first.get_by_role("button", name="Resume").click()
    state(first, "running")
    os.kill(pid_of(run), signal.SIGKILL)
    state(first, "failed")
    expect(first.get_by_text("process is gone")).to_be_visible()
    expect(first.get_by_role("button", name="Resume")).to_be_visible()
    assert step > 0
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == sorted(set(steps))


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
