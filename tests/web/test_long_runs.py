"""A run of 100,000 steps stays quick, and an hour of live charts takes no more memory than its first minutes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import expect  # noqa: E402

from trueup.training.run_lock import this_process  # noqa: E402

STEPS = 100_000
SOAK_SECONDS = float(os.environ.get("STUDIO_SOAK_SECONDS", "3600"))
_NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl", "kl/chosen",
    "logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "tokens_per_second", "memory_gb",
)  # fmt: skip


def row(step: int) -> str:
    """A line of metrics.jsonl that no other step has."""
    values = {name: 1 + (step * (number + 7919) % 9973) / 9973 for number, name in enumerate(_NAMES)}
    return json.dumps({"step": step, "time": 1e9 + step, "num_tokens": 100 * step, "epoch": step / STEPS, **values})


def write(root: Path, steps: int) -> Path:
    """A run that says it trains in this very process."""
    path = root / "saves" / "long"
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(row(step) + "\n" for step in range(1, steps + 1)), encoding="utf-8")
    status = {"state": "running", "step": steps, "total_steps": 10 * STEPS, "heartbeat": time.time(), **this_process()}
    (path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return path


def append(path: Path, step: int) -> str:
    """One more row. Returns its loss as the page shows it."""
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(row(step) + "\n")
    return f"{json.loads(row(step))['loss']:.4g}"


@pytest.mark.prove
def test_100_000_steps(make_studio, make_page, tmp_path):
    path = write(tmp_path, STEPS)
    studio = make_studio(tmp_path)
    server, page = psutil.Process(studio.process.pid), make_page(studio, width=1440)
    begun, used = time.monotonic(), sum(server.cpu_times()[:2])
    page.goto(studio.url + "/run/long")
    expect(page.locator(".chart svg").first).to_be_visible()
    print(f"first chart {time.monotonic() - begun:.2f} s, server {sum(server.cpu_times()[:2]) - used:.2f} s of CPU")
    waits, used = [], sum(server.cpu_times()[:2])
    for step in range(STEPS + 1, STEPS + 11):
        begun, loss = time.monotonic(), append(path, step)
        expect(page.locator(".figure-value").nth(2)).to_have_text(loss)
        waits.append(time.monotonic() - begun)
    cost = (sum(server.cpu_times()[:2]) - used) / len(waits)
    print(f"updates after {sorted(waits)[5]:.2f} s (up to {max(waits):.2f} s), server {cost:.3f} s of CPU each")
    assert cost < 1


@pytest.mark.prove
def test_memory_stays_flat_while_charts_are_live(make_studio, make_page, tmp_path):
    path = write(tmp_path, 1000)
    studio = make_studio(tmp_path)
    server, page = psutil.Process(studio.process.pid), make_page(studio)
    page.goto(studio.url + "/run/long")
    seen: list[tuple[float, float]] = []
    begun, step = time.monotonic(), 1000
    while time.monotonic() - begun < SOAK_SECONDS:
        step += 1
        append(path, step)
        page.wait_for_timeout(1000)
        heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        seen.append((server.memory_info().rss / 2**20, heap))
        if len(seen) % 240 == 0:
            print(f"{time.monotonic() - begun:.0f} s: server {seen[-1][0]:.0f} MB, page {heap:.0f} MB", flush=True)
    first, last = seen[len(seen) // 6 : len(seen) // 3], seen[-len(seen) // 6 :]
    for name, number in (("server", 0), ("page", 1)):
        early, late = max(one[number] for one in first), max(one[number] for one in last)
        print(f"{name}: {early:.0f} MB early, {late:.0f} MB in the end, {len(seen)} updates")
        assert late < 1.3 * early + 20
