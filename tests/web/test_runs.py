"""The page of runs: a table, curves over each other, what configs differ in, tags and notes. Journey J7."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import expect  # noqa: E402

from trueup.web.compare import best, differences  # noqa: E402
from trueup.web.remarks import Remarks, read_remarks, write_remarks  # noqa: E402

STEPS = 40


def write_run(root: Path, run_id: str, *, final: float, rate: float = 1e-4, note: str = "") -> Path:
    """A finished run's files, as a training leaves them."""
    path = root / "saves" / run_id
    path.mkdir(parents=True)
    (path / "run.yaml").write_text(
        f"stage: dpo\nmodel_name_or_path: builtin:sql-tiny\nlearning_rate: {rate}\noutput_dir: saves/{run_id}\n"
    )
    status = {"state": "finished", "step": STEPS, "total_steps": STEPS, "pid": 1, "heartbeat": time.time()}
    (path / "status.json").write_text(json.dumps(status))
    with open(path / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, STEPS + 1):
            row = {"step": step, "time": 1e9 + step, "num_tokens": 100 * step, "loss": 0.7 - 0.4 * step / STEPS}
            file.write(json.dumps({**row, "rewards/accuracies": final * step / STEPS}) + "\n")
        file.write(json.dumps({"step": STEPS, "time": 1e9 + STEPS, "eval_rewards/accuracies": final}) + "\n")
    if note:
        write_remarks(path, Remarks(note=note))
    return path


@pytest.fixture(scope="module")
def filled(make_studio, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root, "sql/lora/first", final=0.8)
    write_run(root, "sql/lora/second", final=0.95, rate=3e-4)
    write_run(root, "sql/lora/<img src=x onerror=alert(1)>".replace("<", "").replace(">", ""), final=0.5,
              note="<script>alert(1)</script>")  # fmt: skip
    return make_studio(root)


def tick(page, run_id: str) -> None:
    page.get_by_role("row").filter(has_text=run_id).get_by_role("checkbox").click()


def test_two_runs_are_laid_over_each_other(filled, make_page):
    page = make_page(filled)
    page.goto(filled.url + "/runs")
    expect(page.get_by_role("row").filter(has_text="second").get_by_label("Best of these")).to_be_visible()
    tick(page, "first")
    tick(page, "second")
    expect(page.get_by_role("img", name="Curves of loss")).to_be_visible()
    expect(page.get_by_role("cell", name="learning_rate")).to_be_visible()
    expect(page.get_by_role("cell", name="0.0003")).to_be_visible()
    expect(page.get_by_role("cell", name="output_dir")).to_have_count(0)
    page.get_by_role("button", name="Tokens").click()
    expect(page).to_have_url(re.compile(r"runs=.*second.*x=tokens"))
    page.reload()  # what was chosen is in the address
    expect(page.get_by_role("img", name="Curves of loss")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="second").get_by_role("checkbox")).to_be_checked()


def test_tags_and_notes_are_kept_beside_the_run(filled, make_page):
    page = make_page(filled)
    page.goto(filled.url + "/runs")
    page.get_by_role("button", name="Tags and note of sql/lora/first").click()
    page.get_by_label("Tags, separated by commas").fill("baseline, paper ,baseline")
    page.get_by_role("textbox", name="Note", exact=True).fill("kept for the table")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row").filter(has_text="first")).to_contain_text("paper")
    assert read_remarks(filled.root / "saves/sql/lora/first").tags == ("baseline", "paper")
    expect(page.get_by_role("dialog")).to_have_count(0)  # while it closes, it takes the focus back
    page.get_by_label("Search runs").fill("paper")
    expect(page.get_by_role("row").filter(has_text="second")).to_have_count(0)


def test_text_of_people_stays_text(filled, make_page):
    page = make_page(filled)
    page.goto(filled.url + "/runs")
    expect(page.get_by_text("<script>alert(1)</script>")).to_be_visible()


def test_an_archived_run_is_shown_when_asked_for(make_studio, make_page, tmp_path):
    path = write_run(tmp_path, "old", final=0.5)
    write_run(tmp_path, "new", final=0.6)
    write_remarks(path, Remarks(archived=True))
    studio = make_studio(tmp_path)
    page = make_page(studio)
    page.goto(studio.url + "/runs")
    expect(page.get_by_role("link", name="new", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="old", exact=True)).to_have_count(0)
    page.get_by_role("switch", name="Show archived").click()
    expect(page.get_by_role("link", name="old", exact=True)).to_be_visible()


# --- what the page says, without a browser ----------------------------------------------------------


def test_differences_leave_out_what_is_the_same_and_what_only_names_a_run():
    one, other = {"a": 1, "b": [1], "output_dir": "x"}, {"a": 1, "b": [2], "c": None, "output_dir": "y"}
    assert differences([one, other]) == {"b": [[1], [2]]}
    assert differences([one, {**other, "c": 3}]) == {"b": [[1], [2]], "c": [None, 3]}


def test_the_best_run_is_judged_by_what_both_report():
    assert best({"a": {"loss": 1.0, "eval_loss": 2.0}, "b": {"loss": 0.5}}) == ("b", "loss")
    assert best({"a": {"eval_loss": 1.0}, "b": {"eval_loss": 2.0, "loss": float("nan")}}) == ("a", "eval_loss")
    assert best({"a": {"loss": 1.0}}) is None


def test_torn_remarks_are_none(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/remarks.json").write_text('{"tags": 3, "note"', encoding="utf-8")
    assert read_remarks(tmp_path) == Remarks()
