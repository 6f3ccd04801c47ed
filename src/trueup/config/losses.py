"""Losses on preferences: which stage trains them, which keys each reads, and what unset keys mean to it.

`PREF_LOSSES` is read by the checker, the help, the docs and the forms. Adding a loss is one function in
`trueup.objectives` and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trueup.config.schema import RunConfig, default
from trueup.config.values import words

_SCORES = "pref_beta f_divergence_type f_alpha_divergence_coef"
_WEIGHTS = "pref_beta kto_chosen_weight kto_rejected_weight"


@dataclass(frozen=True)
class PrefLoss:
    """One loss on preferences.

    Attributes:
        kind: what it learns from: pairs, or single answers with a label (feedback).
        keys: the keys it reads.
        defaults: what unset keys mean to it, where that is not the schema's default: its paper's values.
        paper: arXiv number.
        per_token: compares means per token, so that lengths are out of it already.
    """

    help: str
    paper: str = ""
    keys: str = "pref_beta"
    defaults: dict[str, Any] = field(default_factory=dict)
    kind: str = "pair"
    reference: bool = True
    per_token: bool = False
    instead: str | None = None


PREF_LOSSES: dict[str, PrefLoss] = {
    "sigmoid": PrefLoss("DPO; cDPO with dpo_label_smoothing", "2305.18290", f"{_SCORES} dpo_label_smoothing"),
    "robust": PrefLoss(
        "DPO for a known share of wrong labels",
        "2403.00409",
        f"{_SCORES} dpo_label_smoothing",
        {"pref_beta": 0.01, "dpo_label_smoothing": 0.1},
    ),
    "hinge": PrefLoss("SLiC / RSO: no gradient beyond the margin", "2309.06657", _SCORES, {"pref_beta": 0.05}),
    "ipo": PrefLoss("IPO on means per token: a margin to reach, not to grow", "2310.12036", _SCORES, per_token=True),
    "ipo_sum": PrefLoss("IPO on sums, as its paper writes it", "2310.12036", _SCORES),
    "exo_pair": PrefLoss(
        "EXO: the reverse KL to softened labels",
        "2402.00856",
        f"{_SCORES} dpo_label_smoothing",
        {"dpo_label_smoothing": 1e-3},
    ),
    "nca_pair": PrefLoss("NCA: raises the chosen answer's own likelihood", "2402.05369", defaults={"pref_beta": 0.01}),
    "bco_pair": PrefLoss("BCO: each answer classified by itself", "2404.04656", defaults={"pref_beta": 0.01}),
    "sppo_hard": PrefLoss("SPPO with win probabilities 1 and 0", "2405.00675", defaults={"pref_beta": 0.001}),
    "aot": PrefLoss("AOT: DPO between sorted log-ratios of a step", "2406.05882", "pref_beta dpo_label_smoothing"),
    "aot_unpaired": PrefLoss(
        "AOT between all chosen and all rejected of a step", "2406.05882", "pref_beta dpo_label_smoothing"
    ),
    "apo_zero": PrefLoss("APO: chosen up, rejected down", "2408.06266"),
    "apo_down": PrefLoss("APO: both down, the rejected further", "2408.06266"),
    "discopop": PrefLoss(
        "DiscoPOP: a loss found by search", "2406.08414", f"{_SCORES} discopop_tau", {"pref_beta": 0.05}
    ),
    "sigmoid_norm": PrefLoss(
        "DPO on means per token (Tulu 3)", "2411.15124", _SCORES, {"pref_beta": 5.0}, per_token=True
    ),
    "dpop": PrefLoss(
        "DPO-positive: the chosen answer may not fall (Smaug)",
        "2402.13228",
        "pref_beta dpop_lambda",
        {"pref_beta": 0.3},
    ),
    "rdpo": PrefLoss("DPO with a price on length", "2403.19159", "pref_beta rdpo_alpha"),
    "tdpo1": PrefLoss("token-level DPO, both divergences", "2404.11999"),
    "tdpo2": PrefLoss("token-level DPO, the rejected side's divergence", "2404.11999", "pref_beta tdpo_alpha"),
    "orpo": PrefLoss("ORPO: SFT and odds ratio in one", "2403.07691", reference=False, per_token=True),
    "simpo": PrefLoss(
        "SimPO: means per token and a target margin; CPO-SimPO with pref_ftx",
        "2405.14734",
        "pref_beta simpo_gamma dpo_label_smoothing",
        {"pref_beta": 2.0, "simpo_gamma": 1.0},
        reference=False,
        per_token=True,
    ),
    "cpo": PrefLoss(
        "CPO: likelihoods compared, the chosen answer learnt",
        "2401.08417",
        "pref_beta dpo_label_smoothing",
        {"pref_ftx": 1.0},
        reference=False,
    ),
    "alphapo": PrefLoss(
        "AlphaPO: SimPO with rewards of another shape",
        "2501.03884",
        "pref_beta simpo_gamma alphapo_alpha",
        {"pref_beta": 2.5, "simpo_gamma": 0.1},
        reference=False,
        per_token=True,
    ),
    "sft": PrefLoss("the chosen answer's likelihood, as one of several", "2411.10442", "", reference=False),
    "kto": PrefLoss("KTO: each answer against the average", "2402.01306", _WEIGHTS, kind="feedback"),
    "bco": PrefLoss(
        "BCO: answers classified as wanted or not", "2404.04656", _WEIGHTS, {"pref_beta": 0.01}, "feedback"
    ),
    "apo_zero_unpaired": PrefLoss("APO-zero on single answers", "2408.06266", _WEIGHTS, kind="feedback"),
    "kto_pair": PrefLoss("KTO on pairs, gone from its tool", instead="stage: kto, or pref_loss: apo_zero on pairs"),
}

_PAIR = tuple(name for name, loss in PREF_LOSSES.items() if loss.kind == "pair")

#: stage → the losses it trains, its own first.
STAGE_LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": _PAIR,
    "kto": tuple(name for name, loss in PREF_LOSSES.items() if loss.kind == "feedback"),
    "orpo": ("orpo",),
    "simpo": ("simpo", "alphapo"),
    "cpo": ("cpo", "simpo", "alphapo"),
}
PAIR_STAGES = tuple(stage for stage in STAGE_LOSSES if stage != "kto")

WITH_REFERENCE = tuple(name for name, loss in PREF_LOSSES.items() if loss.reference and not loss.instead)
#: losses whose reference has to run beside the policy, because they compare whole distributions.
LIVE_REFERENCE = ("tdpo1", "tdpo2")
ON_SUMS = tuple(name for name in _PAIR if not PREF_LOSSES[name].per_token and name != "sft")

#: key of single losses → the losses that read it.
LOSSES_OF_KEY: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, loss in PREF_LOSSES.items() if key in words(loss.keys) and not loss.instead)
    for loss in PREF_LOSSES.values()
    for key in words(loss.keys)
}


def stages_of(losses: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that train any of these losses."""
    return tuple(stage for stage, own in STAGE_LOSSES.items() if set(own) & set(losses))


