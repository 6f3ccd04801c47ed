"""`trueup check`: everything short of loading weights. What passes here fails later only for want of memory."""

from __future__ import annotations

import functools
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared, prepare
from trueup.models.booster import check_booster
from trueup.models.device_memory import free_memory
from trueup.models.estimate import Estimate, estimate, shape_only
from trueup.models.load import load_tokenizer, pick_device
from trueup.models.vocabulary import check_vocabulary, fit_vocabulary
from trueup.quantities import sized
from trueup.recipes.batches import Arithmetic, Tokens, answered_tokens, count_tokens, eval_batches, plan_batches
from trueup.recipes.budget import settled
from trueup.recipes.header import batch_words, memory_words, steps_words, tokens_words
from trueup.recipes.judges import check_files
from trueup.recipes.offline import check_output
from trueup.recipes.prompts import check_prompts
from trueup.recipes.references import check_reference, reference_bytes
from trueup.recipes.remedies import Remedy, remedies
from trueup.recipes.reported import check_metric
from trueup.recipes.reward import kind_of, teachable
from trueup.training.plan import check_schedule


@dataclass(frozen=True)
class CheckReport:
    """What a run would do, without doing it."""

    cfg: RunConfig
    prepared: Prepared
    arithmetic: Arithmetic
    tokens: Tokens | None  # None where nothing trains, or the model writes the answers itself
    estimate: Estimate
    memory_free: int
    disk_free: int
    disk_needed: int
    remedies: list[Remedy] = field(default_factory=list)  # where it does not fit

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.cfg.resolved(),
            "template": self.prepared.template.name,
            "data": self.prepared.report.to_dict(),
            "steps": asdict(self.arithmetic) | {"rows_per_step": self.arithmetic.rows_per_step},
            "tokens": asdict(self.tokens) if self.tokens else None,
            "estimate": self.estimate.to_dict(),
            "memory_free": self.memory_free,
            "disk_free": self.disk_free,
            "disk_needed": self.disk_needed,
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }

    def render(self) -> str:
        return "\n".join([self.prepared.report.render(), "", *self._summary()])

    def _summary(self) -> list[str]:
        e, a = self.estimate, self.arithmetic
        sharing = a.world_size if e.device == "cpu" else 1  # processes in one memory
        each = " a process" if a.world_size > 1 else ""
        fits = (
            "fits"
            if e.memory * sharing <= self.memory_free
            else "does NOT fit" + ("" if self.remedies else ": lower cutoff_len, or take a smaller model")
        )
        room = "fits" if self.disk_needed <= self.disk_free else "does NOT fit: set save_total_limit or save_only_model"
        return [
            f"model     {self.cfg.model.model_name_or_path}: {e.parameters:,} parameters, {e.trainable:,} trained "
            f"({self.cfg.tuning.finetuning_type})",
            f"template  {self.prepared.template.name}",
            *([f"batch     {batch_words(a)}", f"steps     {steps_words(a)}"] if a.total_steps else []),
            *([f"tokens    {tokens_words(self.tokens, a)}"] if self.tokens else []),
            f"memory    ~{sized(e.memory)}{each} on {e.device} in {e.dtype}: weights {sized(e.weights)}, "
            f"optimizer {sized(e.optimizer)},",
            f"          activations {sized(e.activations)}, head {sized(e.head)}"
            f"{f', reference {sized(e.reference)}' if e.reference else ''}; "
            f"free {sized(self.memory_free)} → {fits}",
            *([f"          {memory_words(e.recomputation)}"] if a.total_steps else []),
            *(
                f"          with {remedy.change}: ~{sized(remedy.memory)}{', which fits' if remedy.fits else ''} "
                f"({remedy.price})"
                for remedy in self.remedies
            ),
            *(
                [f"disk      ~{sized(self.disk_needed)} of checkpoints; free {sized(self.disk_free)} → {room}"]
                if self.disk_needed
                else []
            ),
        ]


def check(cfg: RunConfig, world_size: int = 1) -> CheckReport:
    """Validate data, template, sizes and needs of a config, for so many processes.

    Raises:
        ConfigError, DataError, ModelError: whatever would stop the run before its first step.
    """
    check_output(cfg)
    if cfg.train.do_train:
        check_schedule(cfg.train)
    if cfg.objective.stage in ONLINE:
        check_files(cfg)
    check_booster(cfg.model.booster, pick_device(cfg.model.device))
    tokenizer = load_tokenizer(cfg.model)
    check_reference(cfg, tokenizer)
    base = shape_only(cfg, kind_of(cfg))
    new_rows = fit_vocabulary(base, cfg.model, tokenizer)
    check_vocabulary(base, tokenizer, str(cfg.model.model_name_or_path))
    prepared = prepare(cfg, tokenizer)
    if cfg.objective.stage == "rm":
        prepared = teachable(cfg, prepared)
    if cfg.objective.stage in ONLINE:
        check_prompts(prepared)
    check_metric(cfg, prepared.eval)
    if cfg.train.do_train:
        cfg = settled(cfg)
        plan, arithmetic = plan_batches(cfg, prepared.train.lengths, world_size)
        count = functools.partial(answered_tokens, cfg) if cfg.objective.stage in ONLINE else count_tokens
        tokens = count(prepared.train, plan, arithmetic.epochs)
        largest = tokens.largest
        tokens = None if arithmetic.streamed else tokens
        if tokens and not tokens.at_most:
            prepared.report.epoch_tokens = tokens.by_layout
    else:  # an evaluation has no steps and saves nothing
        arithmetic = Arithmetic(0, cfg.train.per_device_eval_batch_size, 1, world_size, 0, 0, 0)
        tokens = None
        groups = [(dataset, group) for dataset in prepared.eval.values() for group in eval_batches(cfg, dataset)]
        largest = max((int(dataset.lengths[group].sum()) for dataset, group in groups), default=0)
    needs = estimate(cfg, base, largest, kind_of(cfg), functools.partial(reference_bytes, cfg), new_rows)
    free = free_memory(torch.device(needs.device))
    each = free // (world_size if needs.device == "cpu" else 1)
    ways = remedies(cfg, largest, each) if needs.memory > each and cfg.train.do_train else []
    return CheckReport(
        cfg, prepared, arithmetic, tokens, needs, free,
        _free_disk(cfg.train.output_dir),
        needs.checkpoint * kept_checkpoints(cfg, arithmetic) if cfg.train.do_train else 0, ways,
    )  # fmt: skip


def kept_checkpoints(cfg: RunConfig, arithmetic: Arithmetic) -> int:
    """How many checkpoints lie on disk at the worst moment: the limit plus the one being written."""
    train = cfg.train
    if train.save_strategy == "no":
        return 1
    interval = train.save_steps if train.save_strategy == "steps" else arithmetic.steps_per_epoch
    interval = interval * arithmetic.total_steps if interval < 1 else interval
    written = int(arithmetic.total_steps // max(interval, 1)) + 1
    return min(written, train.save_total_limit + 1) if train.save_total_limit else written


def _free_disk(output_dir: str) -> int:
    path = Path(output_dir).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
