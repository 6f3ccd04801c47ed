"""Keys about learning from rewards: who scores an answer, and how the scores move the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from trueup.config.values import (
    Bits,
    Fraction,
    Lower,
    Names,
    NonNegativeFloat,
    Numbers,
    Positive,
    PositiveFloat,
    Section,
)


class OnlineSection(Section):
    # who scores
    reward_funcs: Names = []
    """Functions that score answers: FILE.py:NAME, a file of yours, or exact_match, numeric, regex, json_schema …"""
    reward_weights: Numbers = []
    """Weight of each reward, in the order of reward_funcs and then reward_model; unset: 1 each."""
    reward_timeout: PositiveFloat = 60.0
    """Seconds a reward function may take for a batch; an answer that takes longer has no reward."""
    reward_model: str | None = None
    """Reward model: an output directory of stage rm, any classification model of one label, or the URL of a scorer."""
    reward_model_adapters: Names = []
    """Adapters of the reward model."""
    reward_model_quantization_bit: Bits | None = None
    """Quantise the reward model to this many bits."""
    reward_model_type: Annotated[Literal["lora", "full", "api"], Lower] | None = None
    """What reward_model is: an adapter, a whole model, or an HTTP scorer; unset: what it looks like."""
    judge: str | None = None
    """Who prefers one of two answers, in online DPO: FILE.py:NAME; unset: the higher reward."""

    # answers
    num_generations: Positive | None = None
    """Answers drawn for each prompt; unset: 8 (GRPO), 4 (RLOO, data build), 2 (online DPO), 1 (PPO)."""
    generation_batch_size: Positive = 64
    """Answers written at the same time by one process."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of an answer that does not end within max_new_tokens."""
    mask_truncated_completions: bool = False
    """Do not learn from answers that do not end within max_new_tokens."""

    # steps
    ppo_buffer_size: Positive = 1
    """Optimizer batches of answers drawn at a time, before training on them."""
    ppo_epochs: Positive | None = None
    """Passes over each buffer of answers; unset: 4 (PPO), 1 (others)."""

    # how far a step may go
    ppo_kl_coeff: NonNegativeFloat | None = None
    """Price of moving away from the reference; unset: 0.05 (PPO, RLOO), 0 (GRPO)."""
    ppo_target: PositiveFloat | None = None
    """KL per answer that an adaptive ppo_kl_coeff steers towards; unset: ppo_kl_coeff stays as it is."""
    ppo_clip_ratio: PositiveFloat | None = None
    """How far one update may move a token's probability; unset: 0.2 (GSPO: 3e-4)."""
    ppo_clip_ratio_high: PositiveFloat | None = None
    """The same upwards; unset: as ppo_clip_ratio (GSPO: 4e-4; CISPO, where it caps the weight itself: 5)."""

    # PPO
    ppo_gamma: Fraction = 1.0
    """Discount of a reward per token."""
    ppo_lambda: Fraction = 0.95
    """GAE: 1 trusts the rewards, 0 the value head."""
    ppo_value_coeff: NonNegativeFloat = 0.1
    """Weight of the value head's loss."""
    ppo_value_clip: PositiveFloat = 0.2
    """How far one update may move a value."""
    ppo_score_norm: bool = False
    """Normalise rewards by their running mean and deviation."""
    ppo_whiten_rewards: bool = False
    """Whiten rewards before computing advantages."""

    # GRPO
    grpo_loss: Annotated[Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo"], Lower] = "dapo"
    """How tokens are weighed: dapo (all alike), grpo (answers alike), dr_grpo, gspo (whole answers are clipped) …"""
    scale_rewards: Annotated[Literal["group", "batch", "no"], Lower] | None = None
    """What advantages are divided by: the deviation of the group (unset) or batch; no: nothing (unset with dr_grpo)."""

    # RLOO
    normalize_advantages: bool = False
    """Whiten RLOO's advantages over the batch."""


#: stage → what unset keys mean there; `unset_values` adds those that depend on the loss.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {"num_generations": 1, "ppo_epochs": 4, "ppo_kl_coeff": 0.05, "ppo_clip_ratio": 0.2},
    "grpo": {"num_generations": 8, "ppo_epochs": 1, "ppo_kl_coeff": 0.0, "ppo_clip_ratio": 0.2},
    "rloo": {"num_generations": 4, "ppo_epochs": 1, "ppo_kl_coeff": 0.05, "ppo_clip_ratio": 0.2},
    "online_dpo": {"num_generations": 2, "ppo_epochs": 1},
}
#: how stages that learn from their own answers sample, unless told otherwise: from the model itself.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256}


def unset_values(stage: str, online: OnlineSection) -> dict[str, Any]:
    """Values of the keys of this section that are unset, as the stage and the loss have them."""
    values = dict(DEFAULTS[stage])
    if stage in ("ppo", "rloo"):
        values["ppo_clip_ratio_high"] = online.ppo_clip_ratio or 0.2
    if stage == "grpo":
        loss = online.grpo_loss
        values["scale_rewards"] = "no" if loss == "dr_grpo" else "group"
        low, high = {"gspo": (3e-4, 4e-4), "cispo": (None, 5.0)}.get(loss, (0.2, online.ppo_clip_ratio or 0.2))
        values |= {"ppo_clip_ratio": low, "ppo_clip_ratio_high": high}
    return {key: value for key, value in values.items() if getattr(online, key) is None}
