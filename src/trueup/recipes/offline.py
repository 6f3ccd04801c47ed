"""Runs on fixed data: pre-training, SFT, preferences and reward models. Builds the parts, hands them to the loop.

Whatever can fail because of the user's config, data or model fails before the output directory is touched.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import set_seed

from trueup.config.methods import needs_reference, stage_kind
from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset, Prepared, prepare
from trueup.data.forest import BatchPlan
from trueup.errors import ConfigError, Problem
from trueup.models.device_memory import free_memory
from trueup.models.load import Loaded, load_for_evaluation, load_policy, load_tokenizer, pick_device
from trueup.models.memory import fit_to_memory
from trueup.models.reward import RewardModel, check_trained
from trueup.models.rope import varies_beyond
from trueup.models.tokenizer import descriptions_of
from trueup.recipes.batches import Tokens, count_tokens, eval_batches, in_layout, plan_batches, train_batches
from trueup.recipes.boosting import as_begun, tried, write_choice
from trueup.recipes.budget import settled
from trueup.recipes.evaluation import regression
from trueup.recipes.feed import watched, write_report
from trueup.recipes.feedback import tell_balance
from trueup.recipes.header import evaluation_header, header
from trueup.recipes.predict import make_predictor, predict
from trueup.recipes.program import OfflineProgram
from trueup.recipes.references import References, build_references, check_reference, reference_bytes
from trueup.recipes.reported import check_metric
from trueup.recipes.reward import kind_of, teachable
from trueup.recipes.weights import show_weights
from trueup.rollout.worker import file_and_function
from trueup.training.backend import Backend, make_backend
from trueup.training.checkpoint import json_hash
from trueup.training.evaluation import evaluate_run
from trueup.training.loop import fit
from trueup.training.observers import standard_observers
from trueup.training.plan import check_schedule
from trueup.training.profile import phase, profiling
from trueup.training.run_directory import RunDirectory, check_target
from trueup.training.signals import StopRequest, sigterm_cleans_up
from trueup.training.watchdog import Watchdog

log = logging.getLogger("trueup")


@dataclass(frozen=True)
class RunResult:
    """Where a run left its files, and the metrics of train_results.json and eval_results.json together."""

    output_dir: Path
    metrics: dict[str, float]


def run(cfg: RunConfig, console: Console | None = None) -> RunResult:
    """Train, or only evaluate, as a config says.

    Raises:
        UserError: of the kind that tells who can mend it; see `trueup.errors`.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    with running(cfg, console) as (backend, console):
        return train(cfg, backend, console) if cfg.train.do_train else evaluate(cfg, backend, console)


@contextmanager
def running(cfg: RunConfig, console: Console | None = None) -> Iterator[tuple[Backend, Console]]:
    """What every recipe stands on: a directory that may be used, processes that know each other, an orderly end."""
    console = console or Console()
    console.quiet |= os.environ.get("RANK", "0") != "0"
    check_output(cfg)
    if cfg.train.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    backend = make_backend(pick_device(cfg.model.device), cfg.train.ddp_timeout)
    try:
        with sigterm_cleans_up(), profiling(cfg.train.profile, backend.device):
            yield backend, console
    finally:
        backend.close()


