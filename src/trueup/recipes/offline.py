"""Runs on fixed data: pre-training, SFT and preference pairs. Builds the parts, hands them to the loop.

Whatever can fail because of the user's config, data or model fails before the output directory is touched.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trueup.config.schema import RunConfig
from trueup.data.chat_template import ChatTemplate
from trueup.data.encode import EncodedDataset, Prepared, prepare
from trueup.data.forest import BatchPlan, build_forest, num_predictions
from trueup.errors import ConfigError
from trueup.models.adapters import Adapters
from trueup.models.load import Loaded, load_frozen, load_policy, load_tokenizer, pick_device
from trueup.models.logprobs import sum_by_sequence
from trueup.models.policy import Policy
from trueup.models.reference import LiveReference, ReferenceTable, table_path
from trueup.objectives import OBJECTIVES, Objective, pairwise
from trueup.training.backend import Backend, make_backend
from trueup.training.loop import fit
from trueup.training.observers import standard_observers
from trueup.training.run_directory import RunDirectory, check_target
from trueup.types import Forest, Metrics, PairLogps, TokenLogps

log = logging.getLogger("trueup")


@dataclass(frozen=True)
class Batch:
    """A micro-batch by name: which examples of which set. Its forest is laid out when it is needed."""

    split: str  # "train" or an evaluation set's name
    indices: np.ndarray  # [B] int64


@dataclass(frozen=True)
class Arithmetic:
    """How rows become steps; what the header and `check` print."""

    examples: int
    rows_per_micro_batch: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    epochs: int
    total_steps: int

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_micro_batch * self.accumulation * self.world_size


def plan_batches(cfg: RunConfig, lengths: np.ndarray, world_size: int = 1) -> tuple[BatchPlan, Arithmetic]:
    """The run's batch plan and its arithmetic.

    Raises:
        ConfigError: the numbers give no step at all (C13).
    """
    train, data = cfg.train, cfg.data
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size
    packing = data.packing if data.packing is not None else cfg.objective.stage == "pt"
    plan = BatchPlan(
        lengths=lengths,
        rows_per_micro_batch=train.per_device_train_batch_size,
        rows_per_step=rows_per_step,
        seed=train.data_seed if train.data_seed is not None else train.seed,
        shuffle=not data.disable_shuffling,
        micro_batch_tokens=data.batch_tokens,
        pack_tokens=data.cutoff_len if packing or data.neat_packing else None,
        drop_last=train.dataloader_drop_last,
    )
    steps_per_epoch = len(plan.steps(0))
    if steps_per_epoch == 0:
        raise ConfigError(
            f"{len(lengths)} rows, {rows_per_step} rows a step "
            f"({train.per_device_train_batch_size} per device × {train.gradient_accumulation_steps} accumulation × "
            f"{world_size} processes) → 0 steps with dataloader_drop_last",
            where="per_device_train_batch_size",
            fix="lower per_device_train_batch_size or gradient_accumulation_steps, or set dataloader_drop_last: false",
        )
    if train.max_steps > 0:
        total = train.max_steps
        epochs = math.ceil(total / steps_per_epoch)
    else:
        total = math.ceil(train.num_train_epochs * steps_per_epoch)
        epochs = math.ceil(train.num_train_epochs)
    sizes = (train.per_device_train_batch_size, train.gradient_accumulation_steps, world_size)
    return plan, Arithmetic(len(lengths), *sizes, steps_per_epoch, epochs, total)


@dataclass(frozen=True)
class RunResult:
    """Where a run left its files, and the metrics of train_results.json and eval_results.json together."""

    output_dir: Path
    metrics: dict[str, float]


def run(cfg: RunConfig, console: Console | None = None) -> RunResult:
    """Train (or only evaluate) as a config says.

    Raises:
        UserError: of the kind that tells who can mend it; see `trueup.errors`.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    console = console or Console(quiet=int(os.environ.get("RANK", "0")) > 0)
    target = dict(resume=cfg.train.resume_from_checkpoint, overwrite=cfg.train.overwrite_output_dir,
                  new_run=cfg.train.new_run, join=not cfg.train.do_train)  # fmt: skip
    check_target(cfg.train.output_dir, **target)
    backend = make_backend(pick_device(cfg.model.device), cfg.train.ddp_timeout)
    try:
        tokenizer = load_tokenizer(cfg.model)
        prepared = prepare(cfg, tokenizer)
        plan, arithmetic = plan_batches(cfg, prepared.train.lengths, backend.world_size)
        loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer, backend.device)
        console.print(prepared.report.render(), markup=False, highlight=False)
        console.print(header(cfg, loaded, prepared, arithmetic), markup=False, highlight=False)
        with RunDirectory.open(
            cfg.train.output_dir,
            cfg.resolved(),
            allow=cfg.train.allow_changed,
            backend=backend,
            **target,
        ) as directory:
            directory.write_json("data_report.json", prepared.report.to_dict())
            datasets = {"train": prepared.train, **prepared.eval}
            objective = objective_of(cfg)
            references = None
            if objective.needs_reference:
                references = build_references(cfg, loaded, datasets, plan, arithmetic, backend)
            program = OfflineProgram(
                cfg, loaded, tokenizer, prepared.template, datasets, plan, arithmetic, objective, references,
                backend.rank, backend.world_size,
            )  # fmt: skip
            result = fit(
                program, cfg.train, directory, backend, standard_observers(cfg.train, directory, quiet=console.quiet),
                data_fingerprint=prepared.train.fingerprint,
            )  # fmt: skip
            return RunResult(directory.path, {**result.train, **result.evaluation})
    finally:
        backend.close()


