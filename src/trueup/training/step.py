"""One optimizer step over the micro-batches of every rank, for any objective.

    reduce the step's counts → forward and backward each micro-batch → sum gradients over ranks
    → refuse what is not finite → clip, move; out of memory: once more, in smaller pieces

The losses are sums divided by counts of the whole step, so micro-batches and ranks do not change
the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from trueup.errors import DivergenceError
from trueup.training.backend import Backend
from trueup.training.metrics import MetricSums
from trueup.training.optim import MasterOptimizer
from trueup.training.profile import phase
from trueup.training.shortage import Cuts, Draws, clear, in_pieces, is_out_of_memory, out_of_memory
from trueup.types import Metrics

B = TypeVar("B")
_TOKENS = "backbone_tokens"  # the loop's own count, travels with the program's


class Program(Protocol[B]):
    """What a recipe hands to the loop: a model, an objective and batches, behind names the loop can
    use.
    """

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Stable names → parameters, in compute dtype."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def examples_per_step(self) -> int: ...

    @property
    def eval_sets(self) -> Mapping[str, Sequence[B]]:
        """Name ("eval", …) → this rank's evaluation micro-batches; the same names on every rank."""
        ...

    def train(self, mode: bool = True) -> None:
        """Dropout on or off, as `nn.Module.train`."""
        ...

    def micro_batches(self, epoch: int, step: int) -> Sequence[B]:
        """This rank's micro-batches of step `step` of `epoch`; may be empty."""
        ...

    def counts(self, batch: B) -> Mapping[str, float]:
        """Denominators this micro-batch adds (e.g. {"pairs": 2}); host-side, no device work."""
        ...

    def loss(self, batch: B, totals: dict[str, float]) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the step's loss (already sum / totals), and (sum, count)
        metrics.
        """
        ...

    def describe(self, batch: B) -> Sequence[str]:
        """Row ids, one per example."""
        ...

    def size(self, batch: B) -> int:
        """Tokens through the backbone."""
        ...

    def save_model(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        """Write the model's files (PEFT or transformers format, tokenizer) from fp32 masters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The objective's own state: JSON, and tensors by name. Called on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class LooksAhead(Protocol):
    """A program whose examples depend on each other, or whose objective changes from step to step."""

    def look_ahead(self, batches: Sequence[Any], backend: Backend, steps_done: int | None) -> None:
        """Called on every rank before the first loss of a step, with this rank's micro-batches of it; or of a whole
        evaluation, where `steps_done` is None.
        """
        ...


@runtime_checkable
class StartsInFp32(Protocol):
    """A program that knows some of its parameters more exactly than they hold themselves."""

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Names as in `trainable` → fp32 values that the parameters are rounded from."""
        ...


@runtime_checkable
class KnowsHeads(Protocol):
    """A program whose model has attention heads, for optimizers that treat each head apart."""

    @property
    def head_elements(self) -> int | None:
        """Weights of one head's projection: hidden size × columns of a head."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step did. `skipped`: fp16 gradients overflowed, the weights stand still and the loss scale is halved.
    `pieces`: into how many parts its micro-batches had to be cut.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool = False
    pieces: int = 1


