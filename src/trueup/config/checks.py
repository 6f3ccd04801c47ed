"""What follows from a config, and what cannot be meant: defaults that depend on other keys, and rules across keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

from trueup.config.explain import closest_choice, condition_words
from trueup.config.methods import (
    ACTS_WITH,
    LATER,
    LATER_VALUES,
    QUIET,
    is_off,
    missing_condition,
)
from trueup.config.schema import SECTION_OF, RunConfig, default
from trueup.errors import Problem

log = logging.getLogger("trueup")

Place = Callable[[str], str | None]
"""Where the user set a key."""

#: sections that matter when nothing is trained.
INFERENCE_SECTIONS = ("model", "data", "generate", "export")


# What follows from what was given


def derive(cfg: RunConfig) -> RunConfig:
    """Fill in what other keys imply: the jobs, the directory, LoRA's scale, evaluation."""
    changes: dict[str, Any] = {}
    if cfg.tuning.lora_alpha is None:
        changes["lora_alpha"] = 2 * cfg.tuning.lora_rank
    if 0 < cfg.train.warmup_steps < 1:
        changes |= {"warmup_steps": 0, "warmup_ratio": cfg.train.warmup_steps}
    elif cfg.train.warmup_steps >= 1:
        changes["warmup_steps"] = int(cfg.train.warmup_steps)
    if cfg.train.output_dir is None and cfg.model.model_name_or_path:
        changes["output_dir"] = default_output_dir(cfg)
    return cfg.replace(**changes, **_jobs(cfg), **_evaluation(cfg))


def default_output_dir(cfg: RunConfig) -> str:
    """saves/<model>/<finetuning_type>/<stage>, where the studio and the guides look for runs."""
    model = str(cfg.model.model_name_or_path).rstrip("/\\").replace("builtin:", "")
    return f"saves/{PurePath(model).name}/{cfg.tuning.finetuning_type}/{cfg.objective.stage}"


def _jobs(cfg: RunConfig) -> dict[str, Any]:
    """Without any do_… key a run trains."""
    asked = cfg.train.do_eval or cfg.train.do_predict
    return {} if asked or "do_train" in cfg.explicit else {"do_train": True}


def _evaluation(cfg: RunConfig) -> dict[str, Any]:
    train, changes = cfg.train, {}
    if train.eval_strategy == "steps" and train.eval_steps is None:
        changes["eval_steps"] = train.logging_steps
    if train.eval_strategy != "no" or ((cfg.data.eval_dataset or cfg.data.val_size) and "do_eval" not in cfg.explicit):
        changes["do_eval"] = True
    if train.load_best_model_at_end or train.early_stopping_steps or train.save_strategy == "best":
        metric = train.metric_for_best_model or "loss"
        changes["metric_for_best_model"] = metric
        if train.greater_is_better is None:
            changes["greater_is_better"] = not metric.endswith(("loss", "perplexity", "kl"))
    return changes


# What cannot be meant together


@dataclass(frozen=True)
class Rule:
    """Keys that exclude or need each other. `broken` sees all keys as attributes."""

    keys: tuple[str, ...]
    broken: Callable[[Any], Any]
    what: str
    fix: str


def _not_multiple(c: Any) -> bool:
    if not c.load_best_model_at_end or c.eval_strategy != "steps" or c.save_strategy != "steps":
        return False
    if c.eval_steps < 1 or c.save_steps < 1:
        return (c.eval_steps < 1) != (c.save_steps < 1) or abs(c.save_steps / c.eval_steps % 1) > 1e-6
    return bool(c.save_steps % c.eval_steps)


