"""What `trueup generate` reads of a config: what unset keys mean, what has no effect, what cannot be meant.

As for `trueup eval`, keys that only train are let pass in its file, and refused on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trueup.config.checks import Place, broken, not_yet
from trueup.config.evaluating import SAMPLING
from trueup.config.rules.answers import GREEDY, PROMPTS
from trueup.config.rules.model import MODEL, QUANTISATION
from trueup.config.rules.rule import Rule
from trueup.config.rules.train import PRECISION
from trueup.config.schema import RunConfig
from trueup.config.verbs import read_with, section_keys, without_effect
from trueup.errors import Problem

_ROWS: list[tuple[str, dict[str, Any]]] = [
    (section_keys("model"), {}),
    ("dataset dataset_dir max_samples on_bad_rows cutoff_len", {}),
    ("template default_system tool_format enable_thinking preserve_thinking", {}),
    ("do_sample temperature top_p top_k max_new_tokens repetition_penalty skip_special_tokens token_logprobs", {}),
    ("num_generations generation_batch_size bf16 fp16 seed on_unused_keys stage finetuning_type", {}),
]
READ_WITH: dict[str, Mapping[str, Any]] = read_with(_ROWS)


def derive(cfg: RunConfig) -> RunConfig:
    """The likeliest answer, and one, unless more is asked for; `do_sample: true` alone draws at temperature 1."""
    changes: dict[str, Any] = {key: value for key, value in SAMPLING.items() if key not in cfg.explicit}
    if not cfg.generate.do_sample:
        changes["temperature"] = 0.0
    elif "do_sample" in cfg.explicit and "temperature" not in cfg.explicit:
        changes["temperature"] = 1.0
    if cfg.online.num_generations is None:
        changes["num_generations"] = 1
    return cfg.replace(**changes)


def check(cfg: RunConfig, place: Place, bad: set[str]) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass."""

    def of_the_file(key: str) -> bool:
        return not (place(key) or "").startswith("--")

    problems = not_yet(cfg, place, training=False) + broken(cfg, place, bad, RULES)
    return problems, without_effect(cfg, place, bad, "generate", READ_WITH, passes=of_the_file)


RULES = [
    *QUANTISATION,
    MODEL,
    PROMPTS,
    Rule(
        ("temperature", "num_generations"),
        lambda c: c.temperature == 0 and c.num_generations > 1,
        "at `temperature: 0` all answers to a prompt are the same",
        "set temperature: 1, or drop num_generations",
    ),
    GREEDY,
    PRECISION,
]  # fmt: skip
