"""J8: whatever a run's files say is text, wherever it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import expect  # noqa: E402

from tests.web.test_runs import write_run  # noqa: E402
from trueup.web.remarks import Remarks, write_remarks  # noqa: E402

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>{{7*7}}"


def evil_run(root: Path) -> None:
    """A run whose every text is an attack."""
    path = write_run(root, "evil", final=0.9)
    write_remarks(path, Remarks(note=EVIL, tags=[EVIL]))
    (path / "run.yaml").write_text(json.dumps({"stage": "grpo", "model_name_or_path": EVIL}), encoding="utf-8")
    (path / "logs").mkdir(exist_ok=True)
    (path / "logs/studio.log").write_text(EVIL + "\n", encoding="utf-8")
    answer = {"step": 1, "prompt": EVIL, "completion": EVIL, "rewards": {EVIL: 1.0}, "reward": 1.0}
    (path / "completions.jsonl").write_text(json.dumps(answer) + "\n", encoding="utf-8")
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 41, EVIL: 1.0, f"rewards/{EVIL}/mean": 1.0, "rewards/b/mean": 2.0}) + "\n")
    status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    status |= {"state": "failed", "message": EVIL, "warnings": [{"step": 1, "text": EVIL}]}
    (path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    named = write_run(root, "named", final=0.5)
    named.rename(root / "saves" / EVIL.replace("/", ""))


def test_texts_of_a_run_stay_texts(harmful, make_page):
    studio, page = harmful, make_page(harmful)
    page.goto(studio.url + "/run/evil")
    expect(page.locator(".live-why")).to_have_text(EVIL)
    expect(page.locator(".log")).to_have_text(EVIL)
    expect(page.locator(".completion").first).to_contain_text(EVIL)
    page.get_by_text("More numbers").click()
    expect(page.get_by_role("heading", name=EVIL, exact=True)).to_be_visible()
    page.locator(".chart").first.hover()
    page.goto(studio.url)
    expect(page.locator(".home-run").first).to_contain_text("script>{{7*7}}")
    page.goto(studio.url + "/runs?runs=evil")
    expect(page.locator(".run-note")).to_have_text(EVIL)
    expect(page.locator(".chart svg").first).to_be_visible()
    page.goto(studio.url + "/train?run=evil")
    expect(page.locator(".code-words").first).to_contain_text("onerror")
    expect(page).to_have_title("Train · trueup")
    assert page.locator("img[src=x]").count() == 0


def test_a_name_that_is_none_is_refused_where_it_is_typed(studio, page):
    page.goto(studio.url + "/train")
    for name in (EVIL, "../out", "/etc/x", "x; touch pwned"):
        page.get_by_role("textbox", name="Name, under saves/").fill(name)
        if "touch" in name:  # a name like another: a word of the command, quoted
            expect(page.locator(".code-words").first).to_contain_text("'saves/x; touch pwned'")
        else:
            expect(page.locator(".train-found").get_by_role("alert")).to_be_visible()
            expect(page.get_by_role("button", name="Start", exact=True)).to_be_disabled()
    assert not (studio.root / "pwned").exists()
