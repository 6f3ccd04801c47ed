"""What each stage makes of a rollout: from rewards to advantages, from log-probabilities to a loss.

A learner says which per-token values of the rollout it `wants` computed before the first step on it, fills in what
follows from rewards in `appraise` (on every process alike), and gives each micro-batch's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.objectives import pairwise, policy_gradient
from trueup.objectives.policy_gradient import AnswerLogps
from trueup.recipes.collector import Collected, HostMetrics
from trueup.recipes.judges import Judges
from trueup.rollout import advantages
from trueup.rollout.controllers import KlController, RunningNorm
from trueup.rollout.rewards import Answered
from trueup.rollout.rollout import Rollout
from trueup.training.backend import Backend
from trueup.types import Loss, PairLogps

Wanted = Literal["old", "reference", "values"]


@dataclass(frozen=True)
class MicroBatch:
    """Answers of one micro-batch with what the model says of their N tokens now."""

    rollout: Rollout
    answers: list[int]
    owner: Tensor  # [N]
    logps: Tensor  # [N]
    values: Tensor | None  # [N]

    def of(self, name: str) -> Tensor:
        """The rollout's per-token values of these answers, [N] on the device."""
        return torch.from_numpy(self.rollout.take(name, self.answers)).to(self.logps.device)

    def answer_logps(self) -> AnswerLogps:
        """What the policy-gradient objectives see; answers of this very policy have a ratio of exactly 1."""
        tokens = self.rollout.tokens
        old = self.of("old") if "old" in tokens else self.logps.detach()
        reference = self.of("reference") if "reference" in tokens else None
        return AnswerLogps(self.logps, old, self.of("advantages"), self.owner, len(self.answers), reference)


class Learner(Protocol):
    """A stage. `denominator` names the count that its loss is divided by."""

    wants: frozenset[Wanted]
    denominator: str

    def appraise(self, collected: Collected) -> HostMetrics:
        """Fill in the rollout's advantages (or what is learnt from); what is to be logged of it once."""
        ...

    def loss(self, batch: MicroBatch) -> Loss: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class GroupRelative(_Stateless):
    """GRPO and its variants."""

    def __init__(self, cfg: RunConfig, on_policy: bool) -> None:
        online = cfg.online
        self.wants = _wants(old=not on_policy, reference=bool(online.ppo_kl_coeff))
        self.denominator = policy_gradient.DENOMINATORS[online.grpo_loss]
        self.scale: Any = online.scale_rewards
        self.arguments: dict[str, Any] = {
            "loss": online.grpo_loss,
            "low": online.ppo_clip_ratio,
            "high": online.ppo_clip_ratio_high,
            "kl_coeff": online.ppo_kl_coeff,
        }

    def appraise(self, collected: Collected) -> HostMetrics:
        rollout = collected.rollout
        groups = rollout.rewards_S.reshape(-1, rollout.num_answers)
        _spread(rollout, advantages.group_relative(groups, self.scale).reshape(-1))
        return _sampling_gap(rollout)

    def loss(self, batch: MicroBatch) -> Loss:
        return policy_gradient.grpo(batch.answer_logps(), **self.arguments)


class LeaveOneOut(_Stateless):
    """RLOO: the KL of whole answers is part of the reward."""

    denominator = "answers"

    def __init__(self, cfg: RunConfig, on_policy: bool) -> None:
        online = cfg.online
        self.price = online.ppo_kl_coeff or 0.0
        self.wants = _wants(old=not on_policy or self.price > 0, reference=self.price > 0)
        self.normalise = online.normalize_advantages
        self.clip = {"low": online.ppo_clip_ratio, "high": online.ppo_clip_ratio_high}

    def appraise(self, collected: Collected) -> HostMetrics:
        rollout, found = collected.rollout, {}
        rewards = np.where(rollout.kept_S, rollout.rewards_S, np.nan)  # others are no baseline either
        if self.price:
            kl = np.array([part.sum() for part in _log_ratios(rollout)])
            rewards = rewards - self.price * kl
            if rollout.kept_S.any():
                found["kl"] = (float(kl[rollout.kept_S].sum()), float(rollout.kept_S.sum()))
        values = advantages.leave_one_out(rewards.reshape(-1, rollout.num_answers)).reshape(-1)
        if self.normalise:
            (values,) = advantages.whiten([values])
        _spread(rollout, values)
        return {**found, **_sampling_gap(rollout)}

    def loss(self, batch: MicroBatch) -> Loss:
        return policy_gradient.rloo(batch.answer_logps(), **self.clip)  # type: ignore[arg-type]


