"""What a run does, and when it evaluates, saves and goes on."""

from __future__ import annotations

from typing import Any

from trueup.config.rules.rule import Rule


def _not_multiple(c: Any) -> bool:
    if not c.load_best_model_at_end or c.eval_strategy != "steps" or c.save_strategy != "steps":
        return False
    if c.eval_steps < 1 or c.save_steps < 1:
        return (c.eval_steps < 1) != (c.save_steps < 1) or abs(c.save_steps / c.eval_steps % 1) > 1e-6
    return bool(c.save_steps % c.eval_steps)


PRECISION = Rule(
    ("bf16", "fp16"),
    lambda c: c.bf16 and c.fp16,
    "`bf16` and `fp16` exclude each other: a run computes in one format",
    "drop one of them; bf16 needs no loss scaling",
)

RULES = [
    PRECISION,
    Rule(
        ("resume_from_checkpoint", "new_run"),
        lambda c: c.resume_from_checkpoint and c.new_run,
        "`resume_from_checkpoint` goes on with a run and `new_run` starts one",
        "drop one of them",
    ),
    Rule(
        ("new_run", "overwrite_output_dir"),
        lambda c: c.new_run and c.overwrite_output_dir,
        "`new_run` keeps the run that `overwrite_output_dir` moves aside",
        "drop one of them",
    ),
    Rule(
        ("warmup_steps", "warmup_ratio"),
        lambda c: c.warmup_steps and c.warmup_ratio,
        "`warmup_steps` and `warmup_ratio` say the same thing twice",
        "drop one of them",
    ),
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda c: c.load_best_model_at_end and c.eval_strategy == "no",
        "`load_best_model_at_end` needs evaluations while training",
        "set eval_strategy: steps (or epoch)",
    ),
    Rule(
        ("load_best_model_at_end", "save_strategy", "eval_strategy"),
        lambda c: (
            c.load_best_model_at_end and c.eval_strategy != "no" and c.save_strategy not in ("best", c.eval_strategy)
        ),
        "`load_best_model_at_end` needs a checkpoint at each evaluation: `save_strategy` and `eval_strategy` differ",
        "give save_strategy and eval_strategy the same value",
    ),
    Rule(
        ("load_best_model_at_end", "save_steps", "eval_steps"),
        _not_multiple,
        "`load_best_model_at_end` needs an evaluation at each checkpoint: `save_steps` is no multiple of `eval_steps`",
        "make save_steps a multiple of eval_steps",
    ),
    Rule(
        ("early_stopping_steps", "eval_strategy"),
        lambda c: c.early_stopping_steps and c.eval_strategy == "no",
        "`early_stopping_steps` counts evaluations, and there are none",
        "set eval_strategy: steps (or epoch)",
    ),
    Rule(
        ("do_train", "do_eval", "do_predict"),
        lambda c: not (c.do_train or c.do_eval or c.do_predict),
        "nothing to do: `do_train`, `do_eval` and `do_predict` are all false",
        "set one of them",
    ),
    Rule(
        ("stage", "do_predict"),
        lambda c: c.do_predict and c.stage in ("pt", "rm"),
        "`do_predict` writes answers to prompts, which this stage has none of, or scores",
        "drop it; do_eval measures the model, and trueup score applies a reward model",
    ),
    Rule(
        ("predict_with_generate", "do_eval", "do_predict"),
        lambda c: c.predict_with_generate and not (c.do_eval or c.do_predict),
        "`predict_with_generate` has no effect: nothing is evaluated or predicted",
        "set do_eval or do_predict, or drop it",
    ),
    Rule(
        ("do_predict", "predict_with_generate", "train_on_prompt"),
        lambda c: c.stage == "sft" and c.train_on_prompt and (c.do_predict or c.predict_with_generate),
        "with `train_on_prompt` the tokens of a row do not say where its answer begins",
        "predict in a run of its own, without train_on_prompt",
    ),
]
