"""When a run logs, evaluates, saves, keeps its best and ends."""

from __future__ import annotations

import json

import pytest
import torch
from toy_program import ToyProgram, run_toy, settings

from trueup.errors import ConfigError
from trueup.training.backend import Single
from trueup.training.checkpoint import checkpoints, step_of
from trueup.training.evaluation import evaluate_run, metric_name
from trueup.training.loop import fit
from trueup.training.plan import make_plan, warmup_steps
from trueup.training.run_directory import RunDirectory, read_metrics


def due(plan, what):
    return [step for step in range(1, plan.total_steps + 1) if getattr(plan, what)(step)]


def test_max_steps_overrides_epochs_and_epochs_may_be_fractions():
    assert make_plan(settings(num_train_epochs=2.5), 10).total_steps == 25
    assert make_plan(settings(num_train_epochs=2.5, max_steps=7), 10).total_steps == 7


def test_intervals_below_one_are_shares_of_all_steps():
    plan = make_plan(settings(num_train_epochs=2, logging_steps=0.25, save_strategy="steps", save_steps=0.5), 10)
    assert due(plan, "logs") == [5, 10, 15, 20]
    assert due(plan, "saves") == [10, 20]


def test_first_and_last_step_are_logged():
    plan = make_plan(settings(max_steps=8, logging_steps=3, logging_first_step=True), 10)
    assert due(plan, "logs") == [1, 3, 6, 8]


def test_epoch_strategies_fire_at_epoch_ends_and_at_the_end():
    keys = dict(logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch")
    plan = make_plan(settings(num_train_epochs=2.5, **keys), 4)
    assert due(plan, "logs") == due(plan, "evaluates") == due(plan, "saves") == [4, 8, 10]


def test_eval_steps_default_to_logging_steps_and_eval_delay_waits():
    plan = make_plan(settings(max_steps=8, logging_steps=2, eval_strategy="steps", eval_delay=5), 9)
    assert due(plan, "evaluates") == [6, 8]
    keys = dict(num_train_epochs=4, eval_strategy="epoch", eval_delay=2)
    assert due(make_plan(settings(**keys), 5), "evaluates") == [10, 15, 20]


def test_warmup_by_steps_by_share_and_by_ratio():
    assert warmup_steps(settings(warmup_steps=5, warmup_ratio=0.5), 100) == 5
    assert warmup_steps(settings(warmup_steps=0.1, warmup_ratio=0.0), 95) == 10
    assert warmup_steps(settings(warmup_steps=0, warmup_ratio=0.03), 100) == 3


def test_no_steps_is_the_users_error():
    with pytest.raises(ConfigError, match="0 steps"):
        make_plan(settings(), 0)


def test_metric_names_with_and_without_eval():
    row = {"eval_loss": 1.0, "eval_rewards/accuracies": 0.5}
    assert metric_name(None, row) == metric_name("eval_loss", row) == "eval_loss"
    assert metric_name("rewards/accuracies", row) == "eval_rewards/accuracies"
    assert metric_name("loss", {"eval_a_loss": 1.0, "eval_b_loss": 2.0}) == "eval_a_loss"
    with pytest.raises(ConfigError, match="rewards/accuracies"):
        metric_name("bleu", row)


class Scripted:
    """A program whose evaluation loss follows a script."""

    def __new__(cls, losses):

        toy = ToyProgram()
        script = iter(losses)
        inner = toy.loss

        def loss(batch, totals):
            value, metrics = inner(batch, totals)
            if not torch.is_grad_enabled():
                first = batch is toy.eval_sets["eval"][0]
                value = torch.tensor(next(script) if first else 0.0)
            return value, metrics

        toy.loss = loss
        return toy


def run_scripted(directory, losses, **keys):

    toy = Scripted(losses)
    with RunDirectory.open(directory, {}) as run:
        return fit(toy, settings(**keys), run, Single(), [])


def steps_saved(directory):
    return sorted(step_of(path) for path in checkpoints(directory))


EVALS = dict(eval_strategy="steps", eval_steps=1, max_steps=6, save_strategy="steps", save_steps=4)


def test_the_best_model_is_what_is_saved_at_the_end(tmp_path):
    losses = [0.9, 0.5, 0.7, 0.8, 0.8, 0.8, 0.5]
    result = run_scripted(tmp_path / "run", losses, load_best_model_at_end=True, **EVALS)
    assert (result.best_metric, result.best_checkpoint) == (
        pytest.approx(0.5), tmp_path / "run" / "checkpoint-2"
    )  # fmt: skip
    best = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == best.read_bytes()
    assert steps_saved(tmp_path / "run") == [2, 4, 6]  # 1 was the best once, and is superseded
    assert len(read_metrics(tmp_path / "run")) == 2 + 6


def test_the_best_model_works_with_save_only_model(tmp_path):
    losses = [0.9, 0.5, 0.7, 0.8, 0.8, 0.8, 0.5]
    keys = dict(load_best_model_at_end=True, save_only_model=True)
    run_scripted(tmp_path / "run", losses, **keys, **EVALS)
    best = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == best.read_bytes()


def test_save_strategy_best_saves_improvements_only(tmp_path):
    keys = {**EVALS, "save_strategy": "best"}
    run_scripted(tmp_path / "run", [0.9, 0.95, 0.5, 0.6, 0.4, 0.7], **keys)
    assert steps_saved(tmp_path / "run") == [1, 3, 5]


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    losses = [0.9, 0.5, 0.6, 0.55, 0.4, 0.4]
    result = run_scripted(tmp_path / "run", losses, early_stopping_steps=2, **EVALS)
    assert result.early_stopped and result.steps == 4
    assert steps_saved(tmp_path / "run") == [4]
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [3, 4]


def test_greater_is_better_follows_the_metric_or_the_key(tmp_path):
    losses = [0.1, 0.5, 0.9, 0.2, 0.2, 0.2]
    result = run_scripted(tmp_path / "run", losses, greater_is_better=True, **EVALS)
    assert result.best_metric == pytest.approx(0.9)


def test_final_evaluation_is_written_even_without_a_strategy(tmp_path):
    result, _ = run_toy(tmp_path / "run", max_steps=2, do_eval=True)
    assert "eval_loss" in result.evaluation
    assert (tmp_path / "run" / "eval_results.json").is_file()


def test_several_evaluation_sets_are_named(tmp_path):

    toy = ToyProgram()
    batches = toy.eval_sets["eval"]
    toy.eval_sets = {"eval_mydata": batches[:2], "eval_other": batches[2:]}
    with RunDirectory.open(tmp_path / "run", {}) as run:
        result = fit(toy, settings(max_steps=2, do_eval=True), run, Single())
    assert {"eval_mydata_loss", "eval_other_loss"} <= result.evaluation.keys()


def test_reduce_on_plateau_follows_the_evaluation(tmp_path):
    keys = dict(lr_scheduler_type="reduce_lr_on_plateau", logging_steps=1)
    keys |= dict(lr_scheduler_kwargs={"patience": 0, "factor": 0.5})
    run_scripted(tmp_path / "run", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], **{**EVALS, **keys})
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert rates[:2] == [0.01, 0.01] and rates[2:4] == [0.005, 0.0025]


def test_a_run_that_only_evaluates_writes_results_and_no_model(tmp_path):
    run_toy(tmp_path / "run", max_steps=2)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with RunDirectory.open(tmp_path / "run", {}, join=True) as run:
        row = evaluate_run(ToyProgram(), run, Single())
    assert row["eval_loss"] > 0
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text("utf-8")) == row
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