def pref_losses(cfg: RunConfig) -> list[str]:
    """The losses of a stage that learns from preferences, one or several; none for other stages."""
    if cfg.objective.stage not in STAGE_LOSSES:
        return []
    value = cfg.objective.pref_loss
    return list(value) if isinstance(value, list) else [value]


def loss_defaults(cfg: RunConfig) -> dict[str, Any]:
    """What unset keys mean to the stage and its losses; those that differ in it are refused (`parting`)."""
    stage = cfg.objective.stage
    if stage not in STAGE_LOSSES:
        return {}
    changes: dict[str, Any] = {}
    names = pref_losses(cfg)
    if "pref_loss" not in cfg.explicit:
        names = [STAGE_LOSSES[stage][0]]
        changes["pref_loss"] = names[0]
    for name in reversed(names):
        changes |= PREF_LOSSES[name].defaults if name in PREF_LOSSES else {}
    if "sft" in names:  # the likelihood that CPO would add is in the list already
        changes.pop("pref_ftx", None)
    if cfg.objective.sync_ref_model:
        changes |= {"pref_beta": 0.05} if names == ["sigmoid"] else {}
    if cfg.objective.sync_ref_model or set(names) & set(LIVE_REFERENCE):
        changes["precompute_ref_log_probs"] = False
    return {key: value for key, value in changes.items() if key not in cfg.explicit}


def parting(key: str, names: list[str]) -> bool:
    """Whether the losses disagree on what this key means unset."""
    readers = [loss for name in names if (loss := PREF_LOSSES.get(name)) and key in words(loss.keys)]
    return len({loss.defaults.get(key, default(key)) for loss in readers}) > 1
