"""Duplicates, splits and numbers of datasets."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trueup.data.convert import convert
from trueup.data.counts import sparkline
from trueup.data.dedup import dedup
from trueup.data.page import page
from trueup.data.report import DataReport
from trueup.data.rowset import read_set
from trueup.data.split import split
from trueup.data.write import check_target, write_rows
from trueup.errors import ConfigError, DataError, ModelError
from trueup.recipes.datasets import check_datasets, measure_datasets

LONG = "The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun all day"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [row for _, row, _ in read_set(str(file))]


def pair(prompt: str, chosen: str = "b", rejected: str = "c", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_exact_duplicates_go_and_the_first_stays_as_it_was(tmp_path):
    rows = [pair("a", id=1), pair("b"), pair(" a ", id=2), pair("a", "c", "b"), pair("bad", "x", "x")]
    outcome = dedup(write(tmp_path / "rows.jsonl", rows), tmp_path / "new.jsonl")
    assert read(tmp_path / "new.jsonl") == [rows[0], rows[1], rows[3], rows[4]]
    assert outcome.dropped == [("rows:2", "same row", "as rows:0")]
    assert any("1 row is unusable" in note for note in outcome.notes)


def test_near_duplicates_go_by_similarity(tmp_path):
    pytest.importorskip("datasketch")
    rows = [pair(LONG), pair(LONG.replace("warm", "hot")), pair("Something else altogether, with other words")]
    zh = "今天天气很好我们一起去公园散步然后回家吃晚饭看电影"
    rows += [pair(zh), pair(zh.replace("晚饭", "午饭"))]
    source = write(tmp_path / "rows.jsonl", rows)
    strict = dedup(source, tmp_path / "a.jsonl", near=0.99)
    loose = dedup(source, tmp_path / "b.jsonl", near=0.6)
    assert strict.kept == 5
    assert [(row, detail[5:]) for row, _, detail in loose.dropped] == [
        ("rows:1", "like rows:0"),
        ("rows:4", "like rows:3"),
    ]
    assert dedup(source, tmp_path / "c.jsonl", near=0.6).dropped == loose.dropped


def test_by_prompt_each_question_is_asked_once(tmp_path):
    rows = [pair("a"), pair("a", "x", "y"), pair("b")]
    assert dedup(write(tmp_path / "rows.jsonl", rows), tmp_path / "new.jsonl", by="prompt").kept == 2


def test_without_the_library_the_pip_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ModelError, match=r"pip install 'trueup\[data\]'"):
        dedup("dpo_en_demo", tmp_path / "new.jsonl", near=0.8)
    assert dedup("dpo_en_demo", tmp_path / "new.jsonl").kept == 24


def test_a_split_loses_nothing_and_keeps_questions_together(tmp_path):
    rows = [pair(f"question {n % 15}", f"b{n}") for n in range(40)]
    source = write(tmp_path / "rows.jsonl", rows)
    outcome = split(source, tmp_path / "t.jsonl", tmp_path / "e.jsonl", 0.25)
    train, held_out = read(tmp_path / "t.jsonl"), read(tmp_path / "e.jsonl")
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert 8 <= len(held_out) <= 13 and outcome.read == outcome.kept == 40
    split(source, tmp_path / "t2.jsonl", tmp_path / "e2.jsonl", 0.25)
    assert read(tmp_path / "e2.jsonl") == held_out


def test_a_split_that_leaves_one_side_empty_is_refused(tmp_path):
    source = write(tmp_path / "rows.jsonl", [pair("a", str(n)) for n in range(4)])
    with pytest.raises(ConfigError, match="leaves none on one side"):
        split(source, tmp_path / "t.jsonl", tmp_path / "e.jsonl", 0.5)


def test_numbers_in_characters_and_in_tokens():
    (stats,) = measure_datasets(["dpo_en_demo"], None, []).datasets
    assert (stats.kind, stats.unit, stats.usable) == ("pair", "characters", 24)
    assert any("times as long" in finding for finding in stats.findings())
    (tokens,) = measure_datasets(["dpo_en_demo"], None, ["model_name_or_path=builtin:sql-tiny"]).datasets
    assert tokens.unit == "tokens" and tokens.lengths.keys() == {"prompt", "chosen", "rejected", "total"}


def test_labels_out_of_balance_are_told_with_weights(tmp_path):
    rows = [{"prompt": str(n), "completion": "b", "label": n < 30} for n in range(40)]
    (stats,) = measure_datasets([write(tmp_path / "rows.jsonl", rows)], None, []).datasets
    (finding,) = stats.findings()
    assert "30 desirable to 10 undesirable" in finding and "between 0.33 and 0.44" in finding
    (even,) = measure_datasets(["kto_en_demo"], None, []).datasets
    assert not list(even.findings())


def test_a_check_reads_each_dataset_as_what_it_is(tmp_path):
    report = check_datasets(["dpo_en_demo", "alpaca_en_demo"], None, [])
    assert [(d.name, d.kept) for d in report.datasets.values()] == [("dpo_en_demo", 24), ("alpaca_en_demo", 24)]
    assert any("no model is named" in note for note in report.notes)
    with pytest.raises(DataError, match="equal pair"):
        source = write(tmp_path / "rows.jsonl", [pair("a"), pair("b", "x", "x")])
        check_datasets([source], None, ["on_bad_rows=error"])


def test_the_report_is_a_page_that_needs_nothing_else(tmp_path):
    rows = [pair("a"), pair("<u>", "x", "x"), pair("a")]
    source = write(tmp_path / "rows.jsonl", rows)
    html = check_datasets([source], None, ["model_name_or_path=builtin:sql-tiny"]).page()
    assert "<svg" in html and "equal pair" in html and "<u>" not in html
    assert "http:" not in html and "https:" not in html and "src=" not in html
    assert "<svg" not in DataReport().page()


def test_a_page_escapes_its_title():
    assert "<title>a&lt;b</title>" in page("a<b", "")


def test_a_histogram_fits_a_line():
    assert sparkline({1: 1}) and len(sparkline(dict.fromkeys(range(1000), 1))) == 16


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_rows_are_read_as_they_were_written(tmp_path, suffix: str):
    rows = [pair("a\u2028b", "你好"), pair("c", "d\r\n")]
    file = tmp_path / f"new{suffix}"
    write_rows(file, rows)
    assert rows_of(file) == rows
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_table_takes_the_types_that_come_later(tmp_path, monkeypatch):
    monkeypatch.setattr("trueup.data.write._TABLE_ROWS", 2)
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 1.5, "y": ["z"]}}]
    rows = [pair("a", id=None), pair("b"), pair("c", id=1), pair("d", id=2.5), pair("e", tools=calls[:1])]
    rows += [pair("f", tools=calls), pair("g", id=7)]
    write_rows(tmp_path / "new.parquet", rows)
    found = rows_of(tmp_path / "new.parquet")
    assert [row["id"] for row in found] == [None, None, 1, 2.5, None, None, 7]
    assert found[5]["tools"] == [{"name": "f", "arguments": {"x": 1, "y": None}}, calls[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["new.parquet"]
    with pytest.raises(DataError, match="no table"):
        write_rows(tmp_path / "bad.parquet", [pair("a", id=1), pair("b"), pair("c", id="x")])
    assert [path.name for path in tmp_path.iterdir()] == ["new.parquet"]


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("all rows were read at once")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz"])
def test_rows_are_read_one_after_another(tmp_path, monkeypatch, name: str):
    rows = [pair(f"question {n % 9}", f"b{n}") for n in range(30)] + [pair("question 1", "b1", system="s")]
    write_rows(tmp_path / name.removesuffix(".gz"), rows)
    if name.endswith(".gz"):
        plain = tmp_path / "rows.jsonl"
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    monkeypatch.setattr("trueup.data.passes.read_rows", _never)
    source = str(tmp_path / name)
    assert dedup(source, tmp_path / "d.jsonl", by="prompt").kept == 10
    assert split(source, tmp_path / "t.jsonl", tmp_path / "e.jsonl").kept == 31
    outcome = convert(source, "openai", tmp_path / "c.jsonl")
    assert outcome.kept == 31 and outcome.entries[str(tmp_path / "c.jsonl")]["type"] == "dpo"


def test_a_column_that_only_the_last_row_has_is_read_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr("trueup.data.rowset.PEEKED", 3)
    rows = [pair(str(n)) for n in range(5)] + [pair("x", system="be brief", note="n")]
    outcome = convert(write(tmp_path / "rows.jsonl", rows), "alpaca", tmp_path / "new.jsonl")
    (entry,) = outcome.entries.values()
    assert entry["columns"]["system"] == "system" and "columns taken along: note" in outcome.notes
    assert read(tmp_path / "new.jsonl")[-1] | {"system": "be brief", "note": "n"} == read(tmp_path / "new.jsonl")[-1]


def test_every_faulty_line_is_told_and_nothing_is_written(tmp_path):
    lines = [json.dumps(pair(str(n))) for n in range(6)]
    lines[2], lines[4] = '{"prompt": ', "[]"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        dedup(str(tmp_path / "rows.jsonl"), tmp_path / "new.jsonl")
    assert "2 of 6 lines" in str(error.value) and "rows.jsonl:5" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path):
    source = read_set(write(tmp_path / "rows.jsonl", [pair("a"), pair("b")]))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(pair("c")))
    with pytest.raises(DataError, match="changed while it was read"):
        list(source)


def test_columns_of_a_wrong_type_are_told_before_a_file_is_there(tmp_path):
    source = write(tmp_path / "rows.jsonl", [pair("a"), pair("b") | {"chosen": 7}])
    with pytest.raises(DataError, match=r"column `chosen` holds a number in 1 row \(row 1\)"):
        dedup(source, tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


def test_a_csv_holds_texts_only(tmp_path):
    write_rows(tmp_path / "new.csv", [pair('a,"b"\nc')])
    assert rows_of(tmp_path / "new.csv") == [pair('a,"b"\nc')]
    with pytest.raises(DataError, match="more than text"):
        write_rows(tmp_path / "bad.csv", [pair("a", id=1)])
    assert not (tmp_path / "bad.csv").exists()


def test_nothing_is_overwritten_without_a_word(tmp_path):
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        check_target(tmp_path / "a.jsonl", force=False)
    check_target(tmp_path / "a.jsonl", force=True)
    with pytest.raises(ConfigError, match="no ending"):
        check_target(tmp_path / "a", force=False)
