"""`trueup data` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trueup.cli import main
from trueup.cli_data import data


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
    assert all(len(line) <= 100 for line in result.output.splitlines())


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