def header(cfg: RunConfig, loaded: Loaded, prepared: Prepared, arithmetic: Arithmetic) -> str:
    """What is about to run, in a few lines."""
    a = arithmetic
    start = {True: "continuing its adapter", False: "a new adapter on top of"}
    begun = ""
    if loaded.starts:
        how = start[loaded.adapters.continued] if loaded.adapters else "merged with"
        begun = f", {how} {', '.join(loaded.starts)}"
    lines = {
        "model": f"{loaded.base_name}{begun}",
        "training": f"{cfg.tuning.finetuning_type}, {loaded.num_trainable:,} of {loaded.num_parameters:,} parameters",
        "objective": describe_objective(cfg),
        "batch": f"{a.rows_per_micro_batch} × {a.accumulation} accumulation × {a.world_size} processes = "
        f"{a.rows_per_step} rows a step; {a.total_steps:,} steps, {a.epochs} epochs of {a.examples:,} rows",
        "device": f"{loaded.device}, {str(loaded.dtype).removeprefix('torch.')}, prompts "
        + ("not shared: " + loaded.layout_note if loaded.layout_note else "shared"),
        "template": prepared.template.name,
        "output": cfg.train.output_dir,
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def describe_objective(cfg: RunConfig) -> str:
    """The objective and its parameters, as the header shows them."""
    objective = objective_of(cfg)
    settings = objective_parameters(cfg, objective) | (
        {"pref_ftx": cfg.objective.pref_ftx} if cfg.objective.pref_ftx else {}
    )
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{cfg.objective.stage}: {objective.name}" + (f" ({shown})" if shown else "")


class References:
    """Reference log-probabilities of batches: a table on disk, or a live model for those who ask for it."""

    def __init__(self, live: LiveReference | None, tables: dict[str, ReferenceTable]) -> None:
        self.live = live
        self.tables = tables

    def token_logps(self, batch: Batch, forest: Forest) -> Tensor:
        if self.tables:
            return self.tables[batch.split].get(batch.indices)
        assert self.live is not None
        return self.live.token_logps(forest)


class OfflineProgram:
    """What the loop runs (`training.step.Program`): batches of a fixed dataset under one objective."""

    def __init__(
        self,
        cfg: RunConfig,
        loaded: Loaded,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        datasets: dict[str, EncodedDataset],
        plan: BatchPlan,
        arithmetic: Arithmetic,
        objective: Objective,
        references: References | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.policy: Policy = loaded.policy
        self.adapters: Adapters | None = loaded.adapters
        self.tokenizer = tokenizer
        if template.name != "empty":
            # Whoever loads the result renders what was trained, and stops where an answer was taught to end.
            template.attach(tokenizer)
            loaded.policy.base.generation_config.eos_token_id = list(template.stop_ids)
        self.datasets = datasets
        self.plan = plan
        self.objective = objective
        self.parameters = objective_parameters(cfg, objective)
        self.sft_weight = cfg.objective.pref_ftx
        self.references = references
        self.rank, self.world_size = rank, world_size
        self.trainable: dict[str, nn.Parameter] = loaded.policy.trainable()
        self.examples_per_step = arithmetic.rows_per_step
        self.steps_per_epoch = arithmetic.steps_per_epoch
        self.eval_sets = {
            name: [Batch(name, group) for group in eval_batches(cfg, dataset)[rank::world_size]]
            for name, dataset in datasets.items()
            if name != "train"
        }
        self._steps = functools.lru_cache(maxsize=2)(plan.steps)

    def train(self, mode: bool = True) -> None:
        self.policy.model.train(mode)

    def micro_batches(self, epoch: int, step: int) -> list[Batch]:
        units = self._steps(epoch)[step]
        return [Batch("train", group) for group in self.plan.micro_batches(units, self.rank, self.world_size)]

    def counts(self, batch: Batch) -> dict[str, float]:
        if self.objective.denominator == "pairs":
            return {"pairs": float(len(batch.indices))}
        return {"predictions": float(sum(num_predictions(example) for example in self._examples(batch)))}

    def size(self, batch: Batch) -> int:
        return int(self.datasets[batch.split].lengths[batch.indices].sum())

    def describe(self, batch: Batch) -> list[str]:
        return [example.row for example in self._examples(batch)]

    def _examples(self, batch: Batch):
        dataset = self.datasets[batch.split]
        return [dataset[i] for i in batch.indices]

    def loss(self, batch: Batch, totals: dict[str, float]) -> tuple[Tensor, Metrics]:
        """This batch's share of the step's loss, and its metrics."""
        forest = build_forest(self._examples(batch)).to(self.policy.device)
        logps = self.policy.token_logps(forest)
        if self.objective.takes is TokenLogps:
            result = self.objective.function(TokenLogps(logps, forest.owner, forest.num_sequences), **self.parameters)
            return result.sum / totals[self.objective.denominator], result.metrics
        reference = None
        if self.objective.needs_reference:
            assert self.references is not None
            reference = self.references.token_logps(batch, forest).to(logps.device)
        pairs = pair_logps(forest, logps, reference)
        result = self.objective.function(pairs, **self.parameters)
        total, metrics = result.sum, dict(result.metrics)
        if reference is not None:
            metrics["kl"] = kl_to_reference(logps.detach(), reference, forest.num_sequences)
        if self.sft_weight:
            nll = pairwise.chosen_nll(pairs)
            total = total + self.sft_weight * nll
            metrics["sft_loss"] = (
                nll.detach(),
                torch.tensor(float(len(batch.indices)), device=nll.device),
            )
        return total / totals[self.objective.denominator], metrics

    def save_model(self, directory: Path, masters: dict[str, Tensor]) -> None:
        """Files that transformers and peft load: adapter or full weights, and the tokenizer."""
        if self.adapters is not None:
            self.adapters.save(directory, masters)
        else:
            # The module's parameters are the masters in compute dtype, and save_pretrained knows which are tied.
            self.policy.base.save_pretrained(directory, max_shard_size="5GB")
        self.tokenizer.save_pretrained(directory)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def pair_logps(forest: Forest, logps: Tensor, reference: Tensor | None) -> PairLogps:
    """Per-token values of a batch of pairs → sums per side; sequences alternate chosen, rejected."""

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        sums = sum_by_sequence(values, forest.owner, forest.num_sequences)
        return sums[0::2], sums[1::2]

    lengths = sides(torch.ones_like(logps, requires_grad=False))
    if reference is None:
        return PairLogps(*sides(logps), *lengths)
    return PairLogps(*sides(logps), *lengths, *sides(reference))


def kl_to_reference(logps: Tensor, reference: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """(sum, count) of Σ_t (e^d − 1 − d), d = log π_ref − log π, per answer: an estimate on the data, never negative.

    The k3 estimator (Schulman 2020) evaluated on the data's tokens instead of the policy's own samples.
    """
    d = reference - logps
    return (torch.expm1(d) - d).sum(), torch.tensor(float(num_sequences), device=logps.device)


def objective_of(cfg: RunConfig) -> Objective:
    """The registered objective that a stage and `pref_loss` name."""
    stage = cfg.objective.stage
    return OBJECTIVES["sft" if stage in ("pt", "sft") else cfg.objective.pref_loss]


def objective_parameters(cfg: RunConfig, objective: Objective) -> dict[str, Any]:
    """Keyword arguments of the objective's function, from the keys it declares."""
    return {name: getattr(cfg.objective, key) for name, key in objective.parameters.items()}


def eval_batches(cfg: RunConfig, dataset: EncodedDataset) -> list[np.ndarray]:
    """An evaluation set in its own order, in row-count batches."""
    size = cfg.train.per_device_eval_batch_size
    return [np.arange(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)]


def build_references(
    cfg: RunConfig,
    loaded: Loaded,
    datasets: dict[str, EncodedDataset],
    plan: BatchPlan,
    arithmetic: Arithmetic,
    backend: Backend,
) -> References:
    """The reference's log-probabilities for every batch the run will ask about.

    By default they are computed before the first step, in the run's own batches, and kept on disk: full training
    then needs no second copy of the model. `precompute_ref_log_probs: false` runs the reference in every step.
    """
    live = live_reference(cfg, loaded, before_training=cfg.objective.precompute_ref_log_probs)
    if not cfg.objective.precompute_ref_log_probs:
        return References(live, {})
    model_fingerprint = live.fingerprint()
    tables = {}
    for name, dataset in datasets.items():
        sizes = [num_predictions(example) for example in dataset]
        table = ReferenceTable(sizes, table_path(model_fingerprint, dataset.fingerprint))
        batches = train_batches(plan, arithmetic) if name == "train" else iter(eval_batches(cfg, dataset))
        fill_table(table, live, dataset, batches, backend, name)
        tables[name] = table
    return References(None, tables)


def live_reference(cfg: RunConfig, loaded: Loaded, before_training: bool) -> LiveReference:
    """The model that stands for the reference, ready to be run."""
    if cfg.objective.ref_model:
        policy = load_frozen(
            cfg.model,
            cfg.objective.ref_model,
            cfg.objective.ref_model_adapters,
            loaded.device,
            loaded.dtype,
        )
        return LiveReference(policy)
    make = LiveReference.before_training if before_training else LiveReference.of
    return make(loaded.policy, loaded.adapters)


def train_batches(plan: BatchPlan, arithmetic: Arithmetic) -> Iterator[np.ndarray]:
    """Every training micro-batch of the run, over all processes, in order."""
    for step in range(arithmetic.total_steps):
        epoch, position = divmod(step, arithmetic.steps_per_epoch)
        if position == 0:
            steps = plan.steps(epoch)
        yield from plan.micro_batches(steps[position])


def fill_table(
    table: ReferenceTable,
    live: LiveReference,
    dataset: EncodedDataset,
    batches: Iterator[np.ndarray],
    backend: Backend,
    name: str,
) -> None:
    """Compute what the table lacks; the processes share the batches and sum their tables (gaps count as zero)."""
    missing = table.missing(batches)
    if not missing:
        log.info("reference log-probabilities of %s: read from %s", name, table.path)
        return
    rows = sum(len(batch) for batch in missing)
    log.info("reference log-probabilities of %s: computing %d rows once", name, rows)
    gaps = torch.isnan(table.values)
    computed = torch.zeros_like(table.values)
    for batch in missing[backend.rank :: backend.world_size]:
        forest = build_forest([dataset[i] for i in batch])
        table.put(batch, live.token_logps(forest))
    computed[gaps] = torch.nan_to_num(table.values[gaps])
    backend.sum_gradients([computed])
    wanted = table.positions(np.concatenate(missing)) & gaps
    table.values[wanted] = computed[wanted]
    backend.on_first(table.save)