class Ppo:
    """PPO with a value head: the KL is charged token by token, the reward is given at the last one.

    TRL gave it one token past the end of answers that are shorter than others, and divided advantages by the unbiased
    deviation: its policy loss is √((N − 1)/N) of ours at N tokens a round.
    """

    denominator = "tokens"
    wants = frozenset[Wanted]({"old", "reference", "values"})

    def __init__(self, cfg: RunConfig) -> None:
        o = cfg.online
        self.clip = {"low": o.ppo_clip_ratio, "high": o.ppo_clip_ratio_high}
        self.gamma, self.lam = o.ppo_gamma, o.ppo_lambda
        self.value_coeff, self.value_clip = o.ppo_value_coeff, o.ppo_value_clip
        self.whiten_rewards = o.ppo_whiten_rewards
        self.controller = KlController(o.ppo_kl_coeff or 0.0, o.ppo_target)
        self.norm = RunningNorm() if o.ppo_score_norm else None

    def appraise(self, collected: Collected) -> HostMetrics:
        rollout = collected.rollout
        rollout.kept_S = rollout.kept_S & np.isfinite(rollout.rewards_S)  # no reward is not a reward of 0
        scores = rollout.rewards_S
        if self.norm is not None:
            scores = self.norm.normalise(scores)
        log_ratios = _log_ratios(rollout)
        price = self.controller.price
        rewards = [-price * part for part in log_ratios]
        for reward, score in zip(rewards, np.nan_to_num(scores), strict=True):
            reward[-1] += score
        kept = np.flatnonzero(rollout.kept_S)
        shaped = list(rewards)
        if self.whiten_rewards:
            _put_back(shaped, kept, advantages.whiten([rewards[i] for i in kept], shift=False))
        found, returns = advantages.gae(shaped, rollout.split("values"), self.gamma, self.lam)
        whitened = advantages.whiten([found[i] for i in kept])
        found = [np.zeros_like(part) for part in found]
        _put_back(found, kept, whitened)
        rollout.join("advantages", found)
        rollout.join("returns", returns)
        if not len(kept):
            return {}
        kl = np.array([log_ratios[i].sum() for i in kept])
        self.controller.see(float(kl.mean()), len(kl))
        return {**self._metrics(collected, kl, price), **_sampling_gap(rollout)}

    def _metrics(self, collected: Collected, kl: np.ndarray, price: float) -> HostMetrics:
        """Under TRL's names; per answer that is learnt from, except where they say otherwise."""
        rollout, count = collected.rollout, float(len(kl))
        scores = float(rollout.rewards_S[rollout.kept_S].sum())
        surprise = -float(rollout.take("old", np.flatnonzero(rollout.kept_S).tolist()).sum(dtype=np.float64))
        entropy, tokens = collected.metrics["entropy"]
        return {
            "kl": (float(kl.sum()), count),
            "objective/kl": (float(kl.sum()), count),
            "objective/kl_coef": (price, 1.0),
            "objective/entropy": (surprise, count),
            "objective/non_score_reward": (-price * float(kl.sum()), count),
            "objective/rlhf_reward": (scores - price * float(kl.sum()), count),
            "objective/scores": (scores, count),
            "policy/entropy_avg": (entropy, tokens),
            "val/num_eos_tokens": (float(rollout.ended_S.sum()), 1.0),
        }

    def loss(self, batch: MicroBatch) -> Loss:
        assert batch.values is not None
        policy = policy_gradient.ppo(batch.answer_logps(), **self.clip)  # type: ignore[arg-type]
        value = policy_gradient.value_loss(batch.values, batch.of("values"), batch.of("returns"), self.value_clip)
        return Loss(policy.sum + self.value_coeff * value.sum, {**policy.metrics, **value.metrics})

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self.controller.state_dict(), "norm": self.norm.state_dict() if self.norm else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        if self.norm is not None and state["norm"] is not None:
            self.norm.load_state_dict(state["norm"])


