"""A data report that is kept is that of the same data, config, tokenizer and program, and of no other."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest

from trueup.builtin import BUILTIN_MODELS, builtin_path
from trueup.data import digests
from trueup.errors import DataError
from trueup.recipes import dataset_views
from trueup.recipes.datasets import check_datasets


@pytest.fixture(name="rows")
def some_rows(tmp_path, monkeypatch):
    """Pairs, of which one is dropped, one is cut and one stands there twice."""
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_WORTH_BYTES", 0)
    rows = [{"prompt": f"question {i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
    rows += [rows[0], {"prompt": "p", "chosen": "same", "rejected": "same"}]
    rows.append({"prompt": "q", "chosen": "long " * 90, "rejected": "x"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(name="model")
def own_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(builtin_path(BUILTIN_MODELS[0]), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def check(rows, model, *words):
    return check_datasets([str(rows)], None, [f"model_name_or_path={model}", "cutoff_len=64", *words])


@pytest.fixture(name="never")
def no_counting(monkeypatch):
    def never():
        def counted(_cfg):
            raise AssertionError("counted again")

        monkeypatch.setattr(dataset_views, "counted", counted)

    return never


def test_a_second_check_shows_and_says_the_same_without_counting(rows, model, never, caplog):
    caplog.set_level(logging.WARNING, "trueup")
    first = check(rows, model)
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    never()
    again = check(rows, model)
    assert again.to_dict() == first.to_dict() and again.page() == first.page() and again.render() == first.render()
    assert first.datasets["pairs"].num_dropped == 1 and first.epoch_tokens
    assert [record.getMessage() for record in caplog.records] == said and said


@pytest.mark.parametrize("words", [["cutoff_len=65"], ["max_samples=5"], ["overwrite_cache=true"], ["template=chatml"]])
def test_another_config_is_counted_again(words, rows, model, never):
    check(rows, model)
    never()
    with pytest.raises(AssertionError, match="counted again"):
        check(rows, model, *words)


def test_what_decides_nothing_finds_it(rows, model, never):
    check(rows, model)
    never()
    check(rows, model, "preprocessing_num_workers=1")


@pytest.mark.parametrize("what", ["rows", "tokenizer", "program"])
def test_other_bytes_are_counted_again(what, rows, model, never, monkeypatch):
    check(rows, model)
    never()
    if what == "rows":
        rows.write_bytes(rows.read_bytes().replace(b"question 7?", b"question 7!"))
    elif what == "tokenizer":
        (model / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes() + b"\n")
    else:
        monkeypatch.setattr("trueup.recipes.kept_reports._program_digest", lambda: "another")
    with pytest.raises(AssertionError, match="counted again"):
        check(rows, model)


def test_a_damaged_one_is_made_again(rows, model, tmp_path):
    first = check(rows, model)
    (kept,) = (tmp_path / "cache" / "reports").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert check(rows, model).to_dict() == first.to_dict()
    assert json.loads(kept.read_text(encoding="utf-8"))


def test_a_refusal_is_never_kept(rows, model):
    for _ in range(2):
        with pytest.raises(DataError, match="equal pair"):
            check(rows, model, "on_bad_rows=error")


def test_looking_it_up_loads_nothing_that_takes_long():
    slow = "('torch', 'transformers', 'tokenizers')"
    words = f"import sys, trueup.recipes.datasets; print([name for name in {slow} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", words], capture_output=True, encoding="utf-8", check=True)
    assert answer.stdout.strip() == "[]"
