"""The short report after a preference run: there without being asked for, cheap, and of no effect on the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from trueup.config.load import load_config
from trueup.recipes.evaluation.regression import ANSWER_TOKENS, PROMPTS, TEXT_TOKENS, render, warnings_of
from trueup.recipes.run import run

REWARDS = """
def vowels(completions, **_):
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]
"""
STEPS = {"do_train": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "regression_report": True}
RUNS = {
    "dpo": {"eval_dataset": "held", "do_eval": True, "lora_dropout": 0.1},
    "kto full": {"stage": "kto", "dataset": "labels", "finetuning_type": "full", "lora_rank": None},
    "streamed orpo": {"stage": "orpo", "streaming": True, "buffer_size": 8},
    "grpo": {
        "stage": "grpo", "dataset": "chats", "num_generations": 2, "max_new_tokens": 4,
        "reward_funcs": "rewards.py:vowels",
    },
}  # fmt: skip


def results(directory: Path) -> dict[str, float]:
    return json.loads((directory / "regression_results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_bits_and_the_report_of_one_that_never_stopped(
    name: str, config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    whole = config(**STEPS, **RUNS[name])
    run(whole, Console(quiet=True))
    first = Path(str(whole.train.output_dir))
    again = config(**STEPS, **RUNS[name], output_dir=str(tmp_path / "again"),
                   resume_from_checkpoint=str(first / "checkpoint-2"))  # fmt: skip
    run(again, Console(quiet=True))
    (weights,) = (path.name for path in first.glob("*model.safetensors"))
    assert (first / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    assert results(first) == results(tmp_path / "again")


def test_it_is_there_without_being_asked_for():
    keys = {"model_name_or_path": "builtin:sql-tiny", "dataset": "sql_pairs_demo", "output_dir": "out"}
    assert load_config({**keys, "stage": "dpo"}).train.regression_report


def test_it_is_bounded_whatever_the_data():
    assert PROMPTS * ANSWER_TOKENS <= 1024 and TEXT_TOKENS <= 1024


def test_what_got_worse_is_said_with_figures():
    names = ("perplexity", "tokens", "distinct_2", "repetition", "refusals")
    same = {f"regression_{n}{end}": 0.5 for n in names for end in ("", "_start")} | {"regression_kl": 0.01}
    assert warnings_of(same) == []
    worse = same | {"regression_perplexity": 1.0, "regression_repetition": 0.9, "regression_refusals": 1.0,
                    "regression_distinct_2": 0.1}  # fmt: skip
    assert len(warnings_of(worse)) == 4 and "perplexity 0.5 → 1" in warnings_of(worse)[0]
    assert "KL to the start" in render(worse, 16) and "0.5 → 1" in render(worse, 16)
