"""The training loop, blind to the objective: steps, logs, evaluations, checkpoints, and an orderly
end.

What a step trains on follows from the number of steps done, so a resume needs no skipping;
everything else that influences the numbers is in the checkpoint (`state.py`).
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import psutil
import torch

from trueup.errors import ConfigError
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training import state as states
from trueup.training.backend import Backend
from trueup.training.checkpoint import Checkpoint
from trueup.training.compatibility import check_identity
from trueup.training.environment import describe_environment
from trueup.training.evaluation import evaluate_sets, metric_name
from trueup.training.events import (
    Ended,
    Evaluated,
    EvaluationProgress,
    Logged,
    Observer,
    Observers,
    Saved,
    Started,
    Stepped,
)
from trueup.training.metrics import MetricSums, means
from trueup.training.optim import MasterOptimizer
from trueup.training.plan import make_plan
from trueup.training.profile import phase, profiling
from trueup.training.run_directory import METRICS_FILE, RUN_FILE, RunDirectory, read_metrics
from trueup.training.signals import Stopped, StopRequest
from trueup.training.state import Progress, RankState
from trueup.training.step import B, KnowsHeads, NotFinite, Program, StartsInFp32, StepResult, train_step
from trueup.training.watchdog import Watchdog

#: Fields of metrics.jsonl that depend on the clock or the machine; all others are the same to the
#: bit on a resume.
WALL_CLOCK = frozenset({"time", "seconds", "tokens_per_second", "memory_gb", "eval_runtime", "eval_samples_per_second"})


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `train` and `evaluation` are what train_results.json and eval_results.json
    hold.
    """

    steps: int
    total_steps: int
    early_stopped: bool
    train: Mapping[str, float]
    evaluation: Mapping[str, float]
    best_metric: float | None
    best_checkpoint: Path | None


