"""The pages of labelling: journey J6, two tabs, and what labels amount to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import Page, expect  # noqa: E402

from trueup.data.formats import parse_with  # noqa: E402
from trueup.data.layout import choose_layout  # noqa: E402
from trueup.data.registry import registered, resolve_datasets  # noqa: E402
from trueup.data.sources import read_rows  # noqa: E402
from trueup.errors import ConfigError, DataError  # noqa: E402
from trueup.training.run_files import read_status  # noqa: E402
from trueup.web import judged  # noqa: E402
from trueup.web.agreement import agreement, krippendorff  # noqa: E402
from trueup.web.labels import Item, Label, Project, add_vote, text_of  # noqa: E402
from trueup.web.rows import open_table, spec_of  # noqa: E402
from trueup.web.workspace import Workspace  # noqa: E402

EVIL = "<img src=x onerror=\"document.title='taken'\">"


def shown(page: Page) -> list[str]:
    """The two answers as they stand there."""
    return [page.get_by_label(f"Answer {name}").locator(".choice-text").text_content() or "" for name in "AB"]


def done(page: Page, text: str) -> None:
    expect(page.get_by_role("status").filter(has_text=text)).to_be_visible()


def test_five_pairs_are_labelled_by_keyboard_downloaded_and_trained_on(studio, page, tmp_path):
    """J6."""
    page.goto(f"{studio.url}/label?dataset=dpo_en_demo")
    page.get_by_label("Name of the project").fill("five")
    page.get_by_label("Pairs", exact=True).fill("5")
    page.get_by_role("button", name="Begin").click()
    page.get_by_label("Annotator").fill("Ann")
    page.get_by_label("Annotator").press("Enter")
    done(page, "0 of 5")
    kept: list[tuple[str, str]] = []
    for number, key in enumerate(["ArrowLeft", "ArrowRight", "1", "2", "ArrowLeft"], 1):
        sides = shown(page)
        kept.append((sides[0], sides[1]) if key in ("ArrowLeft", "1") else (sides[1], sides[0]))
        page.keyboard.press(key)
        done(page, f"{number} of 5")
        if number == 3:
            page.keyboard.press("u")
            done(page, "2 of 5")
            assert shown(page) == sides
            page.keyboard.press(key)
            done(page, "3 of 5")
    page.get_by_role("button", name="Results").last.click()
    expect(page.get_by_role("cell", name="5 / 5")).to_be_visible()
    with page.expect_download() as coming:
        page.get_by_role("button", name="Download").click()
    file = tmp_path / "five.jsonl"
    coming.value.save_as(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert sorted(found) == sorted(kept)
    page.get_by_role("button", name="Write and register").click()
    expect(page.get_by_text("5 rows in data/five_dpo.jsonl")).to_be_visible()
    assert (studio.root / "data/five_dpo.jsonl").read_bytes() == file.read_bytes()

    run = tmp_path / "run"
    words = ["--stage", "dpo", "--model_name_or_path", "builtin:sql-tiny", "--dataset", str(file), "--device", "cpu"]
    words += ["--output_dir", str(run), "--max_steps", "1", "--plot_loss", "false", "--save_strategy", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "trueup", "train", *words], env=environment, check=True, capture_output=True)
    assert read_status(run)["state"] == "finished"


def test_two_tabs_and_texts_of_others(studio, make_page):
    """One answer is kept, both tabs go on; nothing that a row says is markup (J8), nor who said it shown."""
    project = Project(studio.root, "tabs")
    kept = {"answers": [{"model": "secret-one"}, {"model": "secret-two"}]}
    project.add_items([Item.of(f"{EVIL} {n}", [EVIL + "a", EVIL + "b"], provenance=kept) for n in range(3)])
    tabs = [make_page(), make_page(language="zh", theme="dark", width=360)]
    for tab in tabs:
        tab.goto(f"{studio.url}/label/tabs?as=Ann")
        expect(tab.get_by_role("status")).to_contain_text("0")
        expect(tab.locator(".choice-text").first).to_contain_text("onerror")
        assert "secret" not in tab.content()
    tabs[0].keyboard.press("t")
    done(tabs[0], "1 of 3")
    done(tabs[1], "1 / 3")
    tabs[1].get_by_role("button", name="跳过").click()
    done(tabs[1], "2 / 3")
    done(tabs[0], "2 of 3")
    tabs[0].keyboard.press("Control+s")  # the browser's own
    tabs[0].get_by_role("button", name="Undo").click()
    done(tabs[0], "1 of 3")
    tabs[0].keyboard.press("ArrowRight")  # keys work behind a click, too
    done(tabs[0], "2 of 3")
    done(tabs[1], "2 / 3")
    assert tabs[1].evaluate("document.documentElement.scrollWidth") <= 360
    assert tabs[0].locator(".main img").count() == 0 and "taken" not in tabs[0].title()
    project.refresh()
    assert len(project.labels) == 2


@pytest.mark.parametrize("address", ["nothing", "..%2f..%2fdata", "%252e%252e"])
def test_addresses_that_are_no_project_say_so(studio, page, address: str):
    page.watch.allowed += ["404"]
    page.goto(f"{studio.url}/label/{address}")
    expect(page.locator("body")).to_contain_text(re.compile("no project|no name here|404"))


# --- what labels amount to, without a browser --------------------------------------------------------


def vote(root: Path, choice, who: str, answers=("a", "b"), asked: str = "q") -> None:
    add_vote(root, "votes", asked, list(answers), choice, who)


def test_the_majority_decides_and_the_rest_is_counted(tmp_path: Path):
    for choice, who in ((0, "x"), (0, "y"), (1, "z")):
        vote(tmp_path, choice, who)
    vote(tmp_path, 1, "other way round", ("b", "a"))  # the same two answers
    vote(tmp_path, 0, "x", ("c", "d"))
    vote(tmp_path, 1, "y", ("c", "d"))
    vote(tmp_path, "tie", "x", ("e", "f"))
    vote(tmp_path, "skip", "x", ("g", "h"))
    vote(tmp_path, 0, "x", ("same", "same"))
    project = Project(tmp_path, "votes")
    found = judged.verdicts(project, "pair")
    (row,) = judged.rows_of(found)
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("a", "b")
    assert row["votes"] == {"for": 3, "against": 1, "tie": 0} and row["annotators"][0] == "other way round"
    assert +found.left_out == Counter(undecided=1, tie=1, skip=1)


def test_of_several_answers_the_winner_beats_those_that_were_shown(tmp_path: Path):
    vote(tmp_path, 1, "x", ("a", "b", "c"))
    rows = judged.rows_of(judged.verdicts(Project(tmp_path, "votes"), "pair"))
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows} == {("b", "a"), ("b", "c")}
    project = Project(tmp_path, "shown")
    project.add_items([item := Item.of("q", ["a", "b", "c"])])
    project.add(Label(item.id, 2, "x", order=(2, 0)))
    (row,) = judged.rows_of(judged.verdicts(project, "pair"))
    assert row["rejected"][0]["content"] == "a"


@pytest.mark.parametrize("kind", ["pair", "feedback"])
def test_what_is_written_is_read_back_as_it_was_meant_and_is_registered(tmp_path: Path, kind: judged.Kind):
    place, folder = Workspace(tmp_path), tmp_path / "data"
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    add_vote(tmp_path, "votes", asked, ["Because.", "No idea, sorry."], 0, "x")
    add_vote(tmp_path, "votes", "为什么？", ["不知道。", "因为如此。"], 1, "x")
    project = Project(tmp_path, "votes")
    path, count = judged.write_dataset(place, project, kind, "votes_out")
    (spec,) = resolve_datasets(["votes_out"], folder)
    rows = read_rows(spec)
    layout = choose_layout(spec, rows.values, kind)
    read = [parse_with(layout, f"votes_out:{n}", row) for n, row in enumerate(rows)]
    meant = judged.verdicts(project, kind).examples
    assert len(read) == count == len(meant) == (2 if kind == "pair" else 4)
    for one, other in zip(read, meant, strict=True):
        fields = ("prompt", "chosen", "rejected") if kind == "pair" else ("prompt", "answer", "desirable")
        assert [getattr(one, name) for name in fields] == [getattr(other, name) for name in fields]
    judged.write_dataset(place, project, kind, "votes_out")  # again: the earlier file is kept
    assert len(list((tmp_path / ".trueup/trash").glob("*-votes_out.jsonl"))) == 1 and path.is_file()
    for name in ("../x", "a/b", "x.jsonl", ""):
        with pytest.raises(ConfigError):
            judged.write_dataset(place, project, kind, name)
    assert list(registered(folder)) == ["votes_out"]


def test_other_data_are_not_written_over(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text('{"mine": {"file_name": "other.jsonl"}}', encoding="utf-8")
    vote(tmp_path, 0, "x")
    with pytest.raises(ConfigError, match="taken"):
        judged.write_dataset(Workspace(tmp_path), Project(tmp_path, "votes"), "pair", "mine")
    with pytest.raises(DataError):
        judged.write_dataset(Workspace(tmp_path), Project(tmp_path, "empty"), "pair", "new")


def test_items_are_drawn_from_all_rows_and_know_the_better_answer(tmp_path: Path):
    table = open_table(spec_of(tmp_path, "dpo_en_demo"))
    items = judged.items_of(table, 10, seed=1)
    assert len(items) == 10 == len({item.id for item in items})
    rows = {example.row: example for row in table.window(0, 100).rows if (example := row.example)}
    for item in items:
        chosen = rows[item.provenance["row"]].chosen  # type: ignore[union-attr]
        assert text_of(item.answers[item.provenance["chosen"]]) == chosen[0].content
    everything = judged.items_of(table, 1000)
    assert len(everything) == 24 and len({item.provenance["chosen"] for item in everything}) == 2


def test_agreement_in_figures(tmp_path: Path):
    project = Project(tmp_path, "p")
    project.set_up(repeats=1.0)
    project.add_items([Item.of(str(n), ["a", "b"], provenance={"chosen": 0}) for n in range(4)])
    for n, item in enumerate(project.items):
        project.add(Label(item, 0, "x", 0, (0, 1), 2.0))
        project.add(Label(item, 0 if n else 1, "x", 1, (1, 0), 2.0))
        project.add(Label(item, (0, 0, 1, "skip")[n], "y", 0, (1, 0), 4.0))
    found = agreement(project)
    assert (found.repeats.same, found.repeats.of) == (3, 4)
    assert (found.between.same, found.between.of) == (2, 3)
    assert (found.data.same, found.data.of) == (4 + 3 + 2, 11) and found.skips == 1
    x, y = found.people
    assert (x.done, x.asked, x.seconds) == (8, 8, 2.0) and (y.done, y.asked) == (4, 8)
    assert (y.left.same, y.left.of) == (1, 3)


def test_alpha_is_that_of_a_published_example():
    """Krippendorff (2011), part A: binary data, two observers, no missing data."""
    one, other = "0100000010", "1110010000"
    assert krippendorff(list(zip(one, other, strict=True))) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff([["a", "a"], ["b", "b"]]) == 1.0
    assert krippendorff([["a"], ["a", "a"]]) is None
