"""`log_entropy`: the right number in logged steps and evaluations, and no work in any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trueup.data.encode import prepare
from trueup.data.forest import build_forest
from trueup.models.load import load_policy, load_tokenizer
from trueup.models.logprobs import token_entropy
from trueup.recipes import entropy
from trueup.recipes.run import run
from trueup.training.run_directory import read_metrics

KINDS = {
    "pairs": {"eval_dataset": "held"},
    "chats": {"stage": "sft", "dataset": "chats"},
    "texts": {"stage": "pt", "dataset": "texts"},
    "labels": {"stage": "kto", "dataset": "labels"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_that_of_the_policy_at_its_answers(config, kind: str) -> None:
    cfg = config(log_entropy=True, max_steps=1, per_device_train_batch_size=8, **KINDS[kind], disable_shuffling=True)
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare(cfg, tokenizer)
    policy = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer).policy
    rows = 8 if kind != "texts" else len(prepared.train)  # these are packed
    forest = build_forest([prepared.train[i] for i in range(rows)])
    with torch.no_grad():
        hidden = policy.hidden(forest)
        logits = policy.head.module(hidden)
        expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    (row,) = [r for r in read_metrics(run(cfg).output_dir) if "loss" in r]
    assert row["entropy"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_computed_in_other_steps_nor_when_it_is_off(config, monkeypatch, on: bool) -> None:
    calls = []
    monkeypatch.setattr(entropy, "token_entropy", lambda *given: calls.append(1) or token_entropy(*given))
    cfg = config(
        log_entropy=on, logging_steps=3, max_steps=5, eval_dataset="held", eval_strategy="steps", eval_steps=5,
        per_device_eval_batch_size=6,
    )  # fmt: skip
    rows = read_metrics(run(cfg).output_dir)
    assert len(calls) == (2 + 1) * on  # steps 3 and 5, and one batch of the evaluation
    assert [sorted(r.keys() & {"entropy", "eval_entropy"}) for r in rows] == (
        [["entropy"], ["entropy"], ["eval_entropy"]] if on else [[], [], []]
    )


def test_it_changes_no_other_number(config, tmp_path: Path) -> None:
    keys = {"max_steps": 3, "lora_dropout": 0.1}
    one, two = (read_metrics(run(config(**keys, log_entropy=on, output_dir=str(tmp_path / str(on)))).output_dir)
                for on in (True, False))  # fmt: skip
    assert [(r["loss"], r["grad_norm"]) for r in one] == [(r["loss"], r["grad_norm"]) for r in two]
    assert np.isfinite([r["entropy"] for r in one]).all()


def test_evaluations_can_be_judged_by_it(config) -> None:
    cfg = config(
        log_entropy=True, eval_dataset="held", eval_strategy="epoch", num_train_epochs=1,
        metric_for_best_model="entropy", greater_is_better=False,
    )  # fmt: skip
    assert "eval_entropy" in run(cfg).metrics
