"""Learning from one's own answers, as the loop runs it (`trueup.training.step.Program`).

A step's micro-batches begin with a rollout, unless an earlier step of the same rollout has drawn it: sample, score,
compute what the losses compare with, turn rewards into advantages. A rollout serves `ppo_buffer_size` batches of
prompts, `ppo_epochs` times each. One that is not used up is part of a checkpoint; others can be drawn again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset, Prepared
from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import BatchPlan, Padded, build_forest
from trueup.models.load import Loaded
from trueup.models.logprobs import Head, token_logps
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference
from trueup.models.value import ValueHead
from trueup.recipes.batches import cut_indices, eval_batches
from trueup.recipes.collector import Collected, Collector, HostMetrics, length_metrics, reward_metrics
from trueup.recipes.learners import Learner, MicroBatch
from trueup.rollout.completions import CompletionsLog
from trueup.rollout.rollout import Rollout
from trueup.training.backend import Backend
from trueup.training.profile import phase
from trueup.types import Forest, Metrics

log = logging.getLogger("trueup")


@dataclass(frozen=True)
class OnlineBatch:
    """A micro-batch: prompts of a rollout (by their place in it), or rows of an evaluation set."""

    split: str
    indices: np.ndarray
    rollout: Rollout | None = None
    extra: Metrics = field(default_factory=dict)  # of the whole rollout, told once


@dataclass(frozen=True)
class Schedule:
    """Which rollout a step belongs to, and which of its prompts the step trains on."""

    plan: BatchPlan
    buffer: int  # batches of prompts in a rollout
    passes: int

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch * self.passes

    def locate(self, step: int) -> tuple[int, int]:
        """(rollout of the epoch, step within the rollout)."""
        return divmod(step, self.buffer * self.passes)

    def rows(self, epoch: int, rollout: int) -> np.ndarray:
        """Rows of the training set that a rollout answers."""
        steps = self.plan.steps(epoch)[rollout * self.buffer : (rollout + 1) * self.buffer]
        return np.concatenate([unit for units in steps for unit in units])

    def is_last(self, step: int, rows: int) -> bool:
        """Whether a rollout of so many rows is used up after this step of it."""
        return step + 1 == self.passes * self.batches(rows)

    def prompts(self, epoch: int, rollout: int, step: int, rows: int) -> np.ndarray:
        """Places in the rollout that its step number `step` trains on; later passes go in other orders."""
        turn, batch = divmod(step, self.batches(rows))
        order = np.arange(rows)
        if turn and self.buffer > 1:
            order = np.random.default_rng([self.plan.seed, epoch, rollout, turn]).permutation(order)
        size = self.plan.rows_per_step
        return order[batch * size : (batch + 1) * size]

    def batches(self, rows: int) -> int:
        """Batches of prompts in a rollout of so many rows."""
        return -(-rows // self.plan.rows_per_step)


class OnlineProgram:
    """A policy that answers, a learner that judges its answers, and a collector between them."""

    def __init__(
        self,
        cfg: RunConfig,
        loaded: Loaded,
        prepared: Prepared,
        plan: BatchPlan,
        collector: Collector,
        learner: Learner,
        reference: LiveReference | None,
        backend: Backend,
        completions: CompletionsLog,
    ) -> None:
        self.policy, self.adapters = loaded.policy, loaded.adapters
        self.tokenizer = collector.engine.tokenizer
        self.datasets: dict[str, EncodedDataset] = {"train": prepared.train, **prepared.eval}
        self.schedule = Schedule(plan, cfg.online.ppo_buffer_size, cfg.online.ppo_epochs or 1)
        self.collector, self.learner, self.reference = collector, learner, reference
        self.backend, self.completions = backend, completions
        self.temperature = cfg.generate.temperature
        self.longest = cfg.generate.max_new_tokens
        self.value_head = None
        self.trainable: dict[str, nn.Parameter] = loaded.policy.trainable()
        self.masters = self.adapters.masters if self.adapters is not None else {}
        self.head_elements = self.policy.head_elements
        if "values" in learner.wants:
            width = loaded.policy.base.config.get_text_config().hidden_size
            self.value_head = ValueHead(width, loaded.policy.device)
            self.value_head.start_from([loaded.base_name, *loaded.starts])
            self.trainable |= self.value_head.trainable()
        self.examples_per_step = plan.rows_per_step
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.eval_sets = {
            name: [OnlineBatch(name, group) for group in eval_batches(cfg, dataset)[backend.rank :: backend.world_size]]
            for name, dataset in prepared.eval.items()
            if collector.judges.rewards
        }
        self._rollout: Rollout | None = None
        self._used_up = True
        self._untold: HostMetrics = {}  # of rollouts, until a step of this process has a micro-batch to tell them with
        self._said_empty = False

    def train(self, mode: bool = True) -> None:
        self.policy.model.train(mode)

    # --- batches ----------------------------------------------------------------------------

    def micro_batches(self, epoch: int, step: int) -> list[OnlineBatch]:
        index, position = self.schedule.locate(step)
        if self._rollout is None or (self._rollout.epoch, self._rollout.index) != (epoch, index):
            self._rollout, metrics = self._draw(epoch, index, step)
            for name, (value, count) in metrics.items():
                before = self._untold.get(name, (0.0, 0.0))
                self._untold[name] = (before[0] + value, before[1] + count)
        rollout = self._rollout
        rows = len(rollout.rows_P)
        self._used_up = self.schedule.is_last(position, rows)
        prompts = self.schedule.prompts(epoch, index, position, rows)
        batches = self._cut(rollout, prompts)
        if not rollout.lengths_P[prompts].any():
            self._say_empty(epoch * self.steps_per_epoch + step + 1)
        if self._untold and batches:
            told = {name: (torch.tensor(v, dtype=torch.float64), n) for name, (v, n) in self._untold.items()}
            batches[0], self._untold = replace(batches[0], extra=told), {}
        return batches

    def cut(self, batch: OnlineBatch, pieces: int) -> list[OnlineBatch]:
        parts = [replace(batch, indices=part, extra={}) for part in cut_indices(batch.indices, pieces)]
        return [replace(parts[0], extra=batch.extra), *parts[1:]]

    def forget_step(self) -> None:
        """Nothing: what a rollout holds was computed before its steps."""

    def _say_empty(self, step: int) -> None:
        if not self._said_empty:
            self._said_empty = True
            log.warning(
                "step %d has no answer to learn from (cut off, without a reward, or a tie), nor may later ones; "
                "%s says why: raise max_new_tokens, or mend the rewards", step, self.completions.path.name,
            )  # fmt: skip

    def _cut(self, rollout: Rollout, prompts: np.ndarray) -> list[OnlineBatch]:
        """This process's micro-batches over these prompts; those with nothing to learn from are left out."""
        answers = rollout.lengths_P
        asked = self.datasets["train"].prompt_lengths[rollout.rows_P]
        units = [np.array([p]) for p in prompts if answers[p]]
        padded = None if self.policy.shared else Padded.of(asked, rollout.lengths_PG)
        plan = replace(self.schedule.plan, lengths=asked + answers, padded=padded)
        groups = plan.micro_batches(units, self.backend.rank, self.backend.world_size)
        return [OnlineBatch("train", group, rollout) for group in groups]

    def _draw(self, epoch: int, index: int, step: int) -> tuple[Rollout, HostMetrics]:
        """A rollout with everything in it, and (on the first process) its metrics."""
        rows = self.schedule.rows(epoch, index)
        collected = self.collector.collect(self.datasets["train"], rows, epoch, index)
        with phase("look-ahead"):
            self._compute(collected.rollout, epoch, index)
        with phase("rewards"):  # a judge is asked here
            metrics = {**collected.metrics, **self.learner.appraise(collected)}
        self._write_down(collected, epoch * self.steps_per_epoch + step + 1)
        return collected.rollout, {} if self.backend.rank else metrics

    @torch.no_grad()
    def _compute(self, rollout: Rollout, epoch: int, index: int) -> None:
        """The per-token values that the learner wants, in the micro-batches of the first pass, dealt out like them."""
        if not self.learner.wants:
            return
        for name in self.learner.wants:
            rollout.put(name, [], np.zeros(0))  # answers that are not learnt from keep zeros
        mine = []
        batches = self.schedule.batches(len(rollout.rows_P))
        training = self.policy.model.training
        self.policy.model.eval()
        for step in range(batches):
            for batch in self._cut(rollout, self.schedule.prompts(epoch, index, step, len(rollout.rows_P))):
                mine.append((rollout.answers_of(batch.indices), self._values_of(batch)))
        self.policy.model.train(training)
        for of_rank in self.backend.gather(mine):
            for answers, values in of_rank:
                for name, array in values.items():
                    rollout.put(name, answers, array)

    def _values_of(self, batch: OnlineBatch) -> dict[str, np.ndarray]:
        forest = build_forest(self._examples(batch)).to(self.policy.device)
        found: dict[str, Tensor] = {}
        if self.learner.wants & {"old", "values"}:
            hidden = self.policy.hidden(forest)
            if "old" in self.learner.wants:
                found["old"] = self._logps(self.policy, hidden, forest)
            if self.value_head is not None:
                found["values"] = self.value_head(hidden)
        if self.reference is not None:
            with phase("reference"), self.reference.switch():
                live = self.reference.policy
                found["reference"] = self._logps(live, live.hidden(forest), forest)
        return {name: values.float().cpu().numpy() for name, values in found.items()}

    def _logps(self, policy: Policy, hidden: Tensor, forest: Forest) -> Tensor:
        """[N] log-probabilities at the temperature that the answers were drawn at."""
        return token_logps(hidden, cooled(policy.head, self.temperature), forest.target)

    def _examples(self, batch: OnlineBatch) -> list[Encoded]:
        dataset, rollout = self.datasets[batch.split], batch.rollout
        if rollout is None:
            return [dataset[int(i)] for i in batch.indices]
        examples = []
        for place in batch.indices:
            example = dataset[int(rollout.rows_P[place])]
            ids = [rollout.ids(answer) for answer in rollout.answers_of([place])]
            answers = tuple(Answer(part, np.ones(len(part), dtype=bool)) for part in ids)
            examples.append(Encoded(example.row, example.prompt, answers))
        return examples

    def _write_down(self, collected: Collected, step: int) -> None:
        """Every answer into completions.jsonl."""
        rollout, names = collected.rollout, self.collector.judges.names
        advantages = rollout.split("advantages") if "advantages" in rollout.tokens else None
        for i, answer in enumerate(collected.answered):
            self.completions.write(
                {
                    "step": step,
                    "row": answer.row,
                    "prompt": answer.prompt,
                    "completion": answer.completion,
                    "rewards": {name: float(collected.scores[i, k]) for k, name in enumerate(names)},
                    "reward": float(rollout.rewards_S[i]),
                    "advantage": float(advantages[i].mean()) if advantages else None,
                    "tokens": int(rollout.lengths_S[i]),
                    "ended": bool(rollout.ended_S[i]),
                }
            )

    # --- what the step asks -----------------------------------------------------------------

    def counts(self, batch: OnlineBatch) -> dict[str, float]:
        if batch.rollout is None:
            return {"answers": float(len(batch.indices))}
        answers = batch.rollout.answers_of(batch.indices)
        match self.learner.denominator:
            case "tokens":
                return {"tokens": float(batch.rollout.lengths_P[batch.indices].sum())}
            case "budget":
                return {"budget": float(len(answers) * self.longest)}
            case "pairs":
                return {"pairs": len(answers) / 2}
            case name:
                return {name: float(len(answers))}

    def size(self, batch: OnlineBatch) -> int:
        prompts = self.datasets[batch.split].prompt_lengths
        if batch.rollout is None:
            return int(prompts[batch.indices].sum())
        places = batch.indices
        return int(prompts[batch.rollout.rows_P[places]].sum() + batch.rollout.lengths_P[places].sum())

    def describe(self, batch: OnlineBatch) -> list[str]:
        rows = self.datasets[batch.split].rows
        indices = batch.indices if batch.rollout is None else batch.rollout.rows_P[batch.indices]
        return [rows[int(i)] for i in indices]

    def loss(self, batch: OnlineBatch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the step's loss; of an evaluation, minus its share of the mean reward."""
        if batch.rollout is None:
            return self._evaluate(batch, totals)
        with phase("data"):
            forest = build_forest(self._examples(batch)).to(self.policy.device)
        hidden = self.policy.hidden(forest)
        seen = MicroBatch(
            batch.rollout,
            batch.rollout.answers_of(batch.indices),
            forest.owner,
            self._logps(self.policy, hidden, forest),
            None if self.value_head is None else self.value_head(hidden),
        )
        result = self.learner.loss(seen)
        return result.sum / totals[self.learner.denominator], {**result.metrics, **batch.extra}

    def _evaluate(self, batch: OnlineBatch, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        """One greedy answer to each prompt, scored."""
        dataset, collector = self.datasets[batch.split], self.collector
        prompts = [example.prompt for example in self._examples(batch)]
        drawn = collector.engine.sample(prompts, replace(collector.sampling, temperature=0.0))
        pairs = zip(batch.indices, drawn, strict=True)
        answered = [collector.answered(dataset, int(row), group[0]) for row, group in pairs]
        scores = collector.judges.score(answered)
        rollout = Rollout.of(-1, -1, batch.indices, drawn)
        rewards = collector.judges.combine(scores)
        found = {**reward_metrics(rewards[:, None], scores, collector.judges.names), **length_metrics(rollout)}
        kept = {name: pair for name, pair in found.items() if not name.endswith(("std", "min_length", "max_length"))}
        device = self.policy.device
        loss = torch.tensor(-float(np.nansum(rewards)) / totals["answers"], device=device)
        return loss, {name: (torch.tensor(v, dtype=torch.float64, device=device), n) for name, (v, n) in kept.items()}

    # --- files ------------------------------------------------------------------------------

    def save_model(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        """Files that transformers and peft load, and the value head beside them."""
        if self.adapters is not None:
            self.adapters.save(directory, masters)
        else:
            self.policy.base.save_pretrained(directory, max_shard_size="5GB")
        self.tokenizer.save_pretrained(directory)
        if self.value_head is not None:
            self.value_head.save(directory)

    def state_dict(self) -> dict[str, Any]:
        live = self._rollout if self._rollout is not None and not self._used_up else None
        return {
            "learner": self.learner.state_dict(),
            "completions": self.completions.lines,
            "rollout": live.state_dict() if live else None,
            "untold": {name: list(pair) for name, pair in self._untold.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.completions.cut(state["completions"])
        self._rollout = Rollout.from_state(state["rollout"]) if state["rollout"] else None
        untold = {} if self.backend.rank else state.get("untold", {})
        self._untold = {name: (value, count) for name, (value, count) in untold.items()}


def cooled(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by the temperature t: cap · tanh(s x / cap) / t, with cap / t and s / t."""
    if temperature in (0.0, 1.0):
        return head
    softcap = None if head.softcap is None else head.softcap / temperature
    return Head(head.module, head.scale / temperature, softcap)
