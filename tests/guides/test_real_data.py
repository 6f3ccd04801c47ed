"""Runs on real preference and instruction data: every artefact, and every row accounted for.

The data lie beside the checkout (`../shared/data`) and are not part of the project.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.guides.conftest import files, read_json, read_lines, read_yaml, succeed

DATA = ROOT.parent / "shared" / "data"
ARTEFACTS = {
    "run.yaml", "environment.json", "status.json", "metrics.jsonl", "trainer_log.jsonl", "data_report.json",
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "training_loss.png", "train_results.json", "eval_results.json", "all_results.json",
    "README.md", "checkpoint-1", "checkpoint-2",
}  # fmt: skip
OF_PAIRS = {f"training_rewards_{name}.png" for name in ("accuracies", "margins")}
IN_CHECKPOINT = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"}

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the real data of ../shared/data, which is not part of the project"
)


@pytest.fixture(autouse=True)
def here(work: Path) -> Path:
    """A working directory with tiny models."""
    return work


def run(stage: str, name: str, options: str = "") -> tuple[Path, dict]:
    """Two steps, two checkpoints and an evaluation of 2 % of the rows; the run's directory and its data report."""
    before = files(DATA)
    succeed(
        f"train --stage {stage} --model_name_or_path Qwen/Qwen1.5-7B-Chat --dataset {name} --dataset_dir {DATA} "
        f"--output_dir out --max_steps 2 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 2 "
        f"--val_size 0.02 {options}"
    )
    assert files(DATA) == before
    return Path("out"), read_json("out/data_report.json")


def assert_artefacts(out: Path, pairs: bool) -> None:
    present = {path.name for path in out.iterdir()}
    wanted = ARTEFACTS | (OF_PAIRS if pairs else set())
    assert wanted <= present, wanted - present
    assert {path.name for path in (out / "checkpoint-2").iterdir()} >= IN_CHECKPOINT
    for path in out.rglob("*"):
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl")
        if path.suffix == ".json":
            assert read_json(path) not in ({}, [])
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert read_json(out / "status.json")["state"] == "finished"
    assert [row["step"] for row in read_lines(out / "metrics.jsonl") if "loss" in row] == [1, 2]
    assert read_lines(out / "trainer_log.jsonl")[0]["total_steps"] == 2
    assert read_yaml(out / "run.yaml")["max_steps"] == 2


def assert_accounted(report: dict, name: str, rows: int) -> dict:
    """read = kept + dropped, with ids, and what was kept is in the splits."""
    entry = report["datasets"][name]
    assert entry["available"] == entry["read"] == rows
    dropped = sum(lost["count"] for lost in entry["dropped"].values())
    assert entry["kept"] == rows - dropped == sum(report["splits"].values())
    for lost in entry["dropped"].values():
        assert len(lost["rows"]) == min(lost["count"], 20)
        assert all(row.startswith(f"{name}:") for row in lost["rows"])
    assert report["tokens"]["total"]["p50"] > 0
    return entry


def test_dpo_on_dpo_en_demo():
    out, report = run("dpo", "dpo_en_demo")
    assert_artefacts(out, pairs=True)
    entry = assert_accounted(report, "dpo_en_demo", 300)
    cut = {row for lost in entry["truncated"].values() for row in lost["rows"]}
    assert cut  # long conversations against cutoff_len 2048, in the tokens of a very small vocabulary
    first = read_lines(out / "metrics.jsonl")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def empty_sides() -> list[str]:
    """Rows of hh_harmless in which a side says nothing after its last `Assistant:`."""
    lines = (DATA / "hh_harmless.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        f"hh_harmless:{i}"
        for i, row in enumerate(rows)
        if any(not row[side].rpartition("\n\nAssistant:")[2].strip() for side in ("chosen", "rejected"))
    ]


def test_dpo_on_hh_harmless_with_four_rows_that_have_an_empty_side():
    out, report = run("dpo", "hh_harmless")
    assert_artefacts(out, pairs=True)
    entry = assert_accounted(report, "hh_harmless", 1500)
    assert len(empty_sides()) == 4
    empty = [row for reason, lost in entry["dropped"].items() if reason.startswith("empty") for row in lost["rows"]]
    assert sorted(empty) == sorted(empty_sides())


def test_hh_harmless_keeps_1496_rows_where_none_is_too_long():
    line = f"--stage dpo --model_name_or_path Qwen/Qwen1.5-7B-Chat --dataset hh_harmless --dataset_dir {DATA}"
    result = succeed(f"check {line} --cutoff_len 100000 --output_dir out --json")
    entry = json.loads(result.stdout)["result"]["data"]["datasets"]["hh_harmless"]
    assert (entry["read"], entry["kept"]) == (1500, 1496)
    assert {reason: lost["count"] for reason, lost in entry["dropped"].items() if not reason.startswith("empty")} == {}
    assert not entry["truncated"]
    assert not Path("out").exists()
    shown = succeed(f"check {line} --cutoff_len 100000 --output_dir out").stdout
    assert all(row.rpartition(":")[2] in shown for row in empty_sides())


def test_sft_on_alpaca_zh_demo():
    out, report = run("sft", "alpaca_zh_demo")
    assert_artefacts(out, pairs=False)
    assert_accounted(report, "alpaca_zh_demo", 300)
    assert read_json(out / "eval_results.json")["eval_loss"] > 0
