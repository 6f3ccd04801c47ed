"""What the benchmarks compute around their measurements; the measurements themselves are run by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import data_report, dpo, memory, overhead, parity, report, serving, startup, tokenize, workloads
from benchmarks.measure import Failed, argv, environment, read_json, read_json_lines, run, spread, table
from benchmarks.models import SHAPES
from benchmarks.tools import variant, whole_loop
from benchmarks.workloads import Pair, bundled, count, cut, fit, prepare, render, turns
from tokenizers import Tokenizer

from tests.conftest import ROOT

MODEL = ROOT / "src" / "trueup" / "builtin" / "models" / "sql-tiny"
MACHINE = {
    "cpu": {
        "name": "Some CPU", "cores": 2, "threads": 2, "memory_gb": 23.5, "instructions": ["amx_bf16", "avx512f"],
    },
    "gpus": [],
    "packages": {"torch": "2.13.0+cpu"},
    "peak_tflops": 1.57,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


# --- workloads --------------------------------------------------------------------------------


def test_every_format_holds_the_same_pairs(tmp_path):
    prepared = prepare("sql", MODEL, tmp_path, rows=3)
    trl, swift = read_json_lines(tmp_path / "trl.jsonl"), read_json_lines(tmp_path / "swift.jsonl")
    sharegpt = read_json(tmp_path / "sharegpt.json")
    assert prepared.counts.pairs == len(trl) == len(swift) == len(sharegpt) == 3
    for a, b, c in zip(trl, swift, sharegpt, strict=True):
        assert [*a["prompt"], *a["chosen"]] == b["messages"]
        assert a["rejected"][0]["content"] == b["rejected_response"] == c["rejected"]["value"]
        assert a["chosen"][0]["content"] == c["chosen"]["value"]
        assert [turn["content"] for turn in a["prompt"]] == [turn["value"] for turn in c["conversations"]]


def test_a_cut_text_keeps_its_start_and_fits(tokenizer):
    text = next(bundled(Path(), tokenizer)).chosen
    assert cut(text, tokenizer, 10_000) == text
    for room in (3, 8, 20):
        shorter = cut(text, tokenizer, room)
        assert len(tokenizer.encode(shorter).ids) <= room
        assert shorter and text.startswith(shorter)


def test_a_fitted_pair_leaves_room_for_the_end_of_the_turn(tokenizer):
    pair = next(bundled(Path(), tokenizer))
    size = len(tokenizer.encode(render(pair.prompt)).ids)
    fitted = fit(pair, tokenizer, size + 12)
    assert fitted
    assert max(len(tokenizer.encode(f"{t}<|im_end|>").ids) for t in (fitted.chosen, fitted.rejected)) <= 12
    assert fit(pair, tokenizer, size + 2) is None


def test_a_prompt_that_stands_twice_in_a_batch_is_counted_once(tokenizer):
    prompt = [{"role": "user", "content": "list all orders"}]
    pairs = [Pair(prompt, "select 1;", "select 2;"), Pair(prompt, "select 33;", "select 4;")]
    together, apart = count(pairs, tokenizer, 2), count(pairs, tokenizer, 1)
    size = len(tokenizer.encode(render(prompt)).ids)
    assert together.distinct == apart.distinct - size
    assert together.answers == apart.answers == apart.distinct - 2 * size
    assert together.separate == apart.separate == apart.answers + 4 * size
    assert together.padded >= together.separate


def test_a_dialogue_in_one_string_becomes_turns():
    found = turns("\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e")
    assert [(turn["role"], turn["content"]) for turn in found] == [
        ("user", "a\n\nb"), ("assistant", "c"), ("user", "d"), ("assistant", "e"),
    ]  # fmt: skip


def test_texts_that_are_not_there_are_named(tmp_path):
    with pytest.raises(Failed, match="dpo_en_demo.json"):
        prepare("a", MODEL, tmp_path / "out", data=tmp_path)


@pytest.mark.skipif(not workloads.DATA.exists(), reason="the benchmarks' texts are not in ../shared/data")
@pytest.mark.parametrize("key", "abcd")
def test_every_workload_has_its_character(key, tmp_path):
    counts = prepare(key, MODEL, tmp_path, rows=8).counts
    assert counts.pairs >= 4
    prompts = counts.distinct - counts.answers
    if key == "b":
        assert prompts < counts.answers / 4
    if key == "d":
        assert counts.separate > 2 * counts.distinct


# --- measuring --------------------------------------------------------------------------------


MEASURE_FROM_A_SMALL_PROCESS = """
import dataclasses, json, pathlib, sys
from benchmarks.measure import environment, run
code = "x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096]); print('done')"
print(json.dumps(dataclasses.asdict(run([sys.executable, "-c", code], pathlib.Path(sys.argv[1]), environment()))))
"""


def test_a_process_is_measured(tmp_path):
    """From a small one: Linux counts the parent's memory at the fork as the child's, and a test run's is large."""
    command = [sys.executable, "-c", MEASURE_FROM_A_SMALL_PROCESS, tmp_path / "log.txt"]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment(), check=True)
    usage = json.loads(answer.stdout)
    assert 0.15 < usage["peak_gb"] < 2
    assert usage["process_seconds"] > 0 and usage["user"] + usage["system"] > 0
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "done\n"


