"""Runs that learn from the policy's own answers: PPO, GRPO, RLOO, online DPO. Builds the parts, hands them to the loop.

Whatever can fail because of the user's config, data, model or rewards fails before the output directory is touched.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared, prepare
from trueup.data.forest import BatchPlan
from trueup.errors import ConfigError
from trueup.models.load import Loaded, load_for_evaluation, load_policy, load_reference, load_tokenizer
from trueup.models.plain import tidy_generation
from trueup.models.reference import LiveReference
from trueup.recipes.batches import answered_tokens, in_layout, plan_batches
from trueup.recipes.boosting import as_begun, tried, write_choice
from trueup.recipes.collector import Collector
from trueup.recipes.evaluation import regression
from trueup.recipes.header import evaluation_header, header
from trueup.recipes.judges import Judges, check_files, load_judges
from trueup.recipes.learners import make_learner
from trueup.recipes.offline import (
    RunResult,
    fit_activations,
    identity_of,
    mind_positions,
    open_directory,
    running,
    stop_at_warnings,
)
from trueup.recipes.online_program import OnlineProgram
from trueup.recipes.predict import make_predictor, predict
from trueup.recipes.prompts import PromptRows, check_prompts
from trueup.recipes.references import check_reference, reference_section
from trueup.recipes.reported import check_metric
from trueup.recipes.weights import show_weights
from trueup.rollout.completions import CompletionsLog
from trueup.rollout.engines import Engine
from trueup.training.backend import Backend
from trueup.training.evaluation import evaluate_run
from trueup.training.loop import fit
from trueup.training.observers import standard_observers
from trueup.training.plan import check_schedule
from trueup.training.run_directory import RunDirectory


def run(cfg: RunConfig, console: Console | None = None) -> RunResult:
    """Train, or only evaluate, as a config says.

    Raises:
        UserError: of the kind that tells who can mend it; see `trueup.errors`.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    with running(cfg, console) as (backend, console):
        return train(cfg, backend, console) if cfg.train.do_train else evaluate(cfg, backend, console)


def train(cfg: RunConfig, backend: Backend, console: Console) -> RunResult:
    """A run that trains, and evaluates if it is asked to."""
    check_schedule(cfg.train)
    set_seed(cfg.train.seed)
    check_files(cfg)
    with stop_at_warnings(cfg.train.strict):
        tokenizer = load_tokenizer(cfg.model)
        check_reference(cfg, tokenizer)
        prepared = prepare(cfg, tokenizer)
        check_prompts(prepared)
        check_metric(cfg, prepared.eval)
        cfg = as_begun(cfg)
        plan, arithmetic = plan_batches(cfg, prepared.train.lengths, backend.world_size)
        loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer, backend.device)
        rows = PromptRows(cfg)
        plan = in_layout(plan, prepared.train, loaded.policy.shared)
        tokens = answered_tokens(cfg, prepared.train, plan, arithmetic.epochs)
        cfg, choice = tried(cfg, loaded, backend)
        fit_activations(cfg, loaded, tokens)
        mind_positions(cfg, loaded)
        predictor = make_predictor(cfg, loaded, tokenizer, prepared)
        judges = load_judges(cfg, prepared.template, rows, loaded.device, loaded.dtype)
    try:
        console.print(prepared.report.render(), markup=False, highlight=False)
        console.print(header(cfg, loaded, prepared, arithmetic, tokens), markup=False, highlight=False)
        show_weights(cfg, loaded.policy.model, console)
        identity = identity_of(cfg, prepared.train.fingerprint, plan)
        with open_directory(cfg, backend, prepared, identity) as directory:
            write_choice(directory, choice)
            program = make_program(cfg, loaded, tokenizer, prepared, plan, judges, rows, backend, directory)
            observers = standard_observers(cfg.train, directory, quiet=console.quiet)
            started = regression.begin(cfg, loaded.policy, tokenizer, prepared, backend)
            torch.manual_seed(cfg.train.seed + backend.rank)
            result = fit(program, cfg.train, directory, backend, observers, identity=identity)
            ended = regression.end(started, directory, console)
            predicted = predict(predictor, directory, backend, console) if predictor else {}
            return RunResult(directory.path, {**result.train, **result.evaluation, **ended, **predicted})
    finally:
        judges.close()


def evaluate(cfg: RunConfig, backend: Backend, console: Console) -> RunResult:
    """A run that only asks what the answers of a model to held-out prompts are worth."""
    check_files(cfg)
    with stop_at_warnings(cfg.train.strict):
        tokenizer = load_tokenizer(cfg.model)
        prepared = prepare(cfg, tokenizer)
        loaded = load_for_evaluation(cfg.model, cfg.train, tokenizer, backend.device)
        rows = PromptRows(cfg)
        predictor = make_predictor(cfg, loaded, tokenizer, prepared)
        judges = load_judges(cfg, prepared.template, rows, loaded.device, loaded.dtype)
    if not prepared.eval or not judges.rewards:
        raise ConfigError(
            "there is nothing to evaluate", where="eval_dataset",
            fix="set eval_dataset, or dataset with val_size, and reward_funcs or reward_model",
        )  # fmt: skip
    console.print(prepared.report.render(), markup=False, highlight=False)
    console.print(evaluation_header(cfg, loaded, prepared), markup=False, highlight=False)
    try:
        with open_directory(cfg, backend, prepared) as directory:
            no_steps = BatchPlan(np.zeros(0, dtype=np.int64), 1, 1, cfg.train.seed)
            program = make_program(cfg, loaded, tokenizer, prepared, no_steps, judges, rows, backend, directory)
            observers = standard_observers(cfg.train, directory, quiet=console.quiet)
            metrics = evaluate_run(program, directory, backend, observers)
            if predictor:
                metrics |= predict(predictor, directory, backend, console)
            return RunResult(directory.path, metrics)
    finally:
        judges.close()


def make_program(
    cfg: RunConfig,
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    plan: BatchPlan,
    judges: Judges,
    rows: PromptRows,
    backend: Backend,
    directory: RunDirectory,
) -> OnlineProgram:
    """The parts put together."""
    template = prepared.template
    template.attach(tokenizer)  # whoever loads the result renders what was trained, and stops where it stopped
    tidy_generation(loaded.policy.base, template.stop_ids)
    engine = Engine(loaded.policy, tokenizer, template.stop_ids)
    online = cfg.online
    learner = make_learner(cfg, judges, backend, on_policy=online.ppo_buffer_size * (online.ppo_epochs or 1) == 1)
    reference = _reference(cfg, loaded) if "reference" in learner.wants and cfg.train.do_train else None
    completions = CompletionsLog(directory.path, directory.append, directory.writer)
    if cfg.train.do_train and directory.checkpoint is None:
        completions.cut(0)
    collector = Collector(cfg, engine, judges, rows, backend)
    return OnlineProgram(cfg, loaded, prepared, plan, collector, learner, reference, backend, completions)


def _reference(cfg: RunConfig, loaded: Loaded) -> LiveReference:
    """The policy as it stands now, before the first step, or `ref_model`."""
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        return LiveReference(load_reference(reference_section(cfg), *names, loaded.device, loaded.dtype))
    return LiveReference.of(loaded.policy, loaded.adapters)
