"""The pages of data: files that are brought, what is wrong with their rows, and rows as tokens. Journeys J1 and J8."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import Page, expect  # noqa: E402

from trueup.config.load import load_config  # noqa: E402
from trueup.data.encode import prepare  # noqa: E402
from trueup.models.tokenizer import load_tokenizer  # noqa: E402
from trueup.training.run_lock import this_process  # noqa: E402

EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>{{7*7}}"


def pair(number: int, rejected: str = "No.") -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": f"Answer {number}, at length.", "rejected": rejected}


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def upload(page: Page, url: str, name: str, content: bytes) -> None:
    page.goto(url + "/data")
    page.locator("input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    )


def chips(page: Page, part: str) -> list[tuple[str, list[int]]]:
    """A part's tokens as the page has them: (role, ids)."""
    found = page.locator(".part").filter(has=page.get_by_text(part, exact=True)).locator(".piece")
    read = "all => all.map(one => [one.className.split('piece-').pop(), one.dataset.ids.split(' ').map(Number)])"
    return [(role, ids) for role, ids in found.evaluate_all(read)]


def test_a_file_with_a_fault_is_told_line_by_line_mended_and_seen_as_the_trainer_has_it(studio, page):
    """J1."""
    good, broken = pair(0), lines(pair(1))[:-3] + b"\n"
    upload(page, studio.url, "my pairs.jsonl", lines(good) + broken + lines(pair(2), pair(3, rejected="")))
    expect(page.get_by_role("heading", level=1, name="my_pairs")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("data/my_pairs.jsonl:2")
    assert str(studio.root) not in page.content()
    line = page.get_by_role("textbox", name="Line 2 of the file")
    expect(line).to_have_value(broken.decode().strip())
    line.fill(json.dumps(pair(1)))
    page.get_by_role("button", name="Save this line").click()
    expect(page.get_by_text("Left out: empty rejected")).to_be_visible()
    expect(page.get_by_role("img", name="Histogram of the tokens of Chosen / Rejected")).to_be_visible()
    page.get_by_role("button", name="Question 1?").click()
    expect(page.get_by_text("In the loss", exact=False).first).to_be_visible()
    expect(page.locator(".piece").get_by_text("1", exact=False).first).to_be_visible()

    cfg = load_config({
        "stage": "dpo", "model_name_or_path": "builtin:sql-tiny", "dataset": "my_pairs", "cutoff_len": 2048,
        "dataset_dir": str(studio.root / "data"), "output_dir": str(studio.root / "unused"),
    })  # fmt: skip
    encoded = next(one for one in prepare(cfg, load_tokenizer(cfg.model)).train if one.row == "my_pairs:1")
    expect(page.locator(".part")).to_have_count(3)
    assert chips(page, "Prompt") == [("masked", [token]) for token in encoded.prompt.tolist()]
    for part, answer in zip(("Chosen", "Rejected"), encoded.answers, strict=True):
        roles = ["trained" if trained else "masked" for trained in answer.mask.tolist()]
        assert chips(page, part) == list(zip(roles, ([token] for token in answer.ids.tolist()), strict=True))

    page.get_by_role("button", name="Differences").click()
    expect(page.locator(".piece-removed").first).to_be_visible()
    expect(page).to_have_url(re.compile("view="))
    page.reload()  # which row, and how it is shown, is in the address
    expect(page.locator(".piece-added").first).to_contain_text("Answer")


def test_text_of_rows_stays_text(studio, page):
    """J8: names of files, columns, rows and what is wrong with them."""
    rows = [
        {"prompt": EVIL, "chosen": EVIL + "a", "rejected": EVIL, EVIL: EVIL},
        {"prompt": EVIL, "chosen": "", "rejected": EVIL},
    ]
    upload(page, studio.url, "<script>alert(1)<!--.jsonl", lines(*rows))
    expect(page.get_by_role("heading", level=1, name="script_alert_1")).to_be_visible()
    expect(page.get_by_text("Left out: empty chosen")).to_be_visible()
    for name in ("Conversation", "Differences", "As written", "Tokens"):
        page.get_by_role("button", name=name).click()
        expect(page.locator(".one-row")).to_contain_text("onerror")
    expect(page).not_to_have_title("taken")
    assert page.locator(".main img").count() == 0


def test_two_files_of_one_name_are_both_kept(studio, page):
    for rows in ([pair(0)], [pair(1)]):
        upload(page, studio.url, "twice.jsonl", lines(*rows))
        expect(page.get_by_role("heading", level=1, name="twice")).to_be_visible()
    kept = [(studio.root / f"data/{name}.jsonl").read_text(encoding="utf-8") for name in ("twice", "twice-2")]
    assert [json.loads(text)["prompt"] for text in kept] == ["Question 0?", "Question 1?"]
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(page.get_by_role("link", name="twice", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="twice-2")).to_have_count(0)
    assert list((Path(studio.root) / ".trueup/trash").glob("*twice-2.jsonl"))


def test_columns_are_named_by_hand_where_they_are_not_known(studio, page):
    row = {"ask": "Why?", "good": "Because of this.", "bad": "No."}
    upload(page, studio.url, "columns.jsonl", lines(row))
    expect(page.get_by_role("heading", level=1, name="columns")).to_be_visible()
    page.get_by_text("Change how columns are read").click()
    for role, column in (("prompt", "ask"), ("chosen", "good"), ("rejected", "bad")):
        page.get_by_role("combobox", name=role, exact=True).click()
        page.get_by_role("option", name=column, exact=True).click()
        expect(page.get_by_role("listbox")).to_have_count(0)
    page.get_by_role("button", name="Save columns").click()
    expect(page.get_by_text("Preference pairs")).to_be_visible()
    expect(page.get_by_text("good → chosen")).to_be_visible()


@pytest.mark.parametrize("address", ["no-such-set", "..%2f..%2fetc%2fpasswd", "%2Fetc%2Fpasswd", "data.jsonl"])
def test_addresses_that_are_no_dataset_say_so(studio, page, address: str):
    page.watch.allowed += ["404"]
    page.goto(f"{studio.url}/data/{address}")
    expect(page.locator("body")).to_contain_text("there is no dataset")


def test_a_download_is_seen_by_every_tab_from_its_files(studio, make_page):
    folder = studio.root / ".trueup/fetch/ultrafeedback"
    folder.mkdir(parents=True)
    (folder / "log").write_text("Downloading data:  45%|██▌  | 12.2M/27.1M [00:03<00:04]", encoding="utf-8")
    job = {**this_process(), "created": psutil.Process().create_time()}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    tabs = [make_page(), make_page(language="zh")]
    for tab in tabs:
        tab.goto(studio.url + "/data")
        coming = (
            tab.get_by_role("row")
            .filter(has_text=re.compile("answers of many models|多个模型的回答"))
            .get_by_role("progressbar")
        )
        expect(coming).to_have_attribute("aria-label", "Downloading data 12.2M/27.1M")
        expect(coming).to_have_attribute("aria-valuenow", "0.45")
    said = {"ok": False, "problems": [{"what": "the hub <b>cannot</b> be reached"}]}
    (folder / "result.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "job.json").write_text(json.dumps({**job, "created": 1.0}), encoding="utf-8")
    for tab in tabs:
        expect(tab.get_by_text("the hub <b>cannot</b> be reached")).to_be_visible()
    expect(tabs[0].get_by_role("button", name="Try again ultrafeedback", exact=True)).to_be_visible()


@pytest.mark.prove
def test_a_set_that_cannot_be_fetched_says_why(studio, page):
    page.goto(studio.url + "/data")
    page.get_by_label("Search", exact=False).first.fill("lima")
    page.get_by_role("button", name="Get lima", exact=True).click()
    expect(page.get_by_role("row").filter(has_text="few and carefully chosen")).to_contain_text("cannot be reached")