def test_a_process_that_fails_shows_its_end(tmp_path):
    with pytest.raises(Failed, match="no luck"):
        run([sys.executable, "-c", "raise SystemExit('no luck')"], tmp_path / "log.txt", environment())


def test_spread_and_table():
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"
    assert spread([1.25], 1) == "1.2"
    assert table(("a", "b"), [("xx", "1")]).splitlines() == ["a   b", "--  -", "xx  1"]


# --- the comparison ---------------------------------------------------------------------------


def test_a_variant_is_a_tool_and_its_traits():
    assert variant("ms-swift-nockpt-malloc").tool == "ms-swift"
    assert variant("ms-swift-nockpt-malloc").traits == {"nockpt", "malloc"}
    assert variant("trl").traits == frozenset()
    with pytest.raises(ValueError, match="expected one of trueup, trl"):
        variant("trl-fast")


def test_a_peer_stands_for_its_variants_unless_as_installed():
    assert dpo.parse(["--peers", "trl,llamafactory"]).peers == [
        "trl",
        "trl-nockpt",
        "trl-nockpt-malloc",
        "llamafactory",
    ]
    assert dpo.parse(["--peers", "trl", "--as-installed"]).peers == ["trl"]
    assert dpo.parse(["--peers", "none"]).peers == []
    for words in (["--peers", "nobody"], ["--workload", "z"]):
        with pytest.raises(SystemExit):
            dpo.parse(words)


def test_needed_products_of_the_half_billion_shape():
    shape = SHAPES["0.5b"]
    assert shape.linear_parameters == 357_826_560  # 494 M less the embeddings, biases and norms
    work = {"distinct": 1000, "answers": 400}
    assert dpo.needed_tflop(shape, work, 3) == pytest.approx(6e-12 * (357_826_560 * 1000 + 896 * 151_936 * 400))


def record(seconds: dict[str, list[float]], logps: dict[str, float]) -> dict:
    runs = [
        {
            "round": number, "variant": name, "seconds": value, "user": 1600.0, "system": 1200.0, "peak_gb": 15.5,
            "process_seconds": value + 10, "gpu_gb": None,
            "steps": [{"logps/chosen": logps[name], "logps/rejected": -3000.0}],
        }
        for name, values in seconds.items()
        for number, value in enumerate(values)
    ]  # fmt: skip
    workload = {"key": "a", "pairs": 15, "distinct": 11_947, "answers": 9_484}
    return {"machine": MACHINE, "shape": "0.5b", "workload": workload, "runs": runs}


