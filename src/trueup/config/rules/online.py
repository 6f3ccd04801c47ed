"""Stages that answer prompts themselves, and who says what an answer is worth."""

from __future__ import annotations

from typing import Any

from trueup.config.methods import ONLINE
from trueup.config.rules.rule import Rule
from trueup.config.schema import default


def _count_rewards(c: Any) -> int:
    return len(c.reward_funcs) + bool(c.reward_model)


def _judged(c: Any) -> bool:
    return c.stage == "online_dpo" and bool(c.judge) and not _count_rewards(c)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _ratio_is_one(c: Any) -> bool:
    """Answers are learnt from once, by the very policy that gave them: a ratio of 1 is never clipped. With dropout the
    policy that learns is not quite the one that PPO and RLOO have computed beforehand.
    """
    drops = c.stage != "grpo" and c.finetuning_type == "lora" and c.lora_dropout > 0
    return c.stage in ("ppo", "grpo", "rloo") and c.ppo_buffer_size * (c.ppo_epochs or 1) == 1 and not drops


def _clips_in_vain(key: str, unset: float | None = None) -> Rule:
    """`unset`: the value that asks for nothing, where it is not the schema's default."""
    usual = default(key) if unset is None else unset

    def broken(c: Any) -> bool:
        caps = key == "ppo_clip_ratio_high" and c.grpo_loss == "cispo"  # caps the weight itself
        return key in c.explicit and getattr(c, key) != usual and _ratio_is_one(c) and not (c.stage == "grpo" and caps)

    return Rule(
        (key, "ppo_epochs", "ppo_buffer_size"),
        broken,
        f"`{key}` has no effect: answers that are learnt from in a single step have not moved yet",
        "drop it, or set ppo_epochs or ppo_buffer_size above 1",
    )


REWARD_WEIGHTS = Rule(
    ("reward_weights", "reward_funcs", "reward_model"),
    lambda c: c.reward_weights and len(c.reward_weights) != _count_rewards(c),
    "`reward_weights` needs one number for each reward: those of `reward_funcs`, then `reward_model`",
    "give as many as there are rewards",
)

RULES = [
    Rule(
        ("stage", "reward_funcs", "reward_model", "judge"),
        lambda c: (
            c.stage in ONLINE
            and (c.do_train or c.do_eval)
            and not (_count_rewards(c) or (c.stage == "online_dpo" and c.judge))
        ),
        "nobody says what a good answer is: this stage learns from rewards",
        "set reward_funcs: FILE.py:NAME, or reward_model: DIR (online_dpo also takes judge: FILE.py:NAME)",
    ),
    REWARD_WEIGHTS,
    Rule(
        ("judge", "reward_funcs", "reward_model"),
        lambda c: c.judge and _count_rewards(c),
        "`judge` and rewards both say which answer is better",
        "drop one of them",
    ),
    Rule(
        ("stage", "num_generations"),
        lambda c: c.stage in ("grpo", "rloo", "online_dpo") and (c.num_generations or 2) < 2,
        "one answer cannot be compared with the others of its prompt",
        "set num_generations: 2 or more",
    ),
    Rule(
        ("reward_timeout", "reward_funcs", "judge"),
        lambda c: (
            c.stage in ONLINE
            and c.reward_timeout != default("reward_timeout")
            and not c.reward_funcs
            and not (c.stage == "online_dpo" and c.judge)
        ),
        "`reward_timeout` has no effect without `reward_funcs` or `judge`",
        "drop it",
    ),
    Rule(
        ("judge", "missing_eos_penalty"),
        lambda c: c.stage == "online_dpo" and c.judge and c.missing_eos_penalty,
        "`missing_eos_penalty` has no effect with `judge`, which gives no rewards to take it from",
        "drop it, or give rewards in place of the judge",
    ),
    Rule(
        ("judge", "eval_dataset", "val_size", "eval_strategy", "do_eval"),
        lambda c: (
            _judged(c)
            and (c.eval_strategy != "no" or c.do_eval or bool(c.eval_dataset or c.val_size) and not c.do_predict)
        ),
        "an evaluation scores one answer to each prompt, and `judge` compares two: it would have nothing to say",
        "drop what asks for an evaluation, or give rewards in place of the judge",
    ),
    Rule(
        ("reward_model_type", "reward_model"),
        lambda c: (
            c.reward_model and c.reward_model_type and (c.reward_model_type == "api") != _is_url(str(c.reward_model))
        ),
        "`reward_model_type: api` and a URL in `reward_model` go together, and only they",
        "drop reward_model_type: what reward_model is can be seen",
    ),
    Rule(
        ("reward_model_type", "reward_model_adapters"),
        lambda c: c.reward_model and c.reward_model_adapters and c.reward_model_type in ("full", "api"),
        "`reward_model_adapters` belong to `reward_model_type: lora`",
        "drop one of them",
    ),
    Rule(
        ("reward_model", "reward_model_adapters"),
        lambda c: c.reward_model and c.reward_model_adapters and _is_url(str(c.reward_model)),
        "`reward_model_adapters` have no effect on a scorer behind a URL",
        "drop them",
    ),
    _clips_in_vain("ppo_clip_ratio", 0.2),
    _clips_in_vain("ppo_clip_ratio_high", 0.2),
    _clips_in_vain("ppo_value_clip"),
    Rule(
        ("ppo_kl_coeff", "ppo_target"),
        lambda c: c.stage == "ppo" and c.ppo_target and c.ppo_kl_coeff == 0,
        "`ppo_target` has no effect with `ppo_kl_coeff: 0`: the price it multiplies stays 0",
        "drop ppo_target, or set ppo_kl_coeff",
    ),
    Rule(
        ("stage", "temperature"),
        lambda c: c.stage in ("grpo", "rloo", "online_dpo") and c.temperature == 0,
        "at `temperature: 0` all answers of a prompt are the same, and there is nothing to compare",
        "set temperature: 1",
    ),
    Rule(
        ("stage", "packing", "neat_packing"),
        lambda c: c.stage in ONLINE and (c.packing or c.neat_packing),
        "`packing` has no effect where the model writes the answers itself",
        "drop it",
    ),
    Rule(
        ("judge", "num_generations"),
        lambda c: c.judge and c.num_generations not in (None, 2),
        "`judge` compares two answers of a prompt",
        "drop num_generations, or give rewards: the best and the worst of several are then a pair",
    ),
    Rule(
        ("stage", "ppo_kl_coeff", "ref_model"),
        lambda c: c.stage in ("ppo", "grpo", "rloo") and c.ref_model and not c.ppo_kl_coeff and not c.ppo_target,
        "`ref_model` is compared with at a price of 0: `ppo_kl_coeff` is 0",
        "set ppo_kl_coeff, or drop ref_model",
    ),
]