class OnlineDpo(_Stateless):
    """DPO on pairs of the policy's own answers (arXiv 2402.04792): the judge's choice, or the best and worst reward.

    A tie is left out, as is a prompt with fewer than two answers that have a reward; TRL calls the first answer of a
    tie the chosen one, and counts a missing reward as 0.
    """

    denominator = "pairs"
    wants = frozenset[Wanted]({"reference"})

    def __init__(self, cfg: RunConfig, judges: Judges, backend: Backend) -> None:
        self.beta = cfg.objective.pref_beta
        self.judges, self.backend = judges, backend

    def appraise(self, collected: Collected) -> HostMetrics:
        rollout = collected.rollout
        if self.judges.judge:
            self._ask(collected)
        groups = rollout.rewards_S.reshape(-1, rollout.num_answers)
        usable = np.isfinite(groups) & rollout.kept_S.reshape(groups.shape)
        best = np.where(usable, groups, -np.inf).argmax(axis=1)
        worst = np.where(usable, groups, np.inf).argmin(axis=1)
        index = np.arange(len(groups))
        told_apart = (usable.sum(axis=1) > 1) & (np.nan_to_num(groups[index, best] - groups[index, worst]) > 0)
        kept = np.zeros(groups.shape, dtype=bool)
        kept[index[told_apart], best[told_apart]] = True
        kept[index[told_apart], worst[told_apart]] = True
        rollout.kept_S = kept.reshape(-1)
        found: HostMetrics = {"judge/ties": (float((~told_apart).sum()), float(len(groups)))}
        if told_apart.any():
            lengths = rollout.lengths_S.reshape(groups.shape)
            for name, column in (("chosen", best), ("rejected", worst)):
                total = float(lengths[index, column][told_apart].sum())
                found[f"completions/{name}_length"] = (total, float(told_apart.sum()))
        return {**found, **_sampling_gap(rollout)}

    def _ask(self, collected: Collected) -> None:
        """The judge's word as rewards: 1 for the better of two answers, 0 for the other, none for a tie."""
        verdicts = self._verdicts(collected.answered[0::2], collected.answered[1::2])
        rewards = np.full((len(verdicts), 2), np.nan)
        rewards[verdicts == 0] = (1.0, 0.0)
        rewards[verdicts == 1] = (0.0, 1.0)
        collected.rollout.rewards_S = rewards.reshape(-1)

    def _verdicts(self, first: Sequence[Answered], second: Sequence[Answered]) -> np.ndarray:
        """[P] What the judge says. Each process asks about its share and hears the rest: a judge that would answer
        otherwise when asked again must not part them.
        """
        rank, world_size = self.backend.rank, self.backend.world_size
        mine = slice(rank, None, world_size)
        told = self.backend.gather(self.judges.prefer(first[mine], second[mine]) if first[mine] else [])
        verdicts = np.empty(len(first), dtype=int)
        for other, share in enumerate(told):
            verdicts[other::world_size] = share
        return verdicts

    def loss(self, batch: MicroBatch) -> Loss:
        rewards = batch.rollout.rewards_S[batch.answers].reshape(-1, 2)
        first_is_chosen = torch.from_numpy(rewards[:, 0] > rewards[:, 1]).to(batch.logps.device)
        return pairwise.sigmoid(_pair_logps(batch, first_is_chosen), beta=self.beta)


def _pair_logps(batch: MicroBatch, first_is_chosen: Tensor) -> PairLogps:
    """Sums over answers, chosen and rejected told apart; an answer's pair is its neighbour."""

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        sums = values.new_zeros(len(batch.answers)).index_add(0, batch.owner, values).view(-1, 2)
        one, other = sums[:, 0], sums[:, 1]
        return torch.where(first_is_chosen, one, other), torch.where(first_is_chosen, other, one)

    chosen, rejected = sides(batch.logps)
    chosen_len, rejected_len = sides(torch.ones_like(batch.logps))
    ref_chosen, ref_rejected = sides(batch.of("reference"))
    return PairLogps(
        chosen=chosen, rejected=rejected, chosen_len=chosen_len, rejected_len=rejected_len,
        ref_chosen=ref_chosen, ref_rejected=ref_rejected,
    )  # fmt: skip


def make_learner(cfg: RunConfig, judges: Judges, backend: Backend, on_policy: bool) -> Learner:
    """The learner of a stage. `on_policy`: every rollout serves a single step."""
    match cfg.objective.stage:
        case "grpo":
            return GroupRelative(cfg, on_policy)
        case "rloo":
            return LeaveOneOut(cfg, on_policy)
        case "ppo":
            return Ppo(cfg)
        case "online_dpo":
            return OnlineDpo(cfg, judges, backend)
        case stage:
            raise AssertionError(f"{stage} does not learn from its own answers")


def _wants(**wanted: bool) -> frozenset[Any]:
    return frozenset(name for name, yes in wanted.items() if yes)


def _spread(rollout: Rollout, values_S: np.ndarray) -> None:
    """One advantage for all tokens of an answer."""
    rollout.tokens["advantages"] = np.repeat(values_S, rollout.lengths_S).astype(np.float32)


def _log_ratios(rollout: Rollout) -> list[np.ndarray]:
    """log π_old − log π_ref of every token, answer by answer (k1: unbiased, may be negative)."""
    return [a - b for a, b in zip(rollout.split("old"), rollout.split("reference"), strict=True)]


def _put_back(values: list[np.ndarray], places: Sequence[int], parts: Sequence[np.ndarray]) -> None:
    for place, part in zip(places, parts, strict=True):
        values[place] = part


def _sampling_gap(rollout: Rollout) -> HostMetrics:
    """How far the sampler's log-probabilities are from those that training computes, under TRL's names."""
    if "old" not in rollout.tokens:
        return {}
    gap = np.abs(rollout.tokens["old"] - rollout.tokens["sampled"])[np.repeat(rollout.kept_S, rollout.lengths_S)]
    if not len(gap):
        return {}
    return {
        "sampling/sampling_logp_difference/mean": (float(gap.sum(dtype=np.float64)), float(len(gap))),
        "sampling/sampling_logp_difference/max": (float(gap.max()), 1.0),
    }
