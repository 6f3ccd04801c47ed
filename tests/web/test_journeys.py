"""The long way through the studio: from the first click to compared answers, and a run that survives everything."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys

import psutil
from playwright.sync_api import Page, expect

from tests.web.test_training import open_train, pid_of, state
from trueup.training.run_files import read_config, read_metrics, read_status

LONG = {
    "stage": "dpo", "model_name_or_path": "builtin:sql-tiny", "dataset": "sql_pairs_demo", "max_samples": "16",
    "cutoff_len": "128", "max_steps": "100000", "per_device_train_batch_size": "1", "logging_steps": "1",
    "plot_loss": "false", "device": "cpu", "save_strategy": "steps", "save_steps": "20", "save_total_limit": "1",
}  # fmt: skip


def drawn(page: Page, name: str) -> list[list[float]]:
    """The points of a chart's first curve, as the browser has them."""
    chart = page.get_by_role("img", name=name, exact=True)
    expect(chart.locator("svg")).to_be_visible()
    return chart.evaluate("(box) => getElement(box.id.slice(1)).chart.getOption().series[0].data")


def test_a_newcomer_trains_and_compares_and_the_command_is_the_same_run(studio, page):
    """G1 from the first click to two answers, at most 12 clicks; then the previewed command in a shell."""
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
    page.get_by_role("textbox", name="Learning rate", exact=True).fill("fast")
    expect(page.locator(".q-field--error")).to_contain_text("`learning_rate` cannot be 'fast'")
    for name, value in {"Epochs": "0.2", "Learning rate": "1e-4", "Cutoff length": "256"}.items():
        page.get_by_role("textbox", name=name, exact=True).fill(value)
    command = page.locator(".code-words").first
    for words in ("--learning_rate 1e-4", "dpo_zh_demo", "--cutoff_len 256", "--num_train_epochs 0.2"):
        expect(command).to_contain_text(words)
    expect(page.get_by_text("Ready to start")).to_be_visible()
    words = shlex.split(str(command.text_content()).replace("\\\n", " "))
    click(page.get_by_role("button", name="Start", exact=True))
    state(page, "finished")
    run = studio.root / words[words.index("--output_dir") + 1]
    metrics = read_metrics(run)
    assert drawn(page, "Loss") == [[row["step"], row["loss"]] for row in metrics if "loss" in row]
    click(page.get_by_role("button", name="Compare answers"))
    click(page.get_by_role("button", name="Load", exact=True))
    expect(page.get_by_text("ready", exact=True)).to_be_visible(timeout=180_000)
    page.get_by_role("textbox", name="Ask something").fill("你好")
    click(page.get_by_role("button", name="Send", exact=True))
    expect(page.get_by_role("article")).to_have_count(2)
    assert clicks <= 12

    assert words[:2] == ["trueup", "train"]
    words[words.index("--output_dir") + 1] = "saves/shell"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", *words], cwd=studio.root, env=environment, check=True, capture_output=True)
    other = studio.root / "saves/shell"
    assert {**read_config(run), "output_dir": ""} == {**read_config(other), "output_dir": ""}
    same = ("step", "loss", "grad_norm", "rewards/margins", "kl", "eval_loss")
    kept = [{key: row.get(key) for key in same} for row in metrics]
    assert kept == [{key: row.get(key) for key in same} for row in read_metrics(other)]


def test_two_contexts_start_one_run_that_outlives_the_server_stops_resumes_and_finishes(
    make_studio, make_page, tmp_path
):
    """J2, J3 and J4 on one training."""
    studio = make_studio(tmp_path)
    first, second = make_page(studio), make_page(studio)
    run = tmp_path / "saves" / "shared"
    for one in (first, second):
        one.watch.allowed += ["ERR_CONNECTION", "WebSocket", "Failed to load resource", "xhr poll"]
        open_train(one, studio.url, "shared", LONG)
    first.get_by_role("button", name="Start", exact=True).dblclick()
    second.get_by_role("button", name="Start", exact=True).focus()
    second.keyboard.press("Enter")
    for one in (first, second):
        expect(one.get_by_role("heading", level=1, name="shared")).to_be_visible()
    state(first, "running")
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["shared"]
    pid = pid_of(run)
    before = drawn(first, "Loss")[-1]
    first.reload()
    while drawn(first, "Loss")[-1] == before:  # it moves
        first.wait_for_timeout(200)

    second.close()  # a file that it still fetches would be missed
    studio.stop(kill=True)
    assert psutil.pid_exists(pid)
    studio.start()
    first.goto(f"{studio.url}/run/shared")
    state(first, "running")
    assert drawn(first, "Loss")  # the new server talks to the page
    assert pid_of(run) == pid

    first.get_by_role("button", name="Stop and save").dblclick()  # a second word would end it without saving
    state(first, "stopped")
    step = read_status(run)["step"]
    assert (run / f"checkpoint-{step}").is_dir()
    first.get_by_role("button", name="Resume").click()
    state(first, "running")
    os.kill(pid_of(run), signal.SIGKILL)
    state(first, "failed")
    expect(first.get_by_text("process is gone")).to_be_visible()

    config = run / "run.yaml"
    text = config.read_text(encoding="utf-8")
    last = read_status(run)["step"] + 3
    config.write_text(re.sub(r"max_steps: 100000", f"max_steps: {last}", text), encoding="utf-8")
    first.get_by_role("button", name="Resume").click()
    state(first, "finished")
    rows = [row for row in read_metrics(run) if "loss" in row]
    steps = [row["step"] for row in rows]
    assert 0 < step < steps[-1] and steps == list(range(1, steps[-1] + 1))
    points = drawn(first, "Loss")  # all of them, or the lowest and highest of each stretch
    known = {row["step"]: row["loss"] for row in rows}
    assert all(known[step] == loss for step, loss in points) and points[-1][0] == steps[-1]
