"""`trueup data` as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trueup.cli import main
from trueup.cli_data import TARGETS, data, split_names


def run(*words: str, **how) -> Result:
    return CliRunner().invoke(main, ["data", *words], **how)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", list(data.commands))
def test_every_verb_has_help_with_examples(name: str):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"trueup data {name}" in result.output.partition("\n")[2]
    assert all(len(line) <= 120 for line in result.output.splitlines())


def test_a_mistyped_verb_is_told_the_near_one():
    result = run("lst")
    assert result.exit_code == 2
    assert "did you mean `trueup data list`?" in result.stderr


def test_list_shows_all_three_sorts():
    result = run("list")
    assert result.exit_code == 0
    assert "dpo_en_demo" in result.output and "ultrafeedback" in result.output


def test_list_speaks_json():
    found = json.loads(run("list", "--json").stdout)["result"]["datasets"]
    assert {item["group"] for item in found} == {"bundled", "well-known"}


def test_c17_get_offline_exits_with_6(monkeypatch: pytest.MonkeyPatch):
    def out_of_reach(*words, **how):
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    result = run("get", "ultrafeedback")
    assert result.exit_code == 6
    assert "cannot be reached" in result.stderr


def test_get_without_a_name_says_where_names_are():
    result = run("get")
    assert result.exit_code == 2
    assert "trueup data list" in result.stderr


# --- verbs that take a run's config ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.json"], (["a.json"], None, [])),
        (["a", "b", "dpo.yaml", "x=1"], (["a", "b"], "dpo.yaml", ["x=1"])),
        (["dpo.yaml", "--cutoff_len", "9"], ([], "dpo.yaml", ["--cutoff_len", "9"])),
        (["data/x=1/a.jsonl", "stage=dpo"], (["data/x=1/a.jsonl"], None, ["stage=dpo"])),
        ([], ([], None, [])),
    ],
)
def test_names_come_first_then_the_config(words, expected):
    assert split_names(words) == expected


def test_preview_takes_a_config_and_its_overrides(folder: Path):
    (folder / "dpo.yaml").write_text("stage: dpo\nmodel_name_or_path: builtin:sql-tiny\ndataset: dpo_en_demo\n")
    result = run("preview", "dpo.yaml", "--rows", "2", "--cutoff_len", "60")
    assert result.exit_code == 0
    assert "⟦" in result.output and "⟪" in result.output and "dpo_en_demo:1" in result.output
    assert "stop token '<|im_end|>' trained: yes" in result.output
    assert "dpo_en_demo:2" not in result.output


def test_preview_writes_a_page_and_never_over_another(folder: Path):
    assert run("preview", "kto_en_demo", "--html", "row.html").exit_code == 0
    assert "<html" in (folder / "row.html").read_text(encoding="utf-8")
    assert run("preview", "kto_en_demo", "--html", "row.html").exit_code == 2
    assert run("preview", "kto_en_demo", "--html", "row.html", "--force").exit_code == 0


def _hub_of(pairs: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A hub whose every dataset streams so many pairs; the numbers of those that were asked for."""
    from datasets import IterableDataset

    taken: list[int] = []

    def rows():
        for number in range(pairs):
            taken.append(number)
            yield {"prompt": f"question {number}", "chosen": "a good answer", "rejected": "no"}

    def load_dataset(*words, streaming: bool = False, **how):
        assert streaming, "the whole dataset was asked for"
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("trueup.data.hubs.mind_the_hub", lambda: None)
    return taken