RULES = [
    Rule(("bf16", "fp16"), lambda c: c.bf16 and c.fp16,
         "`bf16` and `fp16` exclude each other: a run computes in one format", "drop one of them; bf16 needs no loss scaling"),
    Rule(("bf16_full_eval", "fp16_full_eval"), lambda c: c.bf16_full_eval and c.fp16_full_eval,
         "`bf16_full_eval` and `fp16_full_eval` exclude each other", "drop one of them"),
    Rule(("quantization_bit", "finetuning_type"), lambda c: c.quantization_bit and c.finetuning_type not in ("lora", "oft"),
         "a quantised base cannot be trained itself: `quantization_bit` excludes `finetuning_type: full` and `freeze`",
         "drop quantization_bit, or set finetuning_type: lora"),
    Rule(("adapter_name_or_path", "finetuning_type"),
         lambda c: c.do_train and c.adapter_name_or_path and c.finetuning_type not in ("lora", "oft"),
         "`adapter_name_or_path` needs an adapter method to go on with, not `finetuning_type: full` or `freeze`",
         "set finetuning_type: lora, or merge the adapter first"),
    Rule(("resume_from_checkpoint", "new_run"), lambda c: c.resume_from_checkpoint and c.new_run,
         "`resume_from_checkpoint` goes on with a run and `new_run` starts one", "drop one of them"),
    Rule(("resume_from_checkpoint", "overwrite_output_dir"),
         lambda c: c.resume_from_checkpoint == "auto" and c.overwrite_output_dir,
         "`resume_from_checkpoint: auto` goes on with the run that `overwrite_output_dir` moves aside",
         "drop one of them"),
    Rule(("new_run", "overwrite_output_dir"), lambda c: c.new_run and c.overwrite_output_dir,
         "`new_run` keeps the run that `overwrite_output_dir` moves aside", "drop one of them"),
    Rule(("warmup_steps", "warmup_ratio"), lambda c: c.warmup_steps and c.warmup_ratio,
         "`warmup_steps` and `warmup_ratio` say the same thing twice", "drop one of them"),
    Rule(("use_galore", "use_apollo", "use_adam_mini", "use_muon"),
         lambda c: c.use_galore + c.use_apollo + c.use_adam_mini + c.use_muon > 1,
         "one run has one optimizer", "keep one of use_galore, use_apollo, use_adam_mini, use_muon"),
    Rule(("load_best_model_at_end", "eval_strategy"), lambda c: c.load_best_model_at_end and c.eval_strategy == "no",
         "`load_best_model_at_end` needs evaluations while training", "set eval_strategy: steps (or epoch)"),
    Rule(("load_best_model_at_end", "save_strategy", "eval_strategy"),
         lambda c: c.load_best_model_at_end and c.eval_strategy != "no" and c.save_strategy not in ("best", c.eval_strategy),
         "`load_best_model_at_end` needs a checkpoint at each evaluation, but `save_strategy` and `eval_strategy` differ",
         "give save_strategy and eval_strategy the same value"),
    Rule(("load_best_model_at_end", "save_steps", "eval_steps"), _not_multiple,
         "`load_best_model_at_end` needs an evaluation at each checkpoint: `save_steps` is no multiple of `eval_steps`",
         "make save_steps a multiple of eval_steps"),
    Rule(("early_stopping_steps", "eval_strategy"), lambda c: c.early_stopping_steps and c.eval_strategy == "no",
         "`early_stopping_steps` counts evaluations, and there are none", "set eval_strategy: steps (or epoch)"),
    Rule(("eval_dataset", "val_size"), lambda c: c.eval_dataset and c.val_size,
         "`eval_dataset` and `val_size` both say what to evaluate on", "drop one of them"),
    Rule(("val_size",), lambda c: c.val_size > 1 and c.val_size % 1,
         "`val_size` is a share below 1 or a whole number of rows", "round it"),
    Rule(("interleave_probs", "dataset"),
         lambda c: c.interleave_probs and c.dataset and len(c.interleave_probs) != len(c.dataset),
         "`interleave_probs` needs one number for each dataset", "give as many as there are datasets"),
    Rule(("interleave_probs",), lambda c: c.interleave_probs and (min(c.interleave_probs) < 0 or sum(c.interleave_probs) <= 0),
         "`interleave_probs` are shares: none is negative and not all are 0", "give each dataset a share"),
    Rule(("mix_strategy", "dataset"),
         lambda c: c.mix_strategy != "concat" and len(c.dataset) == 1, "`mix_strategy` needs two datasets to mix",
         "drop mix_strategy, or name a second dataset"),
    Rule(("do_train", "do_eval", "do_predict"), lambda c: not (c.do_train or c.do_eval or c.do_predict),
         "nothing to do: `do_train`, `do_eval` and `do_predict` are all false", "set one of them"),
    Rule(("streaming", "max_steps"), lambda c: c.streaming and c.do_train and c.max_steps <= 0,
         "`streaming` does not know how long an epoch is", "set max_steps"),
    Rule(("freeze_trainable_layers", "finetuning_type"),
         lambda c: c.finetuning_type == "freeze" and c.freeze_trainable_layers == 0 and not c.freeze_extra_modules,
         "`freeze_trainable_layers: 0` trains nothing", "set it to the number of last layers to train"),
    Rule(("model_name_or_path",), lambda c: not c.model_name_or_path,
         "`model_name_or_path` is missing", "name a model: a directory, a hub id, or builtin:sql-tiny"),
    Rule(("dataset",), lambda c: c.do_train and not c.dataset,
         "`dataset` is missing", "name a dataset of dataset_info.json, a built-in sample such as dpo_en_demo, or a file"),
    Rule(("dataset", "eval_dataset"), lambda c: not c.do_train and (c.do_eval or c.do_predict) and not (c.dataset or c.eval_dataset),
         "`eval_dataset` is missing: there is nothing to evaluate on", "name a dataset"),
]  # fmt: skip
_INFERENCE_RULES = [rule for rule in RULES if rule.keys == ("model_name_or_path",)]