def train(cfg: RunConfig, backend: Backend, console: Console) -> RunResult:
    """A run that trains, and evaluates if it is asked to."""
    check_schedule(cfg.train)
    set_seed(cfg.train.seed)
    with stop_at_warnings(cfg.train.strict), phase("loading"):
        tokenizer = load_tokenizer(cfg.model)
        check_reference(cfg, tokenizer)
        prepared = prepare(cfg, tokenizer)
        check_metric(cfg, prepared.eval)
        if stage_kind(cfg) == "feedback":
            tell_balance(cfg, prepared.train)
        if cfg.objective.stage == "rm":
            prepared = teachable(cfg, prepared)
        cfg, free = as_begun(cfg), free_memory(backend.device)
        loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer, backend.device, kind_of(cfg))
        cfg, choice = tried(cfg, loaded, backend)
        cfg = settled(cfg, backend, free)
        plan, arithmetic = plan_batches(cfg, prepared.train.lengths, backend.world_size)
        plan = in_layout(plan, prepared.train, loaded.policy.shared)
        tokens = count_tokens(prepared.train, plan, arithmetic.epochs)
        if not arithmetic.streamed:
            prepared.report.epoch_tokens = tokens.by_layout
        fit_activations(cfg, loaded, tokens)
        mind_positions(cfg, loaded)
        predictor = make_predictor(cfg, loaded, tokenizer, prepared)
    console.print(prepared.report.render(), markup=False, highlight=False)
    told = None if arithmetic.streamed else tokens
    console.print(header(cfg, loaded, prepared, arithmetic, told), markup=False, highlight=False)
    show_weights(cfg, loaded.policy.model, console)
    fingerprint = prepared.stream.fingerprint if prepared.stream else prepared.train.fingerprint
    identity = identity_of(cfg, fingerprint, plan)
    with open_directory(cfg, backend, prepared, identity) as directory:
        write_choice(directory, choice)
        batches = {"train": train_batches(plan, arithmetic), **_eval_batches(cfg, prepared)}
        datasets = {"train": prepared.train, **prepared.eval}
        references = _references(cfg, loaded, datasets, batches, backend, directory)
        asked = predictor if cfg.train.predict_with_generate else None
        program = OfflineProgram(cfg, loaded, tokenizer, prepared, plan, references, backend, asked)
        observers = standard_observers(cfg.train, directory, quiet=console.quiet)
        started = regression.begin(cfg, loaded.policy, tokenizer, prepared, backend)
        torch.manual_seed(cfg.train.seed + backend.rank)  # processes drop different entries; a resume restores its own
        with watched(prepared, directory) as watchers:
            observers += watchers
            result = fit(program, cfg.train, directory, backend, observers, identity=identity)
        ended = regression.end(started, directory, console)
        predicted = predict(predictor, directory, backend, console) if predictor and cfg.train.do_predict else {}
        return RunResult(directory.path, {**result.train, **result.evaluation, **ended, **predicted})


def evaluate(cfg: RunConfig, backend: Backend, console: Console) -> RunResult:
    """A run that only evaluates a model, or a model with its adapters, on held-out data, or answers such data."""
    with stop_at_warnings(cfg.train.strict):
        tokenizer = load_tokenizer(cfg.model)
        check_reference(cfg, tokenizer)
        prepared = prepare(cfg, tokenizer)
        if cfg.objective.stage == "rm":
            prepared = teachable(cfg, prepared)
        loaded = load_for_evaluation(cfg.model, cfg.train, tokenizer, backend.device, kind_of(cfg))
        if isinstance(loaded.policy, RewardModel):
            check_trained(loaded.policy, loaded.base_name)
        predictor = make_predictor(cfg, loaded, tokenizer, prepared)
    if not prepared.eval:
        raise ConfigError(
            "there is nothing to evaluate on", where="eval_dataset", fix="set eval_dataset, or dataset with val_size"
        )
    console.print(prepared.report.render(), markup=False, highlight=False)
    console.print(evaluation_header(cfg, loaded, prepared), markup=False, highlight=False)
    with open_directory(cfg, backend, prepared) as directory:
        metrics: dict[str, float] = {}
        if cfg.train.do_eval:
            references = _references(cfg, loaded, prepared.eval, _eval_batches(cfg, prepared), backend, directory)
            no_steps = BatchPlan(np.zeros(0, dtype=np.int64), 1, 1, cfg.train.seed)
            asked = predictor if cfg.train.predict_with_generate else None
            program = OfflineProgram(cfg, loaded, tokenizer, prepared, no_steps, references, backend, asked)
            observers = standard_observers(cfg.train, directory, quiet=console.quiet)
            metrics = evaluate_run(program, directory, backend, observers)
        if predictor and cfg.train.do_predict:
            metrics |= predict(predictor, directory, backend, console)
        return RunResult(directory.path, metrics)


def fit_activations(cfg: RunConfig, loaded: Loaded, tokens: Tokens) -> None:
    """Let as many layers recompute as `gradient_checkpointing` asks, with the reference beside the model in mind."""
    base = loaded.policy.base
    reserved = reference_bytes(cfg, base, loaded.dtype)
    loaded.recomputation = fit_to_memory(base, cfg.tuning, cfg.train, tokens.largest, reserved, cfg.model.booster)


