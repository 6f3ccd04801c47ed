"""Objectives on preference pairs with a reference.

Notation of the papers: β `beta`, ε `label_smoothing`, σ the logistic function; Δ_w = log π(y_w|x) − log π_ref(y_w|x),
Δ_l likewise, Δ = Δ_w − Δ_l; |y| the number of answer tokens. Every loss is a sum over the pairs, each times its
`weight` if there is one.

What a run logs as `rewards/…` is what its objective compares: β times the log-ratio, averaged over the tokens or put
through an f-divergence where the loss does so (TRL logs β times the raw log-ratio for all of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trueup.objectives.registry import Survey, objective
from trueup.types import Loss, Metrics, PairLogps, StepValues

_BETA = {"beta": "pref_beta"}
_SCORE = {**_BETA, "divergence": "f_divergence_type", "coefficient": "f_alpha_divergence_coef"}
_SMOOTH = {"label_smoothing": "dpo_label_smoothing"}


def _pairwise(
    name: str,
    parameters: dict[str, str],
    *,
    survey: Survey | None = None,
    needs_shift: bool = False,
    needs_divergence: bool = False,
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    return objective(
        name, takes=PairLogps, denominator="pairs", needs_reference=True, parameters=parameters,
        survey=survey, needs_shift=needs_shift, needs_divergence=needs_divergence,
    )  # fmt: skip


# --- losses on the difference of the two scores ---------------------------------------------------------------------


@_pairwise("sigmoid", {**_SCORE, **_SMOOTH})
def sigmoid(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    coefficient: float = 0.5,
) -> Loss:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ).

    DPO (arXiv 2305.18290, eq. 7); with ε > 0 the conservative form (cDPO, Mitchell 2023, eq. 3). At the start, policy =
    reference, it is ln 2 a pair. TRL ignores ε here; LLaMA-Factory and we do not. Another `divergence` than reverse_kl
    makes it f-DPO (arXiv 2309.16240).
    """
    rewards = implicit_rewards(logps, beta, divergence, coefficient)
    return weighed_sum(logps, _smoothed(rewards[0] - rewards[1], label_smoothing), rewards)


@_pairwise("robust", {**_SCORE, **_SMOOTH})
def robust(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.1,
    divergence: str = "reverse_kl",
    coefficient: float = 0.5,
) -> Loss:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε): unbiased if a share ε of the labels is flipped.

    rDPO (arXiv 2403.00409). Unbounded below for ε > 0.
    """
    rewards = implicit_rewards(logps, beta, divergence, coefficient)
    margins = rewards[0] - rewards[1]
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)
    return weighed_sum(logps, losses / (1 - 2 * label_smoothing), rewards)


@_pairwise("hinge", _SCORE)
def hinge(logps: PairLogps, *, beta: float, divergence: str = "reverse_kl", coefficient: float = 0.5) -> Loss:
    """max(0, 1 − βΔ): SLiC (arXiv 2305.10425) with a reference, RSO's hinge-norm (arXiv 2309.06657). At the start 1."""
    rewards = implicit_rewards(logps, beta, divergence, coefficient)
    return weighed_sum(logps, torch.relu(1 - (rewards[0] - rewards[1])), rewards)


@_pairwise("ipo", _SCORE)
def ipo(logps: PairLogps, *, beta: float, divergence: str = "reverse_kl", coefficient: float = 0.5) -> Loss:
    """(Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))²: IPO (arXiv 2310.12036, eq. 17) on means per token.

    TRL and LLaMA-Factory average (TRL: confirmed by the authors); Mitchell and OpenRLHF take the formula as written,
    which is `ipo_sum` here. At the same β the two are different objectives.
    """
    scores = _per_token(logps, _scores(logps, divergence, coefficient))
    losses = (scores[0] - scores[1] - 1 / (2 * beta)) ** 2
    return weighed_sum(logps, losses, (beta * scores[0], beta * scores[1]))


