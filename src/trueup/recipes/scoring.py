"""`trueup score`: what a reward model says of the answers in a dataset, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trueup.config.schema import RunConfig
from trueup.data.counts import counted
from trueup.data.encode import encode_dataset, run_template
from trueup.data.encoded import Encoded
from trueup.data.examples import Ranking
from trueup.data.load import load_examples_for
from trueup.errors import ConfigError, DataError
from trueup.models.load import load_tokenizer, pick_device, pick_dtype
from trueup.models.reward import RewardModel, load_reward_model
from trueup.recipes.reward import as_rankings
from trueup.training import durable
from trueup.waiting import waiting


@dataclass(frozen=True)
class Scored:
    """What was scored. `accuracy`: the share of pairs in a row in which the better answer has the higher reward."""

    output: str | None
    rows: int
    answers: int
    left_out: int
    mean_reward: float
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        out = f" ({counted(self.left_out, 'row', 'rows')} left out: see the data report)" if self.left_out else ""
        answers, rows = counted(self.answers, "answer", "answers"), counted(self.rows, "row", "rows")
        lines = [f"{answers} of {rows}{out}, mean reward {self.mean_reward:.3f}"]
        if self.accuracy is not None:
            lines.append(f"accuracy {self.accuracy:.3f}: the better answer has the higher reward")
        return "\n".join([*lines, *([f"wrote {self.output}"] if self.output else [])])


def score(cfg: RunConfig, output: Path | None, force: bool = False) -> tuple[Scored, list[dict[str, Any]]]:
    """Score every answer of the datasets; the lines go to `output`, if it is given, when all is done.

    A line holds `row`, `prompt`, `answers` (best first where the data ranks them), `rewards` in that order, and
    `scores` where the data gives any.

    Raises:
        ConfigError: there is nothing to score, or `output` exists. DataError, ModelError: from reading either.
    """
    if not (cfg.data.dataset or cfg.data.eval_dataset):
        raise ConfigError("there is nothing to score", where="dataset", fix="name a dataset or a file: --dataset FILE")
    if output is not None and output.exists() and not force:
        raise ConfigError(f"{output} exists already", where="--output", fix="name another file, or add --force")
    device = pick_device(cfg.model.device)
    tokenizer = load_tokenizer(cfg.model)
    template = run_template(cfg, tokenizer)
    data = load_examples_for(cfg, kind="answers")
    examples = [example for part in (data.train, *data.eval.values()) for example in part]
    encoded = encode_dataset(
        examples, template, cutoff_len=cfg.data.cutoff_len, truncation=cfg.data.truncation,
        on_bad_rows=cfg.data.on_bad_rows, report=data.report,
    )  # fmt: skip
    model = load_reward_model(
        cfg.model, str(cfg.model.model_name_or_path), cfg.model.adapter_name_or_path, device,
        pick_dtype(device, cfg.train.bf16, cfg.train.fp16),
    )  # fmt: skip
    rewards = rewards_of(model, list(encoded))
    by_row = {example.row: example for example in examples}
    lines = [_line(by_row[example.row], example, row) for example, row in zip(encoded, rewards, strict=True)]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    left_out = sum(dataset.num_dropped for dataset in data.report.datasets.values())
    return _summary(list(encoded), rewards, output, left_out), lines


def rewards_of(model: RewardModel, examples: Sequence[Encoded]) -> list[list[float]]:
    """The rewards of each example's answers."""
    rewards: list[list[float]] = []
    with waiting("scoring", len(examples), "rows") as tell:
        for start in range(0, len(examples), _ROWS):
            part = examples[start : start + _ROWS]
            prompts = [example.prompt for example in part for _ in example.answers]
            scores = model(prompts, [answer.ids for example in part for answer in example.answers]).tolist()
            for example in part:
                rewards.append(scores[: len(example.answers)])
                del scores[: len(example.answers)]
            tell(len(rewards))
    return rewards


_ROWS = 64  # between two words about how far it is


def _line(example: Any, encoded: Encoded, rewards: list[float]) -> dict[str, Any]:
    assert isinstance(example, Ranking)
    line = {
        "row": example.row,
        "prompt": [message.to_dict() for message in example.prompt],
        "answers": [[message.to_dict() for message in answer] for answer in example.answers],
        "rewards": rewards,
    }
    return line | ({"scores": list(encoded.scores)} if len(encoded.scores) == len(rewards) else {})


def _summary(examples: Sequence[Encoded], rewards: Sequence[list[float]], output: Path | None, left_out: int) -> Scored:
    if not examples:
        raise DataError("no row is left to score", where="dataset")
    flat = [reward for row in rewards for reward in row]
    right = pairs = 0.0
    for example, row in zip(examples, rewards, strict=True):
        wins = as_rankings([example], torch.tensor(row))
        gaps = torch.tensor(row)[:, None] - torch.tensor(row)[None, :]
        chosen = gaps[wins.wins[0]]
        right += float((chosen > 0).sum() + 0.5 * (chosen == 0).sum())
        pairs += len(chosen)
    return Scored(
        str(output) if output else None, len(examples), len(flat), left_out, sum(flat) / len(flat),
        right / pairs if pairs else None,
    )  # fmt: skip
