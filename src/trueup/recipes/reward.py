"""Answers with judgements as the loop sees them: micro-batches in, losses of their rewards out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trueup.config.schema import RunConfig
from trueup.data.counts import counted
from trueup.data.encode import Prepared
from trueup.data.encoded import Encoded, EncodedDataset
from trueup.data.forest import build_forest
from trueup.errors import ConfigError, DataError, Problem
from trueup.models.policy import Policy
from trueup.models.reward import RewardModel
from trueup.recipes.batches import Batch
from trueup.recipes.objective import terms_of
from trueup.training.backend import Backend
from trueup.types import Metrics, Rankings

log = logging.getLogger("trueup")

COMPARING = ("bradley_terry", "plackett_luce")


def kind_of(cfg: RunConfig) -> type[Policy]:
    """What a stage makes of its model."""
    return RewardModel if cfg.objective.stage == "rm" else Policy


class RewardLesson:
    """Rewards of the answers of each row, compared with each other or with the data's scores."""

    def __init__(self, cfg: RunConfig, model: RewardModel, datasets: Mapping[str, EncodedDataset]) -> None:
        self.model, self.datasets = model, datasets
        (self.term,) = terms_of(cfg)

    def counts(self, batch: Batch) -> dict[str, float]:
        answers = sum(len(example.answers) for example in self._examples(batch))
        return {"rankings": float(len(batch.indices)), "answers": float(answers)}

    def loss(self, batch: Batch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        examples = self._examples(batch)
        rankings = as_rankings(examples, self.model.rewards(build_forest(examples)))
        result = self.term.objective.function(rankings, **self.term.parameters)
        return result.sum / totals[self.term.objective.denominator], result.metrics

    def _examples(self, batch: Batch) -> list[Encoded]:
        dataset = self.datasets[batch.split]
        return [dataset[i] for i in batch.indices]

    def look_ahead(self, batches: Sequence[Batch], backend: Backend, steps_done: int | None) -> None:
        """Nothing: no row depends on another."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def as_rankings(examples: Sequence[Encoded], rewards: Tensor) -> Rankings:
    """Rewards [S] of all answers in turn → one row an example; the data's order stands for scores it does not give."""
    sizes = [len(example.answers) for example in examples]
    present = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    scores = torch.zeros(present.shape)
    scores[present] = torch.tensor([float(score) for example in examples for score in standing(example)])
    margin = torch.tensor([margin_of(example) or 0.0 for example in examples])
    present, scores, margin = (t.to(rewards.device, non_blocking=True) for t in (present, scores, margin))
    laid_out = torch.zeros_like(scores).masked_scatter(present, rewards)
    return Rankings(laid_out, scores, present, margin)


def margin_of(example: Encoded) -> float | None:
    """The margin that a pair brings, if it brings one."""
    return example.scores[0] if len(example.scores) == 1 < len(example.answers) else None


def has_scores(example: Encoded) -> bool:
    """Whether the data says of each answer how good it is."""
    return len(example.scores) == len(example.answers)


def standing(example: Encoded) -> Sequence[float]:
    """A number an answer, higher for the better: its score, or its place from the end."""
    return example.scores if has_scores(example) else range(len(example.answers) - 1, -1, -1)


# --- what the data has to bring -----------------------------------------------------------------------


def teachable(cfg: RunConfig, prepared: Prepared) -> Prepared:
    """The data without rows in which all answers tie, if they are to be compared.

    Raises:
        DataError: scores are missing, or are no probabilities where probabilities are meant.
        ConfigError: `score_margin` has no scores to go by.
    """
    if stream := prepared.stream:
        of_buffer = replace(prepared, eval={}, stream=None)
        stream.screened_by(lambda rows: teachable(cfg, replace(of_buffer, train=rows)).train)
        prepared = replace(prepared, train=stream.dataset)
    sets = {"train": prepared.train, **prepared.eval}
    if cfg.reward.reward_loss not in COMPARING:
        _require_scores(cfg, sets)
        return prepared
    if cfg.reward.score_margin and not any(has_scores(example) for rows in sets.values() for example in rows):
        raise ConfigError(
            "`score_margin` has no effect: the data orders its answers and gives no scores", where="score_margin",
            expected="a column of scores beside the answers", fix="drop score_margin; pairs may have a column margin",
        )  # fmt: skip
    kept = {name: _without_ties(rows, prepared) for name, rows in sets.items()}
    if all(len(kept[name]) == len(rows) for name, rows in sets.items()):
        return prepared
    if cfg.data.on_bad_rows == "error":
        prepared.report.refuse_bad_rows()
    prepared.report.require_usable()
    for name, rows in sets.items():
        prepared.report.splits[name] -= len(rows) - len(kept[name])
    return replace(prepared, train=kept.pop("train"), eval=kept)


def _without_ties(rows: EncodedDataset, prepared: Prepared) -> EncodedDataset:
    tied = [example.row for example in rows if len(set(standing(example))) == 1]
    if not tied:
        return rows
    news = [row for row in tied if prepared.report.dropped(row, "all answers tie", "equal scores")]
    if news:
        log.warning(
            "%s left out because all answers have the same score (first: %s); on_bad_rows: error refuses that "
            "instead, reward_loss: pointwise learns from it", counted(len(news), "row is", "rows are"), news[0],
        )  # fmt: skip
    return EncodedDataset.of(example for example in rows if len(set(standing(example))) > 1)


def _require_scores(cfg: RunConfig, sets: Mapping[str, EncodedDataset]) -> None:
    binary, problems = cfg.reward.reward_loss == "binary", []
    examples = [example for rows in sets.values() for example in rows]
    if without := [example.row for example in examples if not has_scores(example)]:
        problems.append(
            Problem(
                f"{counted(len(without), 'row has', 'rows have')} no score, and "
                f"`reward_loss: {cfg.reward.reward_loss}` learns scores",
                where=without[0], expected="a column `score`, or `scores` beside several answers",
                fix="add scores, or set reward_loss: bradley_terry for answers that are only ordered",
            )
        )  # fmt: skip
    outside = [e.row for e in examples if has_scores(e) and not all(0 <= score <= 1 for score in e.scores)]
    if binary and outside:
        problems.append(
            Problem(
                f"{counted(len(outside), 'row has', 'rows have')} scores outside 0 … 1, and "
                "`reward_loss: binary` learns probabilities",
                where=outside[0], fix="set reward_loss: pointwise, or scale the scores",
            )
        )  # fmt: skip
    if problems:
        raise DataError(problems)