@_pairwise("ipo_sum", _SCORE)
def ipo_sum(logps: PairLogps, *, beta: float, divergence: str = "reverse_kl", coefficient: float = 0.5) -> Loss:
    """(Δ − 1/(2β))²: IPO as written (arXiv 2310.12036, eq. 17), on sums over tokens. See `ipo`."""
    scores = _scores(logps, divergence, coefficient)
    losses = (scores[0] - scores[1] - 1 / (2 * beta)) ** 2
    return weighed_sum(logps, losses, (beta * scores[0], beta * scores[1]))


@_pairwise("exo_pair", {**_SCORE, **_SMOOTH})
def exo_pair(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
    divergence: str = "reverse_kl",
    coefficient: float = 0.5,
) -> Loss:
    """σ(βΔ)[log σ(βΔ) − log(1−ε)] + σ(−βΔ)[log σ(−βΔ) − log ε]: the reverse KL to the labels, softened by ε > 0.

    EXO (arXiv 2402.00856, eq. 16 at K = 2).
    """
    rewards = implicit_rewards(logps, beta, divergence, coefficient)
    log_win, log_lose = F.logsigmoid(rewards[0] - rewards[1]), F.logsigmoid(rewards[1] - rewards[0])
    losses = log_win.exp() * (log_win - math.log1p(-label_smoothing))
    losses = losses + log_lose.exp() * (log_lose - math.log(label_smoothing))
    return weighed_sum(logps, losses, rewards)


@_pairwise("discopop", {**_SCORE, "tau": "discopop_tau"})
def discopop(
    logps: PairLogps,
    *,
    beta: float,
    tau: float = 0.05,
    divergence: str = "reverse_kl",
    coefficient: float = 0.5,
) -> Loss:
    """−(1−m) log σ(βΔ) + m exp(−βΔ), m = σ(βΔ/τ): found by a language model (DiscoPOP, arXiv 2406.08414, eq. 5).

    Its slope at the start is (1 − ln 2)/(4τ) − ¾: below τ ≈ 0.102, and so at the published 0.05, it lowers the margin.
    """
    rewards = implicit_rewards(logps, beta, divergence, coefficient)
    margins = rewards[0] - rewards[1]
    mixed = torch.sigmoid(margins / tau)
    # m·exp(−βΔ) without overflow: where exp would, m has vanished already
    exponential = torch.exp(F.logsigmoid(margins / tau) - margins)
    return weighed_sum(logps, -F.logsigmoid(margins) * (1 - mixed) + exponential, rewards)


@_pairwise("sigmoid_norm", _SCORE)
def sigmoid_norm(logps: PairLogps, *, beta: float, divergence: str = "reverse_kl", coefficient: float = 0.5) -> Loss:
    """−log σ(β(Δ_w/|y_w| − Δ_l/|y_l|)): length-normalised DPO (Tulu 3, arXiv 2411.15124); wants a larger β."""
    scores = _per_token(logps, _scores(logps, divergence, coefficient))
    rewards = beta * scores[0], beta * scores[1]
    return weighed_sum(logps, -F.logsigmoid(rewards[0] - rewards[1]), rewards)


# --- DPO with a term of its own --------------------------------------------------------------------------------------


@_pairwise("dpop", {**_BETA, "penalty": "dpop_lambda"})
def dpop(logps: PairLogps, *, beta: float, penalty: float = 50.0) -> Loss:
    """−log σ(β(Δ − λ max(0, −Δ_w))): a chosen answer must not fall below the reference (DPOP, arXiv 2402.13228)."""
    rewards = implicit_rewards(logps, beta)
    fallen = torch.relu(-rewards[0])
    return weighed_sum(logps, -F.logsigmoid(rewards[0] - rewards[1] - penalty * fallen), rewards)


