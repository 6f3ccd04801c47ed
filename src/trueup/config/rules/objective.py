"""The loss, and the reference that it compares with."""

from __future__ import annotations

from typing import Any

from trueup.config.losses import LIVE_REFERENCE, ON_SUMS, PREF_LOSSES, STAGE_LOSSES, parting
from trueup.config.rules.rule import Rule

#: keys that choose or make up the loss.
_OF_LOSSES = ("pref_loss", "loss_weights", "pref_ftx", "pref_bco_weight", "knowledge_weight", "reward_loss")


def _losses(c: Any) -> list[str]:
    return c.pref_loss if isinstance(c.pref_loss, list) else [c.pref_loss]


def _foreign(c: Any) -> bool:
    return c.stage in STAGE_LOSSES and not set(_losses(c)) <= set(STAGE_LOSSES[c.stage])


def _parting(key: str) -> Rule:
    return Rule(
        ("pref_loss", key),
        lambda c: c.stage in STAGE_LOSSES and key not in c.explicit and parting(key, _losses(c)),
        f"the losses of `pref_loss` differ in what an unset `{key}` means",
        f"set {key}: it then holds for all of them",
    )


RULES = [
    Rule(
        ("stage", "pref_loss"),
        lambda c: _foreign(c) and set(_losses(c)) <= set(PREF_LOSSES),
        "this stage does not train this `pref_loss`",
        "stage: dpo takes every loss on pairs, stage: kto takes kto, bco and apo_zero_unpaired; "
        "orpo, simpo and cpo have their own",
    ),
    Rule(
        ("pref_loss",),
        lambda c: c.stage in STAGE_LOSSES and (not c.pref_loss or len(set(_losses(c))) < len(_losses(c))),
        "`pref_loss` names a loss twice, or none",
        "name each once; loss_weights weighs them",
    ),
    Rule(
        ("custom_objective", *_OF_LOSSES),
        lambda c: c.custom_objective and set(_OF_LOSSES) & c.explicit,
        f"a `custom_objective` is the whole loss: {', '.join(_OF_LOSSES)} have no part in it",
        "drop them, or the custom_objective",
    ),
    Rule(
        ("custom_objective", "use_dft_loss", "use_eaft_loss"),
        lambda c: bool(c.custom_objective) + c.use_dft_loss + c.use_eaft_loss > 1,
        "`use_dft_loss`, `use_eaft_loss` and a `custom_objective` are losses on the same tokens",
        "keep one of them",
    ),
    Rule(
        ("stage", "pref_loss"),
        lambda c: c.stage != "dpo" and c.stage in STAGE_LOSSES and len(_losses(c)) > 1,
        "only `stage: dpo` adds up several losses",
        "keep one, or set stage: dpo",
    ),
    Rule(
        ("pref_loss", "loss_weights"),
        lambda c: c.stage in STAGE_LOSSES and c.loss_weights and len(c.loss_weights) != len(_losses(c)),
        "`loss_weights` needs one number for each loss of `pref_loss`",
        "give as many as there are losses, or drop it",
    ),
    Rule(
        ("loss_weights",),
        lambda c: c.loss_weights and (min(c.loss_weights) < 0 or c.loss_weights[0] <= 0),
        "`loss_weights` are not negative, and the first loss counts",
        "give the losses positive weights",
    ),
    Rule(
        ("pref_loss", "dpo_label_smoothing"),
        lambda c: c.stage == "dpo" and "exo_pair" in _losses(c) and not c.dpo_label_smoothing,
        "`pref_loss: exo_pair` takes the logarithm of `dpo_label_smoothing`, which is 0",
        "set dpo_label_smoothing: 0.001, or leave it unset",
    ),
    Rule(
        ("pref_loss", "pref_bco_weight"),
        lambda c: c.stage == "dpo" and c.pref_bco_weight and "bco_pair" in _losses(c),
        "`pref_bco_weight` adds a BCO loss, and `pref_loss` has it already",
        "drop one of them",
    ),
    Rule(
        ("pref_loss", "pref_ftx"),
        lambda c: c.stage == "dpo" and c.pref_ftx and "sft" in _losses(c),
        "`pref_ftx` adds an SFT loss, and `pref_loss` has it already",
        "drop one of them",
    ),
    *map(_parting, ("pref_beta", "dpo_label_smoothing", "simpo_gamma")),
    Rule(
        ("pref_loss", "use_weighting"),
        lambda c: c.stage == "dpo" and c.use_weighting and _losses(c) == ["sft"],
        "`use_weighting` has no effect with `pref_loss: sft`: it weighs pairs",
        "drop it, or add a loss on pairs",
    ),
    Rule(
        ("pref_loss", "ld_alpha"),
        lambda c: (
            c.stage == "dpo"
            and c.ld_alpha is not None
            and set(_losses(c)) & set(ON_SUMS)
            and any(PREF_LOSSES[name].per_token for name in _losses(c) if name in PREF_LOSSES)
        ),
        "`ld_alpha` weighs sums over tokens, and a loss of `pref_loss` compares means per token",
        "drop ld_alpha, or keep losses on sums",
    ),
    Rule(
        ("sync_ref_model", "ref_model"),
        lambda c: c.stage == "dpo" and c.sync_ref_model and c.ref_model,
        "`sync_ref_model` moves the reference with the model, and `ref_model` is another model",
        "drop one of them",
    ),
    Rule(
        ("precompute_ref_log_probs", "sync_ref_model", "pref_loss"),
        lambda c: (
            c.stage == "dpo"
            and c.precompute_ref_log_probs
            and (c.sync_ref_model or set(_losses(c)) & set(LIVE_REFERENCE))
        ),
        "`precompute_ref_log_probs: true` keeps log-probabilities, and this reference has to run in every step",
        "drop precompute_ref_log_probs",
    ),
]
