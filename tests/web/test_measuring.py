"""Evaluations and exports from the browser: real ones of a tiny run, and reports that mean harm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import expect  # noqa: E402

from trueup.errors import ConfigError  # noqa: E402
from trueup.web.chores import Chores, _last_words, _progress  # noqa: E402
from trueup.web.draft import Draft  # noqa: E402
from trueup.web.results import Evaluation, Interval  # noqa: E402
from trueup.web.verb_form import written  # noqa: E402
from trueup.web.workspace import Workspace  # noqa: E402

EVIL = '<img src=x onerror=alert(1)>" onclick=alert(1) x="{{7*7}}'
SMALL = {
    "eval_models": "saves/tiny/dpo", "eval_dataset": "dpo_en_demo", "max_samples": "4", "bootstrap_samples": "20",
    "cutoff_len": "128", "eval_measures": "preference", "device": "cpu",
}  # fmt: skip


def test_a_run_is_measured_and_exported(arena, make_page, adapted):
    studio = arena
    page, other = make_page(studio), make_page(studio, language="zh")
    page.goto(f"{studio.url}/evaluate?{urlencode({'draft': Draft(SMALL).pack()})}")
    expect(page.get_by_text("Ready to start")).to_be_visible()
    expect(page.locator(".code-words").first).to_contain_text("trueup eval saves/tiny/dpo")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", level=1, name="saves/tiny/dpo/eval")).to_be_visible()

    other.goto(f"{studio.url}/export?run=tiny/dpo")
    other.get_by_role("button", name="开始", exact=True).click()
    expect(other.get_by_role("heading", level=1, name="exports/dpo")).to_be_visible()

    expect(page.get_by_role("status")).to_contain_text("finished", timeout=180_000)
    expect(page.get_by_role("rowheader", name="preference accuracy").first).to_be_visible()
    expect(page.get_by_role("img", name="Preferences").locator("svg")).to_be_visible()
    report = json.loads((adapted / "saves/tiny/dpo/eval/eval_report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in report["models"]] == ["start", "dpo"]
    with page.expect_download() as fetched:
        page.get_by_role("button", name="Fetch eval_report.md").click()
    assert fetched.value.suggested_filename == "eval_report.md"

    expect(other.get_by_role("status")).to_contain_text("已完成", timeout=180_000)
    assert (adapted / "exports/dpo/model.safetensors").is_file()
    expect(other.locator(".code-words").first).to_contain_text("trueup chat --model_name_or_path exports/dpo")
    other.get_by_role("button", name="与它对话").click()
    expect(other.get_by_role("combobox", name="模型", exact=True)).to_have_value("./exports/dpo")


def test_what_cannot_be_done_says_why(studio, page):
    draft = {"model_name_or_path": "builtin:sql-tiny", "export_dir": "../out"}
    page.goto(f"{studio.url}/export?{urlencode({'draft': Draft(draft).pack()})}")
    expect(page.get_by_text("is no result of `trueup export`")).to_be_visible()
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_disabled()
    draft = {**SMALL, "eval_models": "", "model_name_or_path": "builtin:sql-tiny", "task_dir": "data"}
    page.goto(f"{studio.url}/evaluate?{urlencode({'draft': Draft(draft).pack()})}")
    expect(page.get_by_text("`task_dir` is for a shell")).to_be_visible()
    page.goto(studio.url + "/evaluation/saves/nothing")
    expect(page.get_by_text("there is no saves/nothing")).to_be_visible()

    folder = studio.root / "saves/evil/eval"
    folder.mkdir(parents=True)
    figures = {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4}, EVIL: {"value": None}}
    models = [{"name": name, "figures": figures, "groups": {EVIL: {"value": 1.0}}} for name in ("start", EVIL)]
    kept = {"models": models, "data": {"datasets": [EVIL]}, "settings": {EVIL: EVIL}, "notes": [EVIL],
            "differences_to_the_first": {EVIL: {"accuracy": {"value": -0.1, "low": -0.2, "high": -0.05}}}}  # fmt: skip
    (folder / "eval_report.json").write_text(json.dumps(kept), encoding="utf-8")
    asked = {"prompt": [{"role": "user", "content": EVIL}], "answers": {EVIL: EVIL}}
    (folder / "eval_answers.jsonl").write_text(json.dumps(asked), encoding="utf-8")
    page.goto(studio.url + "/evaluation/saves/evil/eval")
    expect(page.get_by_role("article")).to_contain_text(EVIL)
    expect(page.get_by_role("cell", name="−0.1 [−0.2, −0.05]")).to_be_visible()
    assert page.locator("#content img:not([role])").count() == 0 and page.locator("[onclick]").count() == 0


@pytest.mark.prove
def test_an_evaluation_is_stopped_and_a_failed_one_tells_its_reason(make_studio, make_page, tmp_path):
    studio = make_studio(tmp_path)
    page = make_page(studio)
    draft = {"model_name_or_path": "builtin:sql-tiny", "eval_dataset": "no_such_rows", "stage": "dpo"}
    page.goto(f"{studio.url}/evaluate?{urlencode({'draft': Draft(draft).pack()})}")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("failed", timeout=120_000)
    expect(page.get_by_role("alert")).to_contain_text("no_such_rows")
    draft = {**draft, "eval_dataset": "dpo_en_demo", "output_dir": "saves/long/eval"}
    page.goto(f"{studio.url}/evaluate?{urlencode({'draft': Draft(draft).pack()})}")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("button", name="Stop now").click()
    expect(page.get_by_role("status")).to_contain_text("stopped", timeout=60_000)
    expect(page.get_by_role("button", name="Once more")).to_be_visible()


# --- without a browser ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "saves", "saves/../x", "data/x", "/etc/x", "saves/%2e%2e/x", "exports/x", "saves/.x"]
)
def test_results_of_evaluations_lie_with_the_runs(tmp_path: Path, name: str):
    (tmp_path / "saves").mkdir()
    with pytest.raises(ConfigError):
        Chores(Workspace(tmp_path), "eval").path(name)


def test_the_written_command_is_the_words():
    words = ["saves/a b", "--eval_dataset", "x y", "--rule_regex=--x", "--output_dir", "saves/$(touch z)"]
    assert shlex.split(written("eval", words).replace("\\\n", " ")) == ["trueup", "eval", *words]


def test_progress_and_reasons_are_read_from_the_log():
    log = "note: a\nnote: reading by dpo: 1,200 of 6,000 rows, 0:01:20 left\n"
    assert _progress(log) == {"doing": "reading by dpo: 1,200 of 6,000 rows, 0:01:20 left", "share": 0.2}
    assert _progress("note: loading\n") == {"doing": "loading"} and _progress("") == {}
    assert _last_words("note: a\nerror: no model\n  fix: name one\n") == "error: no model\n  fix: name one"


def test_figures_that_are_none_are_left_blank():
    found = Evaluation(["a"], {"models": [{"name": "a", "figures": {"x": {"value": None}, "y": {"value": 12345.6}}}]})
    assert found.figures() == {"x": [None], "y": [Interval(12345.6)]}
    assert Interval(-0.00012, -1.0, 2.0).shown("+") == "−0.00012 [−1, 2]"