def check(cfg: RunConfig, place: Place, bad: set[str], *, training: bool) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass.

    Rules that touch a key already found bad are left out: they would only repeat it.
    """
    problems = _not_yet(cfg, place, training)
    if not training:
        return problems + _broken(cfg, place, bad, _INFERENCE_RULES), []
    idle = _without_effect(cfg, place, bad) if _supported(cfg) else []
    return problems + _broken(cfg, place, bad, RULES), idle


def _broken(cfg: RunConfig, place: Place, bad: set[str], rules: list[Rule]) -> list[Problem]:
    view = SimpleNamespace(**cfg.resolved())
    found = []
    for rule in rules:
        if not bad.intersection(rule.keys) and rule.broken(view):
            places = dict.fromkeys(filter(None, (place(key) for key in rule.keys if key in cfg.explicit)))
            found.append(Problem(rule.what, " and ".join(places) or None, fix=rule.fix))
    return found


def _supported(cfg: RunConfig) -> bool:
    return not any(LATER_VALUES[key].get(cfg[key], "unknown") for key in ("stage", "pref_loss"))


def _not_yet(cfg: RunConfig, place: Place, training: bool) -> list[Problem]:
    """Keys and values that are known and not supported yet, and values that nobody knows."""
    sections = SECTION_OF.values() if training else INFERENCE_SECTIONS
    found = []
    for key in sorted(cfg.explicit, key=list(SECTION_OF).index):
        if SECTION_OF[key] not in sections:
            continue
        value = cfg[key]
        shown = f"`{key}: {_word(value)}`"
        if key in ("stage", "pref_loss", "optim") and value not in LATER_VALUES[key]:
            near = closest_choice(key, value)
            fix = f"did you mean {near}?" if near else None
            found.append(Problem(f"{shown} is unknown", place(key), "one of " + ", ".join(LATER_VALUES[key]), fix))
        elif LATER_VALUES.get(key, {}).get(value if isinstance(value, str) else ""):
            found.append(_later(f"{shown} is not supported yet", place(key), LATER_VALUES[key][value]))
        elif key in LATER and value != default(key) and value not in (None, False, [], {}, 0):
            found.append(_later(f"`{key}` is not supported yet", place(key), LATER[key]))
    return found


def _later(what: str, where: str | None, instead: str | None) -> Problem:
    return Problem(what, where, fix=f"use {instead}")


def _without_effect(cfg: RunConfig, place: Place, bad: set[str]) -> list[Problem]:
    """Keys the user set that do nothing with the chosen method (C6). Keys of the schedule are only said."""
    found = []
    for key in sorted(cfg.explicit & ACTS_WITH.keys() - bad, key=list(SECTION_OF).index):
        condition = missing_condition(key, cfg)
        if condition is None or is_off(key, cfg[key]) or condition[0] in bad or key in LATER:
            continue
        other, allowed = condition
        now = f"`{other}: {_word(cfg[other])}`" if cfg[other] not in (None, []) else f"no `{other}`"
        what = f"`{key}` has no effect with {now}"
        if key in QUIET:
            log.info("%s", what)
        else:
            found.append(Problem(what, place(key), fix=f"drop it; it acts with {condition_words(other, allowed)}"))
    return found


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def say_what_wins(cfg: RunConfig) -> None:
    """Settings that overrule each other by a known rule: not an error, but said."""
    if cfg.train.max_steps > 0 and "num_train_epochs" in cfg.explicit and "max_steps" in cfg.explicit:
        log.info("`max_steps: %d` wins over `num_train_epochs`", cfg.train.max_steps)
    if "do_eval" not in cfg.explicit and cfg.train.do_eval and cfg.train.do_train and cfg.train.eval_strategy == "no":
        log.info("the held-out data is evaluated at the end; set eval_strategy: steps to see it on the way")