def fit(
    program: Program[B],
    settings: Any,
    run: RunDirectory,
    backend: Backend,
    observers: Sequence[Observer] = (),
    *,
    identity: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train to the end of the plan, from the run's checkpoint if it has one; save the final model.

    settings  the train section (transformers' TrainingArguments names)
    identity  what a resume has to agree with beside the keys: the data's fingerprint, contents of named files

    Raises Stopped after a signal (a checkpoint is saved), DivergenceError before a step on numbers
    that are not finite, ResourceError when the disk refuses, CorruptStateError when the checkpoint
    does not fit.
    """
    with StopRequest() as stop, Watchdog(run) as watchdog, profiling(settings.profile, backend.device):
        trainer = Trainer(program, settings, run, backend, observers, stop, watchdog, identity)
        try:
            return trainer.train()
        except BaseException as error:
            if not trainer.finished:
                trainer.tell_end(_end_state(error))
            raise
        finally:
            trainer.optimizer.close()


class Trainer(Generic[B]):
    """The parts of one run, and the loop over them. All ranks run it; only rank 0 writes."""

    def __init__(
        self,
        program: Program[B],
        settings: Any,
        run: RunDirectory,
        backend: Backend,
        observers: Sequence[Observer],
        stop: StopRequest,
        watchdog: Watchdog,
        identity: Mapping[str, Any] | None,
    ) -> None:
        self.program, self.settings, self.run, self.backend = program, settings, run, backend
        self.observers = Observers(observers if backend.rank == 0 else ())
        self.stop, self.watchdog = stop, watchdog
        self.plan = make_plan(settings, program.steps_per_epoch)
        if settings.offload_optimizer and backend.world_size > 1:
            raise ConfigError(
                "`offload_optimizer` sums no gradients between processes", where="offload_optimizer",
                fix="train on one GPU, or drop it: optim: paged_adamw_8bit keeps small moments that can leave a GPU",
            )  # fmt: skip
        heads = program.head_elements if isinstance(program, KnowsHeads) else None
        self.optimizer = MasterOptimizer.from_settings(program.trainable, settings, self.plan.total_steps, heads)
        if isinstance(program, StartsInFp32):
            self.optimizer.start_from(program.masters)
        self.sums = MetricSums(backend.device)
        self.progress = Progress()
        self.identity = {
            "config_hash": checkpoints.json_hash(run.config),
            **(identity or {}),
            "effective_batch": program.examples_per_step,
        }
        self.saved: list[Checkpoint] = []  # verified by this process; rank 0 only
        self.saved_step = -1
        self.begun_at = 0
        self.finished = False
        self.last_step: StepResult | None = None
        self.learning_rate = self.optimizer.learning_rate  # of the last step
        self.last_evaluation: dict[str, float] = {}
        self.clock = IntervalClock()
        self.run_clock = IntervalClock()

    def train(self) -> FitResult:
        """The whole run. A turn first does what is due after the last step, then the next step."""
        self._begin()
        plan, progress = self.plan, self.progress
        while True:
            improved = progress.evaluation_due and self._evaluate()
            ending = progress.early_stopped or progress.step >= plan.total_steps
            if ending:
                self._log_the_rest()
            if plan.saves(progress.step, ending):
                self._save("schedule")
            elif improved and plan.saves_best:
                self._save("schedule" if plan.saving.strategy == "best" else "best")
            if ending and not progress.evaluation_due:
                return self._finish()
            self._stop_if_asked()
            self._step()
            if plan.logs(progress.step):
                self._log()
            progress.evaluation_due = self._evaluates()

    def tell_end(self, state: str, results: Mapping[str, float] | None = None) -> None:
        """Tell the observers that it is over."""
        event = Ended(state, self.progress.step, self.plan.total_steps, results or {})
        self.observers.tell(event)

    # --- beginning ---------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.run.checkpoint is None:
            self.backend.copy_from_first(self.optimizer.all_tensors())
            self.optimizer.publish()
            self.progress.evaluation_due = self._evaluates()
        else:
            self._resume(self.run.checkpoint)
        self.begun_at = self.progress.step
        self.program.train(True)
        if self.plan.evaluation.strategy != "no" and not self.program.eval_sets:
            self.run.warn("eval_strategy is set, but there is nothing to evaluate on")
        self.run.write_json("environment.json", describe_environment())
        self.run.status(
            state="running",
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            world_size=self.backend.world_size,
        )
        self.observers.tell(
            Started(
                self.run.path,
                str(self.settings.run_name or self.run.path.name),
                self.run.config,
                self.progress.step,
                self.plan.total_steps,
                self.plan.steps_per_epoch,
            )
        )
        self.clock.reset()
        self.run_clock.reset()

    def _resume(self, checkpoint: Checkpoint) -> None:
        where = str(checkpoint.path)
        check_identity(checkpoint.manifest, self.identity, self.run.allow, where=where)
        self.progress, program_state = states.restore(checkpoint.path, self.optimizer, self.sums, self.backend)
        self.program.load_state_dict(program_state)
        self.run.write_config()
        self.run.truncate_logs(self.progress.step, self.progress.lines)
        self.run.set_later_checkpoints_aside(self.progress.step)
        self.backend.barrier()
        if checkpoint.path.parent.resolve() == self.run.path.resolve():
            self.saved_step = checkpoint.step
            if self.run.writer:
                self.saved = checkpoints.all_valid(self.run.path)
                self._retain()  # what was killed between the save and this

    # --- a step ------------------------------------------------------------------------------

    def _step(self) -> None:
        progress = self.progress
        self.learning_rate = self.optimizer.learning_rate
        try:
            result = train_step(self.program, self.optimizer, self.backend, progress.step, self.sums, progress.pieces)
        except NotFinite as error:
            self._record_divergence(error)
            raise
        if result.pieces > progress.pieces:
            self._tell_pieces(result.pieces)
        progress.step += 1
        progress.num_tokens += result.tokens
        progress.loss_sum += result.loss
        self.clock.count(result.tokens)
        self.run_clock.count(result.tokens)
        self.watchdog.beat()
        self.run.heartbeat(step=progress.step, epoch=self.plan.epoch(progress.step))
        self.last_step = result
        self.observers.tell(Stepped(progress.step))

    def _tell_pieces(self, pieces: int) -> None:
        self.progress.pieces = pieces
        self.run.warn(
            f"out of memory at step {self.progress.step + 1}: from here on each micro-batch is computed in {pieces} "
            "pieces, at the same effective batch; a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps does the same from the start",
            self.progress.step + 1,
        )

    def _log_the_rest(self) -> None:
        """After an early stop: the steps since the last row."""
        if self.sums and self.last_step and self.plan.logging.strategy != "no":
            self._log()

    def _log(self) -> None:
        assert self.last_step is not None
        metrics = means(self.backend.sum_metrics(self.sums.read()))
        self.sums.clear()
        row = {
            **self._where(),
            "loss": metrics.pop("loss"),
            "grad_norm": self.last_step.grad_norm,
            "learning_rate": self.learning_rate,
            **metrics,
            "num_tokens": self.progress.num_tokens,
            **self.clock.lap(),
            "memory_gb": memory_gb(self.backend.device),
        }
        if self.optimizer.loss_scale is not None:
            row["loss_scale"] = self.optimizer.loss_scale.scale
        self.run.append(METRICS_FILE, row)
        self.run.status(metrics=row)
        self.observers.tell(Logged(self.progress.step, row))

    def _where(self) -> dict[str, Any]:
        step = self.progress.step
        return {"step": step, "epoch": self.plan.epoch(step), "time": round(time.time(), 3)}

    def _record_divergence(self, error: NotFinite) -> None:
        """Write down the rows, and name the last good checkpoint in the message."""
        good = self.saved[-1].path.name if self.saved else None
        self.run.write_json(
            "divergence.json",
            {
                "step": error.step,
                "loss": error.result.loss,
                "grad_norm": error.result.grad_norm,
                "rows": error.rows,
                "last_good_checkpoint": good,
            },
        )
        error.naming(f"the last good checkpoint is {good}" if good else "nothing was saved yet")

    # --- evaluation --------------------------------------------------------------------------

    def _evaluates(self) -> bool:
        return bool(self.program.eval_sets) and self.plan.evaluates(self.progress.step)

    def _evaluate(self) -> bool:
        """Evaluate every set; True when metric_for_best_model improved. A signal leaves it due."""
        row = self._evaluate_sets()
        if row is None:
            return False
        self.progress.evaluation_due = False
        self.progress.evaluated_step = self.progress.step
        self.last_evaluation = row | {"epoch": self.plan.epoch(self.progress.step)}
        improved = self._judge(row)
        row = {**self._where(), **row}
        self.run.append(METRICS_FILE, row)
        self.observers.tell(Evaluated(self.progress.step, row, improved))
        self.clock.reset_time()
        return improved

    def _evaluate_sets(self) -> dict[str, float] | None:
        """`eval_…` metrics of all sets; None after a signal."""

        def tell(done: int, total: int) -> None:
            self.observers.tell(EvaluationProgress(self.progress.step, done, total))

        with phase("evaluation"), self.optimizer.averaged():
            return evaluate_sets(self.program, self.backend, self._asked_to_stop, tell)

    def _judge(self, row: Mapping[str, float]) -> bool:
        """Keep the best metric, and count evaluations without improvement."""
        progress = self.progress
        name = metric_name(self.settings.metric_for_best_model, row)
        value, best = row[name], progress.best_metric
        higher = self.settings.greater_is_better
        if higher is None:
            higher = not name.endswith("loss")  # as transformers
        better = best is None or math.isnan(best) or (value > best if higher else value < best)
        improved = better and not math.isnan(value)
        if improved:
            progress.best_metric, progress.best_step = value, progress.step
            progress.evaluations_without_improvement = 0
        else:
            progress.evaluations_without_improvement += 1
        patience = self.settings.early_stopping_steps
        if patience and progress.evaluations_without_improvement >= patience:
            progress.early_stopped = True
        self.optimizer.schedule.see(value)
        return improved

    def _asked_to_stop(self) -> bool:
        self.watchdog.beat()
        return self.stop()

    # --- saving and stopping -----------------------------------------------------------------

    def _save(self, reason: str) -> None:
        """Commit a checkpoint, verify it, then remove what is beyond the limit. All ranks."""
        progress = self.progress
        if self.saved_step == progress.step:
            return
        resumable = not self.settings.save_only_model or reason == "stop"
        ranks = self.backend.gather(RankState.capture(self.sums))
        program_state = self.program.state_dict()

        def write(directory: Path) -> None:
            progress.lines = self.run.sync_logs()
            with self.optimizer.averaged():
                self.program.save_model(directory, self.optimizer.masters)
            durable.boundary(checkpoints.POINT)
            if resumable or self.plan.load_best:
                states.write_masters(directory, self.optimizer)
            if resumable:
                states.write_state(directory, self.optimizer, progress, ranks, program_state, self.run.config)

        def commit() -> None:
            checkpoint = checkpoints.commit(
                self.run.path,
                progress.step,
                write,
                resumable=resumable,
                reason=reason,
                identity=self.identity,
            )
            self.saved.append(checkpoints.verify(checkpoint.path))
            self._retain()
            self.run.status(checkpoint=checkpoint.path.name)
            self.observers.tell(Saved(progress.step, checkpoint.path))

        with phase("save"):
            self.backend.on_first(commit)
        self.saved_step = progress.step
        self.watchdog.beat()
        self.clock.reset_time()

    def _retain(self) -> None:
        limit, best = self.settings.save_total_limit, self.progress.best_step
        self.saved = checkpoints.retain(self.saved, limit, best)

    def _stop_if_asked(self) -> None:
        """On a signal to any rank: save, say how to go on, raise Stopped."""
        if not self.backend.any(self.stop()):
            return
        self._save("stop")
        step = self.progress.step
        raise self._stopped(
            f"stopped at step {step} of {self.plan.total_steps}; saved checkpoint-{step}",
            f"resume with: {resume_command(self.run.path, self.backend.world_size)}",
        )

    def _stopped(self, what: str, fix: str) -> Stopped:
        signum = max(self.backend.gather(self.stop.signum or 0))
        state = "finished" if self.finished else "stopped"
        self.run.status(state=state, exit_code=128 + signum)
        return Stopped(signum, what, where=str(self.run.path), fix=fix)

    # --- the end -----------------------------------------------------------------------------

    def _finish(self) -> FitResult:
        """Load the best weights if asked, save the final model, evaluate once more, write the
        results.
        """
        best = self._best_checkpoint()
        reload = self.plan.load_best and best is not None and best != self._path_of(self.progress.step)
        if reload and best is not None:
            states.load_best_masters(best, self.optimizer)
        with phase("save"), self.optimizer.averaged():
            self.backend.on_first(
                lambda: checkpoints.replace_files(
                    self.run.path, lambda d: self.program.save_model(d, self.optimizer.masters)
                )
            )
        evaluation = self._final_evaluation(reload)
        train = self._train_results()
        self.run.write_results("train", train)
        if evaluation:
            self.run.write_results("eval", evaluation)
        self.run.write_json("trainer_state.json", self._summary(best))
        self.tell_end("finished", {**train, **evaluation})
        self.run.status(state="finished", exit_code=0, step=self.progress.step)
        self.finished = True
        if self.backend.any(self.stop()):  # too late to stop anything, but scripts must hear of it
            raise self._stopped("the training was finished and saved when the signal came", "")
        return FitResult(
            self.progress.step,
            self.plan.total_steps,
            self.progress.early_stopped,
            train,
            evaluation,
            self.progress.best_metric,
            best,
        )

    def _path_of(self, step: int | None) -> Path:
        return self.run.path / f"checkpoint-{step}"

    def _best_checkpoint(self) -> Path | None:
        """The checkpoint with the best metric, the same on all ranks; None if none was saved at
        that step.
        """
        steps = {checkpoint.step for checkpoint in self.saved}
        has_best = self.backend.gather(self.progress.best_step in steps)[0]
        if self.plan.load_best and not has_best:
            self.run.warn("load_best_model_at_end: no evaluated step was saved; the last weights stay")
        return self._path_of(self.progress.best_step) if has_best else None

    def _final_evaluation(self, reloaded: bool) -> dict[str, float]:
        """Metrics of the weights that were saved; nothing when no evaluation was asked for."""
        asked = self.plan.evaluation.strategy != "no" or self.settings.do_eval
        if not (asked and self.program.eval_sets):
            return {}
        if self.last_evaluation and not reloaded and self.progress.evaluated_step == self.progress.step:
            return self.last_evaluation
        row = self._evaluate_sets()
        if row is None:
            self.run.warn("the final evaluation was cut short; there is no eval_results.json")
            return {}
        row["epoch"] = self.plan.epoch(self.progress.step)
        if not reloaded and self.progress.evaluated_step != self.progress.step:
            self.run.append(METRICS_FILE, {**self._where(), **row})
            self.observers.tell(Evaluated(self.progress.step, {**self._where(), **row}))
        return row

    def _train_results(self) -> dict[str, float]:
        progress = self.progress
        seconds, steps = self.run_clock.seconds(), progress.step - self.begun_at
        return {
            "epoch": self.plan.epoch(progress.step),
            "train_loss": progress.loss_sum / max(progress.step, 1),
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps * self.program.examples_per_step / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "num_input_tokens_seen": progress.num_tokens,
        }

    def _summary(self, best: Path | None) -> dict[str, Any]:
        """What transformers' trainer_state.json holds, for tools that read it."""
        progress = self.progress
        return {
            "global_step": progress.step,
            "max_steps": self.plan.total_steps,
            "epoch": self.plan.epoch(progress.step),
            "best_metric": progress.best_metric,
            "best_global_step": progress.best_step,
            "best_model_checkpoint": str(best) if best else None,
            "log_history": read_metrics(self.run.path) if self.run.writer else [],
        }


def resume_command(run: Path, world_size: int) -> str:
    """What to type to go on with a run, as many processes as it has now."""
    words = ["trueup", "train", str(run / RUN_FILE), "resume_from_checkpoint=auto"]
    if world_size == 1:
        one_of_several = torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ
        return ("NPROC_PER_NODE=1 " if one_of_several else "") + shlex.join(words)
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = world_size // on_this_node
    several = f"NNODES={nodes} NODE_RANK=… MASTER_ADDR=… " if nodes > 1 else ""
    return f"{several}NPROC_PER_NODE={on_this_node} {shlex.join(words)}"


def _end_state(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "aborted"
    return "stopped" if isinstance(error, Stopped) else "failed"


class IntervalClock:
    """Seconds and tokens since the last reading, without the time of evaluating and saving."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self.reset_time()

    def reset_time(self) -> None:
        """Leave out the time since the last step."""
        self._since = time.monotonic()

    def count(self, tokens: int) -> None:
        """A step is done."""
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now
        self._tokens += tokens

    def seconds(self) -> float:
        return max(self._seconds, 1e-9)

    def lap(self) -> dict[str, float]:
        """The interval's `seconds` and `tokens_per_second`; the next interval begins."""
        row = {
            "seconds": round(self.seconds(), 4),
            "tokens_per_second": round(self._tokens / self.seconds(), 2),
        }
        self.reset()
        return row


def memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU, or what the process holds now on a CPU, in GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(psutil.Process().memory_info().rss / 2**30, 3)
