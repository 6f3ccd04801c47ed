"""Rules of verbs that answer prompts, rank answers or build data of them."""

from __future__ import annotations

from trueup.config.rules.rule import Rule

PROMPTS = Rule(
    ("dataset",),
    lambda c: not c.dataset,
    "`dataset` is missing: there are no prompts to answer",
    "name a dataset of dataset_info.json, a built-in sample such as alpaca_en_demo, or a file",
)
GREEDY = Rule(
    ("temperature", "top_p", "top_k"),
    lambda c: c.temperature == 0 and {"top_p", "top_k"} & c.explicit and (c.top_p < 1 or c.top_k > 0),
    "`top_p` and `top_k` have no effect at `temperature: 0`, which always takes the likeliest token",
    "set temperature, or drop them",
)
JUDGE = Rule(
    ("rank_by", "judge_model"),
    lambda c: c.rank_by == "judge" and not c.judge_model,
    "`rank_by: judge` needs a judge",
    "set judge_model: a directory, a hub id, or URL#MODEL",
)