@_pairwise("rdpo", {**_BETA, "alpha": "rdpo_alpha"})
def rdpo(logps: PairLogps, *, beta: float, alpha: float = 0.01) -> Loss:
    """−log σ(βΔ + α(|y_w| − |y_l|)): R-DPO (arXiv 2403.19159), length has its price.

    The sign follows from the regularised reward r − α|y|: a longer chosen answer counts as explained by its length in
    part. Others write α with the opposite sign.
    """
    rewards = implicit_rewards(logps, beta)
    lengths = alpha * (logps.chosen_len - logps.rejected_len)
    return weighed_sum(logps, -F.logsigmoid(rewards[0] - rewards[1] + lengths), rewards)


@_pairwise("tdpo1", _BETA, needs_divergence=True)
def tdpo1(logps: PairLogps, *, beta: float) -> Loss:
    """−log σ(βΔ − β(K_l − K_w)), K = Σ_t KL(π_ref ‖ π) over the vocabulary: TDPO₁ (arXiv 2404.11999)."""
    return tdpo2(logps, beta=beta, alpha=1.0, stop=False)


@_pairwise("tdpo2", {**_BETA, "alpha": "tdpo_alpha"}, needs_divergence=True)
def tdpo2(logps: PairLogps, *, beta: float, alpha: float = 0.5, stop: bool = True) -> Loss:
    """−log σ(βΔ − αβ(K_l − sg K_w)): TDPO₂ (arXiv 2404.11999); the chosen side's divergence has no gradient."""
    assert logps.kl_chosen is not None and logps.kl_rejected is not None, "a divergence was declared as needed"
    rewards = implicit_rewards(logps, beta)
    chosen = logps.kl_chosen.detach() if stop else logps.kl_chosen
    losses = -F.logsigmoid(rewards[0] - rewards[1] - alpha * beta * (logps.kl_rejected - chosen))
    metrics = {
        "kl_vocabulary/chosen": (logps.kl_chosen.detach().sum(), float(len(chosen))),
        "kl_vocabulary/rejected": (logps.kl_rejected.detach().sum(), float(len(chosen))),
    }
    loss = weighed_sum(logps, losses, rewards)
    return Loss(loss.sum, {**loss.metrics, **metrics})


# --- losses on the two scores by themselves --------------------------------------------------------------------------


@_pairwise("nca_pair", _BETA)
def nca_pair(logps: PairLogps, *, beta: float) -> Loss:
    """−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l): NCA at K = 2 (arXiv 2402.05369)."""
    rewards = chosen, rejected = implicit_rewards(logps, beta)
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return weighed_sum(logps, losses, rewards)


@_pairwise("bco_pair", _BETA, needs_shift=True)
def bco_pair(logps: PairLogps, *, beta: float, shift: float = 0.0) -> Loss:
    """−log σ(βΔ_w − δ) − log σ(−(βΔ_l − δ)), δ the running mean of both rewards: BCO (arXiv 2404.04656).

    δ is the mean over all steps before this one, so a step's loss does not depend on how it was cut up, and no second
    pass is needed. TRL's BCOTrainer and LLaMA-Factory have the step's own rewards in the mean as well (at the first
    step both are 0); TRL's DPO trainer leaves δ out.
    """
    rewards = chosen, rejected = implicit_rewards(logps, beta)
    losses = -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)
    return weighed_sum(logps, losses, rewards)


@_pairwise("sppo_hard", _BETA)
def sppo_hard(logps: PairLogps, *, beta: float) -> Loss:
    """(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²: SPPO (arXiv 2405.00675, eq. 4.7) with win probabilities 1 and 0."""
    rewards = implicit_rewards(logps, beta)
    chosen, rejected = _scores(logps)
    return weighed_sum(logps, (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, rewards)


@_pairwise("apo_zero", _BETA)
def apo_zero(logps: PairLogps, *, beta: float) -> Loss:
    """1 − σ(βΔ_w) + σ(βΔ_l): raise the chosen, lower the rejected answer (arXiv 2408.06266, eq. 7). At the start 1."""
    rewards = chosen, rejected = implicit_rewards(logps, beta)
    return weighed_sum(logps, 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected), rewards)


