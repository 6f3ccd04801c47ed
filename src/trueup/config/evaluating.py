"""What `trueup eval` reads of a config: what unset keys mean, what has no effect, what cannot be meant.

Its file may hold a whole training: keys that only train are let pass there, and refused on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from trueup.config.building import has_rules, is_url
from trueup.config.checks import Place, broken, not_yet
from trueup.config.losses import loss_defaults
from trueup.config.methods import SET, STAGES, missing_condition, stage_kind
from trueup.config.rules import RULES as TRAINING_RULES
from trueup.config.rules.answers import GREEDY, JUDGE
from trueup.config.rules.model import QUANTISATION
from trueup.config.rules.online import REWARD_WEIGHTS
from trueup.config.rules.rule import Rule
from trueup.config.rules.train import PRECISION
from trueup.config.schema import SECTION_OF, RunConfig
from trueup.config.verbs import read_with, section_keys, without_effect
from trueup.errors import Problem

START = "start"  # of eval_models: model_name_or_path with its adapters
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 512}

_ANSWERED = ("answers", "wins")
_CHINESE = ("cmmlu", "ceval")
_MEASURED: dict[str, list[str]] = {
    "pair": ["preference", "perplexity", "divergence"],
    "ranking": ["preference"],
    "chat": ["perplexity", "divergence", "answers"],
    "text": ["perplexity", "divergence"],
    "feedback": ["answers"],
    "prompt": ["answers"],
}
_COMPARING = tuple(name for name, stage in STAGES.items() if stage.kind in ("pair", "ranking"))
_RULE_KEYS = " ".join(key for key in SECTION_OF if key.startswith("rule_") and key != "rule_sql_schema")

#: keys → the conditions under which an evaluation reads them; keys in no row are of other verbs.
_ROWS: list[tuple[str, dict[str, Any]]] = [
    (section_keys("model"), {}),
    (section_keys("objective"), {}),
    ("eval_models eval_measures bootstrap_samples task", {}),
    ("dataset eval_dataset val_size dataset_dir max_samples on_bad_rows", {}),
    ("cutoff_len truncation template default_system tool_format enable_thinking preserve_thinking", {}),
    ("do_eval eval_strategy per_device_eval_batch_size bf16 fp16 seed data_seed output_dir on_unused_keys", {}),
    ("mask_history", {"stage": ("sft",)}),
    ("save_dir", {}),
    ("eval_group_by", {"eval_measures": ("preference",)}),
    ("temperature max_new_tokens do_sample generation_batch_size eval_prompts", {"eval_measures": _ANSWERED}),
    ("top_p top_k", {"eval_measures": _ANSWERED}),
    ("task_dir task_limit task_chat batch_size n_shot lang download_mode", {"task": SET}),
    ("rank_by", {"eval_measures": _ANSWERED}),
    ("judge_model judge_mode judge_rubric judge_max_tokens", {"rank_by": ("judge",)}),
    ("judge_key_env", {"rank_by": ("judge",), "judge_model": SET}),
    (_RULE_KEYS, {"rank_by": ("scores",)}),
    ("rule_sql_schema", {"rule_format": ("sql",)}),
    ("reward_funcs reward_model reward_weights", {"rank_by": ("scores",)}),
    ("reward_timeout", {"reward_funcs": SET}),
    ("reward_model_adapters reward_model_type", {"reward_model": SET}),
    ("sample_key_env", {"eval_models": SET}),
    ("request_timeout request_tries requests_at_once request_options", {"eval_measures": _ANSWERED}),
]
READ_WITH: dict[str, Mapping[str, Any]] = read_with(_ROWS)


def overruled(said: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Words that take back what a run's file says and a command line says otherwise: which rows to measure on.

    Args:
        said, known: keys of the command line; of the file and the command line.
    """
    others = "eval_dataset" in said and "val_size" not in said and bool(known.get("val_size"))
    return ["val_size=0"] if others else []


def derive(cfg: RunConfig) -> RunConfig:
    """Fill in what other keys imply: the loss, how answers are drawn, who judges them, what is measured, where."""
    changes: dict[str, Any] = {
        **loss_defaults(cfg),
        **{key: value for key, value in SAMPLING.items() if key not in cfg.explicit},
        **_held_out(cfg),
    }
    if cfg.generate.do_sample is False:
        changes["temperature"] = 0.0
    if cfg.build.rank_by is None:
        changes["rank_by"] = _ranker(cfg)
    if cfg.train.output_dir is None:
        changes["output_dir"] = cfg.evaluate.save_dir or default_output_dir(cfg)
    cfg = cfg.replace(do_train=False, do_predict=False, **changes)
    return cfg if cfg.evaluate.eval_measures else cfg.replace(eval_measures=_measures(cfg))


def default_output_dir(cfg: RunConfig) -> str:
    """saves/<model>/eval, by the last of several models."""
    names = [name for name in cfg.evaluate.eval_models if name != START] or [str(cfg.model.model_name_or_path or "")]
    name = names[-1].rpartition("#")[2].rstrip("/").replace("builtin:", "")
    return f"saves/{PurePath(name).name}/eval"


def _held_out(cfg: RunConfig) -> dict[str, Any]:
    """A dataset alone is what to evaluate on, unless its config holds rows of it back from training."""
    held_back = cfg.data.eval_dataset or cfg.data.val_size or cfg.train.do_eval or cfg.train.eval_strategy != "no"
    if held_back or not cfg.data.dataset:
        return {"do_eval": True}
    return {"eval_dataset": cfg.data.dataset, "dataset": [], "do_eval": True}