def test_the_summary_takes_ratios_within_a_round_and_marks_other_work():
    seconds = {"trueup": [50.0, 100.0], "trl": [400.0, 900.0], "llamafactory": [1000.0, 1000.0]}
    made = record(seconds, {"trueup": -4000.0, "trl": -4001.0, "llamafactory": -4100.0})
    made["runs"].append({"round": 0, "variant": "ms-swift", "failed": True})
    text = dpo.summary(made)
    assert "8.50 (8.00–9.00)" in text
    assert "llamafactory 2.500 %: NOT THE SAME WORK" in text
    assert "trl 0.025 %\n" in text
    assert "ms-swift failed 1 times of 1" in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_round_is_compared_with_trueups_of_the_same_round():
    made = record({"trueup": [50.0, 60.0], "trl": [400.0, 500.0]}, {"trueup": -4000.0, "trl": -4001.0})
    ours, theirs = made["runs"][:2], made["runs"][2:]
    theirs[1]["steps"] = [{"logps/chosen": -4000.0, "logps/rejected": -3300.0}]
    assert "trl 10.000 %: NOT THE SAME WORK" in dpo.summary(made)
    theirs[1]["steps"] *= 2
    assert "NOT THE SAME WORK in 1 of 2 rounds: 2 steps for 1" in dpo.summary(made)
    for mine, other in zip(ours, theirs, strict=True):
        mine["steps"] = other["steps"] = [{"logps/chosen": -4000.0 - mine["round"], "logps/rejected": -3300.0}]
    assert "from trueup's in 2 rounds:\n  trl 0.000 %" in dpo.summary(made)


def test_our_span_begins_before_the_first_step_and_ends_with_the_last_row():
    rows = [{"time": 103.0, "seconds": 2.5}, {"time": 106.5, "seconds": 3.0}, {"time": 110.0, "seconds": 3.25}]
    assert whole_loop(rows) == pytest.approx(9.5)


def test_options_are_stored_as_they_were_given_and_shown():
    assert argv(["--rows", "6"]) == ["--rows", "6"]
    assert report.command("dpo", {"argv": ["--rows", "6", "--data", "a b"]}) == (
        "`python -m benchmarks.dpo --rows 6 --data 'a b'`"
    )
    old = record({"trueup": [50.0, 60.0]}, {"trueup": -4000.0})
    assert report.command("dpo", old) == (
        "`python -m benchmarks.dpo --shape 0.5b --workload a` … (its other options were not stored: "
        "it holds 2 rounds, 15 pairs)"
    )
    assert report.command("overhead", {"steps": 40, "seconds": {"a": [1.0], "b": [2.0]}}) == (
        "`python -m benchmarks.overhead --steps 40` … (its other options were not stored: it holds 1 round)"
    )


def test_every_benchmark_that_is_stored_has_a_place_on_the_page():
    modules = {module for _, _, module, _ in report.sections()}
    measuring = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "write_result(" in path.read_text("utf-8")}
    assert measuring - {"measure"} == modules
    common = {"machine": MACHINE, "file": "f.json", "argv": []}
    answers = [{"round": 0, "tool": tool, "method": "grpo", "seconds": s, "length": 9.0, "peak_gb": 1.0}
               for tool, s in (("trueup", 1.0), ("trl", 3.0))]  # fmt: skip
    rewards = [{"round": 0, "tool": tool, "seconds": s, "peak_gb": 1.0, "steps": 1, "losses": [0.7]}
               for tool, s in (("trueup", 1.0), ("trl", 4.0))]  # fmt: skip
    work = {"key": "a", "title": "rows", "pairs": 2, "batch": 2, "steps": 1, "distinct": 9, "answers": 4,
            "separate": 12, "padded": 14, "dropped": 0, "rows": 2, "max_length": 9}  # fmt: skip
    text = report.page({
        "online": {"here": {**common, "runs": answers}},
        "reward-0.5b-a": {"here": {**common, "workload": work, "runs": rewards}},
    })  # fmt: skip
    assert "## GRPO, RLOO and PPO" in text and "3.00" in text
    assert "## Reward model, 0.5B shape, workload (a)" in text and "4.00" in text


def served_runs() -> list[dict]:
    known = {"first_p50": 1.095, "first_p95": 1.868, "peak_gb": 0.92, "texts": ["SELECT 1;"]}
    rates = [("trueup", 1000.0), ("llamafactory", 250.0), ("llamafactory-32", 100.0)]
    return [
        {"round": number, "tool": tool, "clients": clients, "rate": rate + number, **known}
        for number in range(2) for clients in (8, 32) for tool, rate in rates
    ]  # fmt: skip