@_pairwise("apo_down", _BETA)
def apo_down(logps: PairLogps, *, beta: float) -> Loss:
    """σ(βΔ_w) + 1 − σ(βΔ): lower both, the rejected answer more (APO, arXiv 2408.06266, eq. 8)."""
    rewards = chosen, rejected = implicit_rewards(logps, beta)
    return weighed_sum(logps, torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected), rewards)


# --- losses on the distribution of scores over a step ----------------------------------------------------------------


def _paired_ratios(logps: PairLogps) -> dict[str, Tensor]:
    assert logps.ref_chosen is not None and logps.ref_rejected is not None
    return {
        "policy": (logps.chosen - logps.rejected).detach(),
        "reference": (logps.ref_chosen - logps.ref_rejected).detach(),
    }


@_pairwise("aot", {**_BETA, **_SMOOTH}, survey=_paired_ratios)
def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0, step: StepValues | None = None) -> Loss:
    """DPO between order statistics: u, v the sorted log π(y_w) − log π(y_l) of policy and reference over a whole step;
    −(1−ε) log σ(β(u − v)) − ε log σ(−β(u − v)): AOT on pairs (arXiv 2406.05882).

    The sort is over the whole optimizer step, on all processes. TRL sorts every micro-batch for itself, so that its
    objective changes with batch size and is DPO at one pair each.
    """
    step = step or _whole(_paired_ratios(logps))
    against = _of_same_rank(step.values["policy"], step.values["reference"])[step.at]
    losses = _smoothed(beta * (logps.chosen - logps.rejected - against), label_smoothing)
    return weighed_sum(logps, losses, implicit_rewards(logps, beta))


def _unpaired_ratios(logps: PairLogps) -> dict[str, Tensor]:
    chosen, rejected = _scores(logps)
    return {"chosen": chosen.detach(), "rejected": rejected.detach()}


@_pairwise("aot_unpaired", {**_BETA, **_SMOOTH}, survey=_unpaired_ratios)
def aot_unpaired(
    logps: PairLogps, *, beta: float, label_smoothing: float = 0.0, step: StepValues | None = None
) -> Loss:
    """As `aot` with the sorted Δ_w in place of u and the sorted Δ_l in place of v (arXiv 2406.05882).

    Both sides move, and their partners may be in other micro-batches: each side's gradient is taken with its partners
    held, and the value is counted once.
    """
    step = step or _whole(_unpaired_ratios(logps))
    chosen, rejected = _scores(logps)
    all_chosen, all_rejected = step.values["chosen"], step.values["rejected"]
    against = _of_same_rank(all_chosen, all_rejected)[step.at]
    partners = _of_same_rank(all_rejected, all_chosen)[step.at]
    losses = _smoothed(beta * (chosen - against), label_smoothing)
    others = _smoothed(beta * (partners - rejected), label_smoothing)
    return weighed_sum(logps, losses + others - others.detach(), implicit_rewards(logps, beta))