def _ranker(cfg: RunConfig) -> str | None:
    if cfg.build.judge_model:
        return "judge"
    return "scores" if has_rules(cfg) or cfg.online.reward_funcs or cfg.online.reward_model else None


def _measures(cfg: RunConfig) -> list[str]:
    """What the data, a judge and the tasks that are there ask for."""
    found = list(_MEASURED[stage_kind(cfg)]) if cfg.data.eval_dataset or cfg.data.dataset else []
    if cfg.objective.stage == "rm":
        found = ["preference"] * bool(found)
    if all(map(is_url, cfg.evaluate.eval_models)) and cfg.evaluate.eval_models:
        found = ["answers"]
    asked = {"temperature", "max_new_tokens", "eval_prompts"} & cfg.explicit
    speaks = found and stage_kind(cfg) != "text"
    if speaks and (asked or cfg.build.rank_by) and "answers" not in found:
        found.append("answers")
    if speaks and cfg.build.rank_by and len(cfg.evaluate.eval_models) > 1:
        found.append("wins")
    return found + ["task"] * bool(cfg.evaluate.task)


def check(cfg: RunConfig, place: Place, bad: set[str]) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass."""

    def of_the_file(key: str) -> bool:
        return not (place(key) or "").startswith("--")

    problems = not_yet(cfg, place, training=False) + broken(cfg, place, bad, RULES)
    idle = without_effect(cfg, place, bad, "eval", READ_WITH, passes=of_the_file)
    for key in sorted(cfg.explicit - bad):
        if SECTION_OF[key] == "objective" and not of_the_file(key) and (missing := missing_condition(key, cfg)):
            idle.append(
                Problem(f"`{key}` has no effect with `{missing[0]}: {cfg[missing[0]]}`", place(key), fix="drop it")
            )
    return problems, idle


RULES = [
    *QUANTISATION,
    *(rule for rule in TRAINING_RULES if all(SECTION_OF[key] == "objective" for key in rule.keys)),
    Rule(
        ("stage",),
        lambda c: c.stage not in STAGES,
        "this `stage` is unknown",
        "one of " + ", ".join(STAGES) + "; unset, the rows of the data say which",
    ),
    Rule(
        ("model_name_or_path", "eval_models"),
        lambda c: not c.model_name_or_path and (not c.eval_models or START in c.eval_models),
        "`model_name_or_path` is missing",
        "name a model: a directory, a hub id, or builtin:sql-tiny; or run directories in eval_models",
    ),
    Rule(
        ("eval_dataset", "task"),
        lambda c: not (c.eval_dataset or c.dataset or c.task),
        "there is nothing to evaluate on",
        "name a dataset or a file in eval_dataset, or a task of lm-evaluation-harness",
    ),
    Rule(
        ("eval_dataset", "val_size"),
        lambda c: c.eval_dataset and c.val_size,
        "`eval_dataset` and `val_size` both say what to evaluate on",
        "drop one of them",
    ),
    Rule(
        ("eval_models",),
        lambda c: len(set(c.eval_models)) < len(c.eval_models),
        "`eval_models` names a model twice",
        "name each once",
    ),
    Rule(
        ("eval_models",),
        lambda c: any(is_url(name) and "#" not in name for name in c.eval_models),
        "an endpoint is named without its model",
        "write URL#MODEL, for example http://127.0.0.1:8000/v1#qwen",
    ),
    Rule(
        ("eval_models", "eval_measures"),
        lambda c: any(map(is_url, c.eval_models)) and not set(c.eval_measures) <= set(_ANSWERED),
        "of an endpoint only answers can be had",
        "set eval_measures: answers (and wins), or name models of this machine",
    ),
    Rule(
        ("eval_measures", "eval_models"),
        lambda c: "wins" in c.eval_measures and len(c.eval_models) < 2,
        "`wins` compares models, and there is one",
        "name two or more in eval_models",
    ),
    Rule(
        ("eval_measures", "rank_by"),
        lambda c: "wins" in c.eval_measures and c.rank_by is None,
        "nobody says who wins",
        "set judge_model, reward_model, reward_funcs or a rule (rule_regex: …)",
    ),
    Rule(
        ("rank_by",),
        lambda c: c.rank_by == "logps",
        "`rank_by: logps` belongs to `trueup data build`",
        "set judge_model, reward_model, reward_funcs or a rule",
    ),
    JUDGE,
    REWARD_WEIGHTS,
    Rule(
        ("eval_measures", "task"),
        lambda c: ("task" in c.eval_measures) != bool(c.task),
        "`task` names what the measure `task` asks, and both belong together",
        "set task, or leave it out of eval_measures",
    ),
    Rule(
        ("lang", "task"),
        lambda c: c.lang == "zh" and any(not name.startswith(_CHINESE) for name in c.task),
        "`lang` has no effect: a task of the harness asks in the words that it has",
        "drop it; Chinese tasks are cmmlu, ceval-valid, or one of your own in task_dir",
    ),
    Rule(
        ("download_mode",),
        lambda c: c.download_mode != "reuse_dataset_if_exists",
        "`download_mode` has no effect: what has been downloaded is used again",
        "drop it; to fetch a set anew, remove it from the cache of the hub's library",
    ),
    Rule(
        ("stage", "eval_measures"),
        lambda c: c.stage == "rm" and set(c.eval_measures) - {"preference"},
        "a reward model scores and does not speak: only `preference` can be measured",
        "set eval_measures: preference",
    ),
    Rule(
        ("stage", "eval_measures"),
        lambda c: "preference" in c.eval_measures and c.stage not in _COMPARING,
        "`preference` is measured on pairs",
        "set stage: dpo (or rm, for a reward model), and give pairs as eval_dataset",
    ),
    GREEDY,
    PRECISION,
]  # fmt: skip