def test_servers_are_compared_with_ours_and_say_whether_they_answered_the_same():
    runs = served_runs()
    text = serving.summary({"runs": runs})
    assert "4.0" in text and "8 of 8 answers are the same" in text
    runs[1]["texts"] = ["SELECT 2;"]
    assert "7 of 8 answers" in serving.summary({"runs": runs})


def test_what_clients_saw_is_counted_in_tokens_and_seconds():
    answers = [serving.Answered(1, "select 1;", 10.0, 10.5, 12.0), serving.Answered(0, "select 2;", 10.0, 10.1, 11.0)]
    found = serving.measured(answers)
    assert found["tokens"] == sum(serving.tokens_of(one.text) for one in answers)
    assert found["rate"] == pytest.approx(found["tokens"] / 2.0)
    assert found["first_p50"] == pytest.approx(0.3) and found["texts"] == ["select 2;", "select 1;"]


def test_nothing_is_wider_than_a_terminal():
    values = [100.5, 120.25, 99.0]
    case = {"workload": "sql", "batch": 4, "steps": 20, "losses": [[0.6931, 0.6931], [0.68, 0.68]], **parity.LIMITS}
    curves = {"trueup": [[0.69, 0.5]] * 5, "trl-nockpt": [[0.7, 0.4]] * 4 + [[0.6, 0.6]]}
    cells = [{"vocabulary": 32_768 << i, "answers": 8, "peak_mb": 12_345.0} for i in range(4)]
    names = ("trueup", "trueup, cached", "trueup, 1 process", "trl", "trl, 2 processes")
    checks = (data_report.FEW, *data_report.LIMITS)
    of_report = {"pairs": 100_000, "megabytes": 107.8, "mean_tokens": {"prompt": 116.0, "chosen": 38.0, "total": 200.6}}
    loops, starts = ("bare loop", "trueup train"), ("trueup", "transformers", "transformers, tokenizer")
    texts = [
        parity.summary({"fp32": [case], "bf16": {"window": 10, "curves": curves}}),
        memory.summary({"prompt": 512, "answer": 256, "cells": cells}),
        tokenize.summary({"pairs": 10_000, "seconds": dict.fromkeys(names, values)}),
        data_report.summary(
            {**of_report, "seconds": dict.fromkeys(checks, values), "peak_gb": dict.fromkeys(checks, [1.3])}
        ),
        overhead.summary({"steps": 200, "seconds": dict.fromkeys(loops, values)}),
        startup.summary({"seconds": dict.fromkeys(starts, values)}),
        serving.summary({"runs": served_runs()}),
    ]
    assert "among TRL's in 2 of 2 windows" in texts[0]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 80


def test_the_page_shows_the_newest_result_of_a_machine(tmp_path):
    for day, value in (("2026-01-01-0000", 1.0), ("2026-01-02-0000", 3.0)):
        made = {"benchmark": "overhead", "machine": MACHINE, "steps": 1, "seconds": {}}
        made["seconds"] = {"bare loop": [1.0], "trueup train": [value]}
        (tmp_path / f"{day}-overhead.json").write_text(json.dumps(made), encoding="utf-8")
    text = report.page(report.newest(tmp_path))
    assert "2026-01-02-0000-overhead.json" in text and "2026-01-01" not in text
    assert "Some CPU, 2 cores" in text and "3.00" in text
    assert "Nothing has been measured" in report.page({})


@pytest.mark.slow
def test_our_side_runs_from_the_command_line(tmp_path):
    words = [
        "--peers",
        "none",
        "--shape",
        "tiny",
        "--workload",
        "sql",
        "--rows",
        "4",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    env = {**os.environ, "TRUEUP_BENCH_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.dpo", *words, "--results", str(tmp_path / "results")],
        cwd=ROOT, env=env, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "4 pairs, batch 4, 1 steps" in answer.stdout
    (stored,) = (tmp_path / "results").glob("*-dpo-tiny-sql.json")
    runs = {run["variant"]: run for run in read_json(stored)["runs"]}
    assert runs["trueup"]["seconds"] > 0 and runs["trueup-cached"]["seconds"] > 0
    assert runs["trueup"]["steps"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
