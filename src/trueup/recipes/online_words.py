"""A run on the policy's own answers, in words: for the header, and for those who name one of its metrics."""

from __future__ import annotations

from trueup.config.schema import RunConfig
from trueup.recipes.judges import reward_names

_SHOWN = {
    "ppo": "ppo_kl_coeff ppo_clip_ratio ppo_epochs ppo_buffer_size",
    "grpo": "scale_rewards ppo_kl_coeff ppo_clip_ratio ppo_clip_ratio_high",
    "rloo": "ppo_kl_coeff ppo_clip_ratio",
    "online_dpo": "pref_beta",
}


def describe_online(cfg: RunConfig) -> str:
    """The stage, what it learns from, and how answers are drawn."""
    online, stage = cfg.online, cfg.objective.stage
    name = f"{stage}: {online.grpo_loss}" if stage == "grpo" else stage
    settings = ", ".join(f"{key} {cfg[key]}" for key in _SHOWN[stage].split() if cfg[key] is not None)
    source = online.judge or " + ".join(reward_names(cfg))
    number = online.num_generations or 1
    answers = f"{number} answer{'s' if number > 1 else ''} of at most {cfg.generate.max_new_tokens} tokens to a prompt"
    return f"{name} ({settings}); {answers} at temperature {cfg.generate.temperature:g}; rewards: {source}"


def online_metric_names(cfg: RunConfig) -> list[str]:
    """What evaluations report."""
    rewards = [f"rewards/{name}/mean" for name in reward_names(cfg)]
    lengths = ["completions/mean_length", "completions/clipped_ratio", "completions/mean_terminated_length"]
    return ["loss", "reward", *rewards, *lengths]