def test_preview_of_a_set_that_was_never_fetched_reads_its_first_rows(monkeypatch: pytest.MonkeyPatch):
    taken = _hub_of(5000, monkeypatch)
    result = run("preview", "somebody/pairs", "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "question 1" in result.stdout and "question 2" not in result.stdout
    assert "trueup data get somebody/pairs" in result.stderr
    assert max(taken) <= 1001


def test_preview_of_a_set_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def out_of_reach(*words, **how):
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    monkeypatch.setattr("trueup.data.hubs.mind_the_hub", lambda: None)
    result = run("preview", "ultrafeedback")
    assert result.exit_code == 6
    assert "cannot be reached" in result.stderr and "trueup data get ultrafeedback" in result.stderr


def test_a_preview_shows_rows_that_cannot_be_used_with_the_reason(folder: Path):
    rows = [{"prompt": "a", "chosen": "" if number == 0 else "b", "rejected": "c"} for number in range(3)]
    (folder / "rows.json").write_text(json.dumps(rows))
    result = run("preview", "rows.json", "--rows", "1")
    assert result.exit_code == 0 and "left out: empty chosen" in result.stdout


def test_what_a_notice_says_the_report_on_the_same_screen_does_not_repeat(folder: Path):
    rows = [{"prompt": "a", "chosen": "b" * 40, "rejected": "c"}, {"prompt": "x", "chosen": "a\bb"}]
    rows = [rows[0], rows[0] | {"prompt": "b"}, rows[0], rows[1] | {"rejected": "c"}]
    lines = "\r\n\r\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    command = [sys.executable, "-m", "trueup", "data", "check", "rows.jsonl"]
    together = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    apart = subprocess.run(command, capture_output=True, check=True)
    screen = " ".join(together.stdout.decode().split())
    for words in ("exact duplicate", "hidden control characters", "byte order mark", "(CRLF)", "3 blank lines"):
        assert screen.count(words) == 1, screen
        assert words in " ".join(apart.stdout.decode().split())  # a report in a file of its own is whole


def test_preview_of_nothing_says_what_to_name():
    result = run("preview")
    assert result.exit_code == 2 and "no dataset is named" in result.stderr


def test_check_exits_as_a_training_would(folder: Path):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    (folder / "broken.jsonl").write_text('{"prompt": "a"\n')
    assert run("check", "dpo_en_demo").exit_code == 0
    assert run("check", "bad.jsonl").exit_code == 3
    assert run("check", "broken.jsonl").exit_code == 3
    assert run("check", "missing.jsonl").exit_code == 3
    assert run("check", "missing").exit_code == 2


def test_check_speaks_json_and_writes_a_page(folder: Path):
    result = run("check", "dpo_en_demo", "--html", "report.html", "--json")
    found = json.loads(result.stdout)["result"]
    assert found["datasets"]["dpo_en_demo"]["kept"] == 24 and found["file"] == "report.html"
    assert "Data report" in (folder / "report.html").read_text(encoding="utf-8")


def test_stats_in_a_table():
    result = run("stats", "dpo_en_demo", "kto_en_demo")
    assert result.exit_code == 0
    assert "characters" in result.output and "14 desirable, 12 undesirable" in result.output


# --- verbs that write ------------------------------------------------------------------------------


def test_convert_prints_the_entry_or_makes_it(folder: Path):
    shown = run("convert", "dpo_en_demo", "--to", "alpaca", "--output", "a.jsonl")
    assert shown.exit_code == 0 and '"ranking": true' in shown.output
    made = run("convert", "dpo_en_demo", "--to", "openai", "--output", "data/b.json", "--register", "mine")
    assert made.exit_code == 0, made.stderr
    entry = json.loads((folder / "data" / "dataset_info.json").read_text(encoding="utf-8"))["mine"]
    assert entry["file_name"] == "b.json"
    assert run("check", "mine").exit_code == 0
    again = run("convert", "kto_en_demo", "--to", "openai", "--output", "data/c.json", "--register", "mine")
    assert again.exit_code == 2 and "--register: " in again.stderr and not (folder / "data" / "c.json").exists()


def test_a_report_names_every_dropped_row(folder: Path):
    rows = [{"prompt": "a", "chosen": str(n % 2), "rejected": "1"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("unpair", "rows.jsonl", "--output", "kto.jsonl", "--report", "left.json", "--json")
    told = json.loads((folder / "left.json").read_text(encoding="utf-8"))
    assert told == json.loads(result.stdout)["result"]
    assert (told["read"], told["kept"], told["dropped"]) == (60, 30, 30)
    assert [row["row"] for row in told["dropped_rows"]] == [f"rows:{n}" for n in range(1, 60, 2)]


def test_files_that_exist_are_kept(folder: Path):
    for words in (
        ("dedup", "dpo_en_demo", "--output", "x.jsonl"),
        ("convert", "dpo_en_demo", "--to", "trl", "--output", "x.jsonl"),
        ("unpair", "dpo_en_demo", "--output", "x.jsonl"),
    ):
        (folder / "x.jsonl").write_text("mine")
        assert run(*words).exit_code == 2
        assert (folder / "x.jsonl").read_text() == "mine"
        assert run(*words, "--force").exit_code == 0


def test_split_makes_two_files_and_registers_them(folder: Path):
    result = run("split", "dpo_en_demo", "--val_size", "5", "--output", "data", "--register")
    assert result.exit_code == 0, result.stderr
    names = json.loads((folder / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    assert list(names) == ["dpo_en_demo_train", "dpo_en_demo_eval"]
    assert run("check", "dpo_en_demo_eval").exit_code == 0


def test_convert_offers_what_there_is():
    from trueup.data.convert import TARGETS as there

    assert list(there) == TARGETS


def test_the_page_about_data_names_every_verb_and_only_those(root: Path):
    text = (root / "docs" / "data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"trueup data (\w+)", text)) | set(re.findall(r"^\*\*`(\w+)", text, re.MULTILINE))
    assert named == set(data.commands)
