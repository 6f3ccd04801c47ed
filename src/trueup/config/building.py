"""What `trueup data build` reads of a config: what unset keys mean, what has no effect, what cannot be meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from trueup.config.checks import Place, broken, not_yet
from trueup.config.methods import SET, is_off
from trueup.config.rules.answers import JUDGE, PROMPTS
from trueup.config.rules.model import QUANTISATION
from trueup.config.rules.rule import Rule
from trueup.config.rules.train import PRECISION
from trueup.config.schema import SECTION_OF, RunConfig
from trueup.config.sections.online import SAMPLING
from trueup.config.values import words
from trueup.config.verbs import read_with, section_keys, without_effect
from trueup.errors import Problem

ANSWERS = 4  # of each model to each prompt, where num_generations is unset
LONGEST = 512  # tokens of an answer, where max_new_tokens is unset

_BUILD_KEYS = " ".join(key for key, section in SECTION_OF.items() if section == "build")
_RULE_KEYS = tuple(key for key in SECTION_OF if key.startswith("rule_") and key != "rule_sql_schema")

#: keys → the conditions under which a build reads them; keys in no row are of other verbs.
_ROWS: list[tuple[str, dict[str, Any]]] = [
    (section_keys("model"), {}),
    (_BUILD_KEYS, {}),
    ("dataset dataset_dir max_samples on_bad_rows cutoff_len", {}),
    ("template default_system tool_format enable_thinking preserve_thinking", {}),
    ("num_generations generation_batch_size mask_truncated_completions", {}),
    ("temperature top_p top_k max_new_tokens", {}),
    ("bf16 fp16 seed output_dir on_unused_keys", {}),
    ("judge_model judge_mode judge_rubric judge_max_tokens", {"rank_by": ("judge",)}),
    ("judge_key_env judge_price", {"rank_by": ("judge",), "judge_model": SET}),
    (" ".join(_RULE_KEYS), {"rank_by": ("scores",)}),
    ("rule_sql_schema", {"rule_format": ("sql",)}),
    ("reward_funcs reward_model reward_weights", {"rank_by": ("scores",)}),
    ("reward_timeout", {"reward_funcs": SET}),
    ("reward_model_adapters reward_model_type", {"reward_model": SET}),
    ("ref_model", {"rank_by": ("logps",)}),
    ("ref_model_adapters", {"ref_model": SET}),
    ("sample_key_env sample_price", {"sample_from": SET}),
]
#: keys that say what models of this machine see: idle where endpoints do everything.
_LOCAL_KEYS = frozenset(words("cutoff_len template tool_format enable_thinking preserve_thinking"))
READ_WITH: dict[str, Mapping[str, Any]] = read_with(_ROWS)


def is_url(name: str | None) -> bool:
    """Whether a model is named by URL#MODEL, an OpenAI-compatible endpoint."""
    return bool(name) and str(name).startswith(("http://", "https://"))


def derive(cfg: RunConfig) -> RunConfig:
    """Fill in what other keys imply: who ranks, how answers are sampled, where everything goes."""
    changes: dict[str, Any] = {
        k: v for k, v in (SAMPLING | {"max_new_tokens": LONGEST}).items() if k not in cfg.explicit
    }
    if cfg.online.num_generations is None:
        changes["num_generations"] = ANSWERS
    if cfg.build.rank_by is None:
        changes["rank_by"] = _ranker(cfg)
    if cfg.train.output_dir is None:
        name = str(cfg.model.model_name_or_path or (cfg.build.sample_from or ["answers"])[0]).rpartition("#")[2]
        changes["output_dir"] = f"saves/{PurePath(name.rstrip('/').replace('builtin:', '')).name}/build"
    return cfg.replace(**changes)


def _ranker(cfg: RunConfig) -> str | None:
    if cfg.build.judge_model:
        return "judge"
    scored = has_rules(cfg) or cfg.online.reward_funcs or cfg.online.reward_model
    return "scores" if scored else None


def has_rules(cfg: RunConfig) -> bool:
    """Whether any rule is set."""
    return any(cfg[key] not in (None, []) for key in _RULE_KEYS)