def train_step(
    program: Program[B],
    optimizer: MasterOptimizer,
    backend: Backend,
    steps_done: int,
    sums: MetricSums,
    pieces: int = 1,
) -> StepResult:
    """Do optimizer step number `steps_done` (from 0) and add its metrics to `sums`.

    A step that runs out of memory is done again with micro-batches of half the size, which changes nothing of its
    result but rounding.

    Args:
        pieces: how many parts each micro-batch is cut into.

    Raises:
        DivergenceError: before the optimizer moves, when the loss or a gradient is not finite on any rank.
        ResourceError: out of memory with single examples.
    """
    with phase("data"):
        whole = program.micro_batches(*divmod(steps_done, program.steps_per_epoch))
    draws = Draws.now(backend.device)
    while True:
        batches = in_pieces(program, whole, pieces)
        done = _gradients(program, optimizer, backend, steps_done, batches)
        if done is not None:
            break
        pieces *= 2
        if not isinstance(program, Cuts) or not backend.any(len(in_pieces(program, whole, pieces)) > len(batches)):
            raise out_of_memory(steps_done + 1, backend)
        optimizer.gradients.zero()
        program.forget_step()
        clear(backend)
        draws.restore(backend.device)
    loss_of_rank, totals, told = done
    for metrics in told:
        sums.update(metrics)
    with phase("optimizer"):
        backend.sum_gradients(optimizer.gradients.buckets)
        norm = optimizer.gradient_norm()
        numbers = torch.stack([loss_of_rank, norm.to(loss_of_rank.device)]).tolist()  # the step's one sync
    loss_value = backend.sum_counts({"loss": numbers[0]})["loss"]
    result = StepResult(loss_value, numbers[1], int(totals[_TOKENS]), pieces=pieces)
    sums.add("loss", loss_of_rank, float(backend.rank == 0))
    if math.isfinite(loss_value) and math.isfinite(result.grad_norm):
        with phase("optimizer"):
            optimizer.step(norm, steps_done + 1)
        return result
    if math.isfinite(loss_value) and optimizer.shrink_loss_scale():
        optimizer.skip(steps_done + 1)
        return replace(result, skipped=True)
    rows = backend.gather([row for batch in batches for row in program.describe(batch)])
    raise NotFinite(steps_done + 1, result, [row for of_rank in rows for row in of_rank])


def _gradients(
    program: Program[B], optimizer: MasterOptimizer, backend: Backend, steps_done: int, batches: Sequence[B]
) -> tuple[Tensor, dict[str, float], list[Metrics]] | None:
    """Sum a step's gradients: this rank's loss, the step's counts, its metrics. None where memory ran out on any rank.

    Several ranks are in step with each other only between look-ahead and the sum of gradients; elsewhere a shortage on
    one of them ends the run.
    """
    short = False
    try:
        if isinstance(program, LooksAhead):
            with phase("look-ahead"):
                program.look_ahead(batches, backend, steps_done)
    except (RuntimeError, MemoryError) as error:
        if backend.world_size > 1 or not is_out_of_memory(error):
            raise
        short = True
    if short:
        return None
    totals = step_totals(program, batches, backend)
    loss_of_rank = torch.zeros((), dtype=torch.float32, device=backend.device)
    told: list[Metrics] = []
    try:
        for batch in batches:
            with phase("forward"):
                loss, metrics = program.loss(batch, totals)
            with phase("backward"):
                optimizer.backward(loss)
            loss_of_rank += loss.detach()
            told.append(metrics)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        short = True
    if backend.any(short):
        return None
    return loss_of_rank, totals, told


def step_totals(program: Program[B], batches: Sequence[B], backend: Backend) -> dict[str, float]:
    """Denominators over all micro-batches of all ranks, and under "tokens" what goes through the
    backbone.
    """
    counts = {_TOKENS: float(sum(program.size(batch) for batch in batches))}
    for batch in batches:
        for name, count in program.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    return backend.sum_counts(counts)


class NotFinite(DivergenceError):
    """The loss or the gradients of a step were not finite; the weights are those of the step
    before.
    """

    def __init__(self, step: int, result: StepResult, rows: Sequence[str]) -> None:
        self.step, self.result, self.rows = step, result, list(rows)
        what = "a gradient" if math.isfinite(result.loss) else "the loss"
        more = f" … and {len(rows) - 16} more" if len(rows) > 16 else ""
        super().__init__(
            f"{what} is not finite at step {step} (loss {result.loss}, "
            f"gradient norm {result.grad_norm}); the weights are still those of step {step - 1}",
            where=f"rows {', '.join(self.rows[:16])}{more}",
            expected="finite numbers",
            fix="look at these rows, lower learning_rate or lengthen the warm-up; with fp16, use bf16 or fp32",
        )

    def naming(self, last_good: str) -> NotFinite:
        """The same, telling also where to go back to."""
        self.problems = [replace(p, fix=f"{last_good}; {p.fix}") for p in self.problems]
        self.args = ("\n".join(map(str, self.problems)),)
        return self