def mind_positions(cfg: RunConfig, loaded: Loaded) -> None:
    """Say where a model of a published kind reads a row otherwise beside a longer one."""
    length = varies_beyond(loaded.policy.base)
    if length is not None and cfg.data.cutoff_len > length:
        log.warning(
            "this model reads all rows of a micro-batch otherwise once one of them has more than %d tokens; those "
            "beside it are learnt otherwise than they will be read alone, which cutoff_len: %d avoids", length, length,
        )  # fmt: skip


def identity_of(cfg: RunConfig, data: str, plan: BatchPlan) -> dict[str, Any]:
    """What a checkpoint to resume from has to agree with beside the keys.

    Descriptions of new tokens say which tokens there are, and what their rows were before the first step: in the
    reference they still are that. Files of reward functions and of a judge by their contents; modules they import are
    not looked at.

    Args:
        data: fingerprint of the encoded training data.
    """
    found = {"data_fingerprint": data, "effective_batch": plan.rows_per_step}
    if words := descriptions_of(cfg.model):
        acting = list(words) if cfg.model.init_special_tokens == "noise_init" else list(words.items())
        found["new_special_tokens_config"] = f"contents {json_hash({'words': acting})[:16]}"
    for key, names in (("reward_funcs", cfg.online.reward_funcs), ("judge", [cfg.online.judge or ""])):
        files = [Path(file) for name in names if (file := file_and_function(name)[0])]
        if code := [file.read_bytes() for file in files if file.is_file()]:
            found[key] = f"contents {hashlib.sha256(b'|'.join(code)).hexdigest()[:16]}"
    return found


@contextmanager
def open_directory(
    cfg: RunConfig, backend: Backend, prepared: Prepared, identity: Mapping[str, Any] | None = None
) -> Iterator[RunDirectory]:
    """The run's directory, locked, with the data report in it. `identity` is what a checkpoint to
    resume from has to agree with.
    """
    with RunDirectory.open(
        cfg.train.output_dir,
        cfg.resolved(),
        allow=cfg.train.allow_changed,
        identity=identity,
        backend=backend,
        **_target(cfg),
    ) as directory:
        write_report(directory, prepared.report, "data_report" if cfg.train.do_train else "eval_data_report")
        yield directory


def check_output(cfg: RunConfig) -> None:
    """Whether the run may use its output directory; ConfigError (C15) if not."""
    check_target(cfg.train.output_dir, **_target(cfg))


def _target(cfg: RunConfig) -> dict:
    return {
        "resume": cfg.train.resume_from_checkpoint,
        "overwrite": cfg.train.overwrite_output_dir,
        "new_run": cfg.train.new_run,
        "join": not cfg.train.do_train,
    }


def _eval_batches(cfg: RunConfig, prepared: Prepared) -> dict[str, list[np.ndarray]]:
    return {name: eval_batches(cfg, dataset) for name, dataset in prepared.eval.items()}


def _references(
    cfg: RunConfig,
    loaded: Loaded,
    datasets: Mapping[str, EncodedDataset],
    batches: Mapping[str, Iterable[np.ndarray]],
    backend: Backend,
    directory: RunDirectory,
) -> References | None:
    """The reference's log-probabilities, if the objective takes them. Raises Stopped after a signal."""
    if not needs_reference(cfg):
        return None
    with StopRequest() as stop, Watchdog(directory) as watchdog, phase("reference table"):

        def asked_to_stop() -> bool:
            watchdog.beat()
            directory.heartbeat()
            return stop()

        references = build_references(cfg, loaded, datasets, batches, backend, asked_to_stop)
        if references is None:
            what = "stopped while the reference's log-probabilities were computed; those computed so far are kept"
            raise stop.stopped(backend, what, str(directory.path), "the same command goes on from there")
        return references


@contextmanager
def stop_at_warnings(strict: bool) -> Iterator[None]:
    """With `strict: true`, whatever was worth a warning while preparing is an error, all of it at once.

    Raises:
        ConfigError: with every warning as a problem.
    """
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("trueup")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if strict and warnings:
        raise ConfigError([Problem(text, where="strict: true") for text in dict.fromkeys(warnings)])
