"""Rollouts: which prompts are answered when, who draws which answers, and what they are found to be worth.

Work is cut first and dealt out to the processes then, with seeds of its own, and everyone gets everything back. So
which answers are drawn depends on the seed and the weights alone, not on how many processes draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset
from trueup.recipes.judges import Judges
from trueup.recipes.prompts import PromptRows
from trueup.rollout.engines import Engine, Sampling
from trueup.rollout.rewards import Answered
from trueup.rollout.rollout import Rollout
from trueup.rollout.sampler import Sampled
from trueup.training.backend import Backend
from trueup.training.profile import phase

HostMetrics = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Collected:
    """A rollout that is scored, the texts of its answers, and what is to be logged of it once."""

    rollout: Rollout
    answered: list[Answered]
    scores: np.ndarray  # [S, rewards]
    metrics: HostMetrics


class Collector:
    """Draws and scores answers."""

    def __init__(
        self, cfg: RunConfig, engine: Engine, judges: Judges, rows: PromptRows, backend: Backend
    ) -> None:  # fmt: skip
        self.engine, self.judges, self.rows, self.backend = engine, judges, rows, backend
        self.num_answers = cfg.online.num_generations or 1
        self.prompts_at_a_time = max(1, cfg.online.generation_batch_size // self.num_answers)
        self.sampling = sampling_of(cfg)
        self.seed = cfg.train.data_seed if cfg.train.data_seed is not None else cfg.train.seed
        self.penalty = cfg.online.missing_eos_penalty
        self.drop_truncated = cfg.online.mask_truncated_completions

    def collect(self, dataset: EncodedDataset, rows_P: np.ndarray, epoch: int, index: int) -> Collected:
        """The answers to some rows of the training set, scored. Every process calls this, and gets the same."""
        groups = self._groups(dataset, rows_P)
        mine = []
        for number in range(self.backend.rank, len(groups), self.backend.world_size):
            seed = np.random.SeedSequence([self.seed, epoch, index, number]).generate_state(2)
            places = groups[number]
            prompts = [dataset[int(rows_P[p])].prompt for p in places]
            with phase("rollout"):
                drawn = self.engine.sample(prompts, self.sampling, self.num_answers, _as_int(seed))
            answered = [self.answered(dataset, int(rows_P[p]), a) for p, group in zip(places, drawn, strict=True)
                        for a in group]  # fmt: skip
            with phase("rewards"):
                mine.append((places, drawn, answered, self.judges.score(answered)))
        shared = [part for of_rank in self.backend.gather(mine) for part in of_rank]
        return self._assemble(epoch, index, rows_P, shared)

    def answered(self, dataset: EncodedDataset, row: int, answer: Sampled) -> Answered:
        """An answer as rewards see it: without its stop token, as text."""
        example = dataset[row]
        ids = answer.ids[:-1] if answer.ended else answer.ids
        decode = self.engine.tokenizer.decode
        whole = decode(np.concatenate([example.prompt, answer.ids]), skip_special_tokens=False)
        question, columns = self.rows.question(example.row), self.rows.columns(example.row)
        return Answered(example.row, question, decode(ids, skip_special_tokens=True), whole, columns)

    def _groups(self, dataset: EncodedDataset, rows_P: np.ndarray) -> list[list[int]]:
        """Places in `rows_P` whose prompts are answered together: of similar length."""
        order = np.argsort(dataset.prompt_lengths[rows_P], kind="stable").tolist()
        return [order[i : i + self.prompts_at_a_time] for i in range(0, len(order), self.prompts_at_a_time)]

    def _assemble(self, epoch: int, index: int, rows_P: np.ndarray, parts: Sequence[tuple]) -> Collected:
        G, P = self.num_answers, len(rows_P)
        drawn: list[list[Sampled]] = [[] for _ in range(P)]
        answered: list[Answered | None] = [None] * (P * G)
        scores = np.full((P * G, len(self.judges.names)), np.nan)
        for places, groups, texts, values in parts:
            for i, place in enumerate(places):
                drawn[place] = groups[i]
                answered[place * G : (place + 1) * G] = texts[i * G : (i + 1) * G]
                scores[place * G : (place + 1) * G] = values[i * G : (i + 1) * G]
        rollout = Rollout.of(epoch, index, rows_P, drawn)
        rollout.rewards_S = self.judges.combine(scores) - self.penalty * ~rollout.ended_S
        if self.drop_truncated:
            rollout.kept_S = rollout.ended_S.copy()
        flat = [answer for group in drawn for answer in group]
        rollout.tokens["sampled"] = np.concatenate([answer.logps for answer in flat])
        metrics = {
            **reward_metrics(rollout.rewards_S.reshape(P, G), scores, self.judges.names),
            **length_metrics(rollout),
            "entropy": (float(sum(answer.entropy for answer in flat)), float(len(rollout.ids_T))),
        }
        return Collected(rollout, [a for a in answered if a is not None], scores, metrics)


def sampling_of(cfg: RunConfig) -> Sampling:
    """How answers to learn from are drawn."""
    g = cfg.generate
    return Sampling(g.temperature, g.top_p, g.top_k, 1.0, g.max_new_tokens)


def reward_metrics(rewards_PG: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> HostMetrics:
    """Rewards under TRL's names; (sum, count) each. Nothing of rewards that nobody gave."""
    found: HostMetrics = {}
    if np.isfinite(rewards_PG).any():
        known = np.isfinite(rewards_PG)
        found["reward"] = (float(np.nansum(rewards_PG)), float(known.sum()))
        if rewards_PG.shape[1] > 1:
            mean = np.nansum(rewards_PG, 1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
            variance = np.nansum((rewards_PG - mean) ** 2, 1) / np.maximum(known.sum(1) - 1, 1)
            found["reward_std"] = (float(np.sqrt(variance).sum()), float(len(variance)))
            found["frac_reward_zero_std"] = (float((variance < 1e-12).sum()), float(len(variance)))
        else:
            found["reward_std"] = (float(np.nanstd(rewards_PG)), 1.0)
    for name, column in zip(names, scores.T, strict=True):
        known = column[np.isfinite(column)]
        if len(known):
            found[f"rewards/{name}/mean"] = (float(known.sum()), float(len(known)))
            found[f"rewards/{name}/std"] = (float(known.std(ddof=1)) if len(known) > 1 else 0.0, 1.0)
    return found


def length_metrics(rollout: Rollout) -> HostMetrics:
    """How long answers are, and how many are cut off, under TRL's names."""
    lengths, ended = rollout.lengths_S, rollout.ended_S
    found = {
        "completions/mean_length": (float(lengths.sum()), float(len(lengths))),
        "completions/min_length": (float(lengths.min()), 1.0),
        "completions/max_length": (float(lengths.max()), 1.0),
        "completions/clipped_ratio": (float((~ended).sum()), float(len(ended))),
    }
    if ended.any():
        found["completions/mean_terminated_length"] = (float(lengths[ended].sum()), float(ended.sum()))
    return found


def _as_int(words: np.ndarray) -> int:
    """A seed that torch takes: 63 bits."""
    return (int(words[0]) << 31) ^ int(words[1])
