"""`compute_accuracy`: how often an evaluation's tokens are what the model would have written; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.data.forest import build_forest
from trueup.errors import ConfigError
from trueup.models.load import load_for_evaluation, load_tokenizer
from trueup.recipes import text
from trueup.recipes.run import run
from trueup.training.run_directory import read_metrics

Config = Callable[..., RunConfig]
SFT = {"stage": "sft", "dataset": "chats"}
HELD = {"stage": "sft", "dataset": None, "eval_dataset": "chats", "do_eval": True}


@pytest.mark.parametrize("rows", [1, 5, 21])
def test_it_is_the_share_of_tokens_that_the_model_would_have_written(config: Config, rows: int) -> None:
    cfg = config(**HELD, compute_accuracy=True, per_device_eval_batch_size=rows)
    tokenizer = load_tokenizer(cfg.model)
    (dataset,) = prepare(cfg, tokenizer).eval.values()
    policy = load_for_evaluation(cfg.model, cfg.train, tokenizer, torch.device("cpu")).policy
    forest = build_forest(list(dataset))
    with torch.no_grad():
        logits = policy.head.module(policy.hidden(forest))
    top = logits.topk(2).values
    near = int((top[:, 0] - top[:, 1] < 1e-4).sum())  # ties but for rounding may fall either way
    right = int((logits.argmax(1) == forest.target).sum())
    found = run(cfg).metrics["eval_accuracy"] * len(logits)
    assert abs(found - right) <= near + 1e-6


def test_training_is_not_graded_and_its_numbers_stay(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = text.graded_logps
    monkeypatch.setattr(text, "graded_logps", lambda *given: calls.append(1) or whole(*given))
    keys = {**SFT, "eval_dataset": "chats", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    keys |= {"per_device_eval_batch_size": 21, "overwrite_output_dir": True}
    rows = {on: read_metrics(run(config(**keys, compute_accuracy=on)).output_dir) for on in (True, False)}
    assert len(calls) == 2  # evaluations, of one batch each
    assert [row["loss"] for row in rows[True] if "loss" in row] == [r["loss"] for r in rows[False] if "loss" in r]
    assert [sum("eval_accuracy" in row for row in of) for of in rows.values()] == [2, 0]
    assert not any("accuracy" in row for row in rows[True])


def test_the_best_checkpoint_can_be_that_of_the_highest(config: Config) -> None:
    cfg = config(
        **SFT, compute_accuracy=True, eval_dataset="chats", eval_strategy="epoch", save_strategy="epoch",
        num_train_epochs=1, load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    assert cfg.train.greater_is_better
    assert "eval_accuracy" in run(cfg).metrics


def test_it_needs_an_evaluation_of_answers(config: Config) -> None:
    with pytest.raises(ConfigError, match="`compute_accuracy` has no effect with `do_eval: false`"):
        config(**SFT, compute_accuracy=True)
    with pytest.raises(ConfigError, match="`compute_accuracy` has no effect with `stage: dpo`"):
        config(compute_accuracy=True, eval_dataset="held")