def _whole(values: dict[str, Tensor]) -> StepValues:
    """A micro-batch that is a step by itself."""
    some = next(iter(values.values()))
    return StepValues(values, torch.arange(len(some), device=some.device))


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [M] the one of `others` [M] that has its rank."""
    rank = torch.argsort(torch.argsort(values, stable=True))
    return torch.sort(others).values[rank]


# --- terms added to other losses -------------------------------------------------------------------------------------


@objective("chosen_nll", takes=PairLogps, denominator="pairs")
def chosen_anchor(logps: PairLogps) -> Loss:
    """`chosen_nll` as a term of its own: `pref_ftx`, and `sft` among several losses.

    TRL averages over the tokens of a micro-batch, which weighs a pair by its length and by its neighbours; we average
    over each answer first, so nothing depends on how a step was cut up.
    """
    nll = chosen_nll(logps)
    return Loss(nll, {"sft_loss": (nll.detach(), float(len(logps.chosen)))})


def chosen_nll(logps: PairLogps) -> Tensor:
    """Σ over pairs of the chosen answer's mean −log π per token: RPO's anchor (arXiv 2404.19733, eq. 2; `pref_ftx`)."""
    return -(logps.chosen / logps.chosen_len).sum()


# --- parts ---------------------------------------------------------------------------------------------------------


def implicit_rewards(
    logps: PairLogps, beta: float, divergence: str = "reverse_kl", coefficient: float = 0.5
) -> tuple[Tensor, Tensor]:
    """β f'(π / π_ref) of the chosen and the rejected answers, [B] each; β(log π − log π_ref) for the reverse KL (arXiv
    2305.18290, eq. 5).
    """
    chosen, rejected = _scores(logps, divergence, coefficient)
    return beta * chosen, beta * rejected


def _scores(logps: PairLogps, divergence: str = "reverse_kl", coefficient: float = 0.5) -> tuple[Tensor, Tensor]:
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "a reference was declared as needed"
    return (
        divergence_slope(logps.chosen - logps.ref_chosen, divergence, coefficient),
        divergence_slope(logps.rejected - logps.ref_rejected, divergence, coefficient),
    )


LARGEST_EXPONENT = 80.0  # exp beyond it is not finite in fp32


def divergence_slope(log_ratio: Tensor, divergence: str, coefficient: float = 0.5) -> Tensor:
    """f'(t) at log t = `log_ratio`, shifted to 0 at t = 1: what f-DPO compares (arXiv 2309.16240).

    The alpha divergence is f'(t) = (t^(α−1) − 1)/(α − 1), as in TRL: α → 1 is the reverse KL. Others write
    t^(−α), which is this one at 1 − α.
    """
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":  # 1 − 1/t
            return -torch.expm1((-log_ratio).clamp(max=LARGEST_EXPONENT))
        case "js_divergence":  # log 2t/(t + 1)
            return math.log(2) + F.logsigmoid(log_ratio)
        case "alpha_divergence":
            power = coefficient - 1
            if abs(power) < 1e-6:
                return log_ratio
            return torch.expm1((power * log_ratio).clamp(max=LARGEST_EXPONENT)) / power
    raise AssertionError(f"no divergence is called {divergence}")


def length_weights(owner: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Weights [N] of tokens in LD-DPO: 1 up to the length of the pair's shorter answer, α beyond (arXiv 2409.06411).

    TRL weighs policy and reference alike, and so do we; LLaMA-Factory and ms-swift weigh the policy alone, which is
    `ld_reference: false`, and whose margin is not 0 at the start.

    Args:
        owner: [N] sequence of each token, ascending; sequences alternate chosen, rejected.
        lengths: [S] tokens of each sequence.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(len(owner), device=owner.device) - starts[owner]
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(position < shorter[owner], 1.0, alpha)


def _per_token(logps: PairLogps, scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return scores[0] / logps.chosen_len, scores[1] / logps.rejected_len


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def weighed_sum(logps: PairLogps, losses: Tensor, rewards: tuple[Tensor, Tensor]) -> Loss:
    """Σ weight · loss over the pairs, with the metrics of pairs."""
    total = losses.sum() if logps.weight is None else (logps.weight * losses).sum()
    return Loss(total, pair_metrics(logps, *rewards))


def pair_metrics(logps: PairLogps, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """The metrics every pairwise objective reports, under TRL's names; a tie counts as half an accurate pair.

    `rewards/longer_wins` is ours: the share of pairs whose longer answer has the higher reward. Above the accuracy, the
    model has learnt length in place of what the pairs say.
    """
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    margins = chosen - rejected
    longer = margins * (logps.chosen_len - logps.rejected_len)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": _wins(margins),
        "rewards/longer_wins": _wins(longer),
        "logps/chosen": logps.chosen.detach(),
        "logps/rejected": logps.rejected.detach(),
    }
    return {name: (value.sum(), float(len(margins))) for name, value in values.items()}


def _wins(margins: Tensor) -> Tensor:
    return (margins > 0).float() + 0.5 * (margins == 0).float()