def check(cfg: RunConfig, place: Place, bad: set[str]) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass."""
    problems = not_yet(cfg, place, training=False) + broken(cfg, place, bad, RULES)
    return problems, _without_effect(cfg, place, bad)


def _without_effect(cfg: RunConfig, place: Place, bad: set[str]) -> list[Problem]:
    found = without_effect(cfg, place, bad, "data build", READ_WITH)
    idle = (
        set() if _asks_models(cfg) else {key for key in cfg.explicit & _LOCAL_KEYS - bad if not is_off(key, cfg[key])}
    )
    what = "has no effect: only endpoints are asked, and no model of this machine"
    return found + [Problem(f"`{key}` {what}", place(key), fix="drop it") for key in sorted(idle)]


def _asks_models(cfg: RunConfig) -> bool:
    """Whether a model of this machine answers or ranks."""
    build = cfg.build
    ranks = {"judge": build.judge_model, "scores": cfg.online.reward_model, "logps": cfg.model.model_name_or_path}
    ranker = ranks.get(build.rank_by or "")
    return not all(map(is_url, build.sample_from)) or not build.sample_from or bool(ranker and not is_url(ranker))


def _asks_endpoints(c: Any) -> bool:
    return any(map(is_url, c.sample_from)) or (c.rank_by == "judge" and is_url(c.judge_model))


def _sources(c: Any) -> int:
    return len(c.sample_from) or 1


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


RULES = [
    *QUANTISATION,
    Rule(
        ("model_name_or_path", "sample_from"),
        lambda c: not c.model_name_or_path and not c.sample_from,
        "nobody answers: `model_name_or_path` and `sample_from` are missing",
        "name a model: a directory, a hub id, builtin:sql-tiny, or in sample_from the URL#MODEL of an endpoint",
    ),
    PROMPTS,
    Rule(
        ("rank_by",),
        lambda c: c.rank_by is None,
        "nobody says which answer is better",
        "set judge_model, reward_model, reward_funcs, a rule (rule_regex: …), or rank_by: logps",
    ),
    JUDGE,
    Rule(
        ("rank_by", "reward_funcs", "reward_model"),
        lambda c: (
            c.rank_by == "scores" and not (c.reward_funcs or c.reward_model)
            and all(getattr(c, key) in (None, []) for key in _RULE_KEYS)
        ),
        "`rank_by: scores` needs something that scores",
        "set a rule (rule_regex: …), reward_funcs or reward_model",
    ),  # fmt: skip
    Rule(
        ("rank_by", "model_name_or_path"),
        lambda c: c.rank_by == "logps" and not c.model_name_or_path,
        "`rank_by: logps` needs a model to compute them with",
        "set model_name_or_path",
    ),
    Rule(
        ("reward_weights", "reward_funcs", "reward_model"),
        lambda c: c.reward_weights and len(c.reward_weights) != len(c.reward_funcs) + bool(c.reward_model),
        "`reward_weights` needs one number for each reward: those of `reward_funcs`, then `reward_model`",
        "give as many as there are rewards; each rule weighs 1",
    ),
    Rule(
        ("sample_from", "adapter_name_or_path"),
        lambda c: c.sample_from and c.adapter_name_or_path and c.rank_by != "logps",
        "`adapter_name_or_path` has no effect with `sample_from`",
        "name the adapter's directory in sample_from; its base is found in it",
    ),
    Rule(
        ("sample_from", "model_name_or_path"),
        lambda c: c.sample_from and c.model_name_or_path and c.rank_by != "logps" and not c.reward_model,
        "`model_name_or_path` has no effect with `sample_from`",
        "name it in sample_from too, or drop it",
    ),
    Rule(
        ("sample_from", "judge_model"),
        lambda c: any("@" in urlsplit(n).netloc for n in [*c.sample_from, c.judge_model or ""] if is_url(n)),
        "a URL holds a name or a password, which would be written into the result",
        "put the key into a variable: sample_key_env, judge_key_env",
    ),
    Rule(
        ("sample_from",),
        lambda c: len(set(c.sample_from)) < len(c.sample_from),
        "`sample_from` names a model twice",
        "name each once; num_generations says how many answers each gives",
    ),
    Rule(
        ("num_generations", "sample_from"),
        lambda c: _sources(c) * c.num_generations < 2,
        "one answer cannot be compared with others of its prompt",
        "set num_generations: 2 or more, or name another model in sample_from",
    ),
    Rule(
        ("temperature", "num_generations"),
        lambda c: c.temperature == 0 and c.num_generations > 1,
        "at `temperature: 0` all answers of a model to a prompt are the same",
        "set temperature: 1, or num_generations: 1 with several models in sample_from",
    ),
    Rule(
        ("sample_from", "judge_model"),
        lambda c: any(is_url(n) and "#" not in n for n in [*c.sample_from, c.judge_model or ""]),
        "an endpoint is named without its model",
        "write URL#MODEL, for example http://127.0.0.1:8000/v1#qwen",
    ),
    Rule(
        ("sample_key_env", "sample_price", "sample_from"),
        lambda c: (c.sample_key_env or c.sample_price) and c.sample_from and not any(map(is_url, c.sample_from)),
        "`sample_key_env` and `sample_price` have no effect: no endpoint is in `sample_from`",
        "drop it",
    ),
    Rule(
        ("judge_key_env", "judge_price", "judge_model"),
        lambda c: (c.judge_key_env or c.judge_price) and c.judge_model and not is_url(c.judge_model),
        "`judge_key_env` and `judge_price` have no effect: `judge_model` is no endpoint",
        "drop it",
    ),
    Rule(
        ("judge_price", "sample_price"),
        lambda c: any(price and (len(price) != 2 or min(price) < 0) for price in (c.judge_price, c.sample_price)),
        "a price is two numbers, what a million tokens cost that are read, and that are written",
        "write judge_price: [2.5, 10]",
    ),
    Rule(
        ("request_timeout", "request_tries", "requests_at_once", "request_options"),
        lambda c: (
            {"request_timeout", "request_tries", "requests_at_once", "request_options"} & c.explicit
            and not _asks_endpoints(c)
        ),
        "the keys of requests have no effect: no endpoint is asked",
        "drop them",
    ),
    Rule(
        ("rule_min_chars", "rule_max_chars"),
        lambda c: (c.rule_min_chars or 0) > (c.rule_max_chars or float("inf")),
        "`rule_min_chars` is more than `rule_max_chars`: no answer keeps both",
        "swap them",
    ),
    Rule(
        ("rule_regex", "rule_not_regex"),
        lambda c: not all(map(_compiles, [*c.rule_regex, *c.rule_not_regex])),
        "a regular expression cannot be read",
        "test it with Python's `re` module",
    ),
    PRECISION,
]  # fmt: skip
