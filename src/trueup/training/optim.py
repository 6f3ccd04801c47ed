"""The optimizer: it owns fp32 masters, adds gradients up in fp32, and refuses to move on numbers
that are not finite.

A trained parameter sits in the module in compute dtype; its fp32 master is what the optimizer moves
and what checkpoints hold (for an fp32 parameter the master is the parameter itself). Gradients live
in flat fp32 buckets: one all-reduce, one norm, one scaling each, however many small adapters there
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from trueup.errors import ConfigError
from trueup.training import optimizers
from trueup.training.optimizers import Wanted
from trueup.training.plan import warmup_steps

_BUCKET_ELEMENTS = 64 * 2**20  # 256 MB of fp32 gradients per all-reduce


class GradientBuckets:
    """Flat fp32 gradient sums. `views[name]` is the parameter's piece, shaped like it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], on_host: bool = False) -> None:
        self.on_host = on_host
        self.buckets: list[Tensor] = []
        self.views: dict[str, Tensor] = {}
        group: list[tuple[str, nn.Parameter]] = []
        size = 0
        for name, parameter in parameters.items():
            full = size + parameter.numel() > _BUCKET_ELEMENTS
            if group and (full or parameter.device != group[0][1].device):
                self._allocate(group)
                group, size = [], 0
            group.append((name, parameter))
            size += parameter.numel()
        if group:
            self._allocate(group)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._collector(self.views[name]))
            for name, parameter in parameters.items()
        ]

    def _allocate(self, group: list[tuple[str, nn.Parameter]]) -> None:
        size = sum(parameter.numel() for _, parameter in group)
        bucket = torch.zeros(size, dtype=torch.float32, device="cpu" if self.on_host else group[0][1].device)
        self.buckets.append(bucket)
        start = 0
        for name, parameter in group:
            self.views[name] = bucket[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    @staticmethod
    def _collector(view: Tensor):
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            view.add_(parameter.grad.to(view.device))
            parameter.grad = None

        return collect

    def norm(self) -> Tensor:
        """Global L2 norm, a scalar on the first bucket's device. Not finite as soon as one gradient
        is not.
        """
        norms = [torch.linalg.vector_norm(bucket) for bucket in self.buckets]
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))

    def scale(self, factor: Tensor | float) -> None:
        for bucket in self.buckets:
            bucket.mul_(factor.to(bucket.device) if isinstance(factor, Tensor) else factor)

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.zero_()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halve on overflow, double after `interval` good steps
    (Micikevicius 2018).
    """

    scale: float = 2.0**16
    good_steps: int = 0
    interval: int = 2000
    smallest: float = 2.0**-14

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale *= 2.0
            self.good_steps = 0

    def overflowed(self) -> bool:
        """Halve the scale; False when it is already so small that the overflow is not the scale's
        fault.
        """
        self.good_steps = 0
        self.scale /= 2.0
        return self.scale >= self.smallest


class _Schedule(Protocol):
    """A learning-rate schedule by transformers' name."""

    def set(self, step: int) -> None: ...
    def see(self, metric: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _ClosedForm:
    """Schedules that are a function of the step: nothing to store, and a resume cannot get them
    wrong.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        self.groups = optimizer.param_groups
        self.base = [group["initial_lr"] for group in self.groups]
        self.factors = schedule.lr_lambdas

    def set(self, step: int) -> None:
        for group, base, factor in zip(self.groups, self.base, self.factors, strict=True):
            group["lr"] = base * factor(step)

    def see(self, metric: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _MetricDriven:
    """Schedules that look at the evaluation's metric (`reduce_lr_on_plateau`, `greedy`)."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.groups = optimizer.param_groups
        self.schedule = schedule

    def set(self, step: int) -> None:
        pass

    def see(self, metric: float) -> None:
        self.schedule.step(metric)

    def state_dict(self) -> dict[str, Any]:
        plain = (bool, int, float, str, list, type(None))
        state = {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, plain)}
        return {"schedule": state, "learning_rates": [group["lr"] for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        for group, rate in zip(self.groups, state["learning_rates"], strict=True):
            group["lr"] = rate


def _master(parameter: Tensor, on_host: bool) -> Tensor:
    return parameter.data.to("cpu" if on_host else parameter.device, torch.float32, copy=True)


class MasterOptimizer:
    """An optimizer over fp32 masters of `parameters` (stable names → parameters in compute dtype).

    With `on_host`, masters, gradients and state are in the host's memory, and so is the step.

    A parameter that no micro-batch reached has gradient zero, on every rank alike, so that the
    result does not depend on how a step was cut into micro-batches and ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        optim: str = "adamw_torch",
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        lr_scheduler_type: str = "linear",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        num_warmup_steps: int = 0,
        total_steps: int = 1,
        wanted: Wanted | None = None,
        on_host: bool = False,
    ) -> None:
        if not parameters:
            raise ConfigError(
                "no parameter is to be trained",
                where="finetuning_type",
                fix="choose adapters that fit the model, or another finetuning_type",
            )
        self.parameters = dict(parameters)
        self.masters = {
            name: p.data if p.dtype == torch.float32 and not on_host else _master(p, on_host)
            for name, p in self.parameters.items()
        }
        self.gradients = GradientBuckets(self.parameters, on_host)
        for name, master in self.masters.items():
            master.grad = self.gradients.views[name]
        self.max_grad_norm = max_grad_norm
        fp16 = any(p.dtype == torch.float16 for p in self.parameters.values())
        self.loss_scale = LossScale() if fp16 else None
        self.wanted = wanted or Wanted(optim, learning_rate, betas, eps, weight_decay)
        self.optimizer = optimizers.make_optimizer(self.masters, self.wanted)
        self.averages = self.wanted.name.startswith("schedule_free")
        self.full_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.schedule = self._make_schedule(lr_scheduler_type, lr_scheduler_kwargs, num_warmup_steps, total_steps)
        self.schedule.set(0)

    @classmethod
    def from_settings(
        cls,
        parameters: Mapping[str, nn.Parameter],
        settings: Any,
        total_steps: int,
        head_elements: int | None = None,
    ) -> MasterOptimizer:
        """From the train section's keys (transformers' TrainingArguments names)."""
        warmup = warmup_steps(settings, total_steps)
        return cls(
            parameters,
            optim=settings.optim,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type=settings.lr_scheduler_type,
            lr_scheduler_kwargs=settings.lr_scheduler_kwargs or None,
            num_warmup_steps=warmup,
            total_steps=total_steps,
            wanted=optimizers.wanted_from(settings, list(parameters), warmup, head_elements),
            on_host=settings.offload_optimizer and any(p.device.type != "cpu" for p in parameters.values()),
        )

    def _make_schedule(self, name: str, kwargs: dict[str, Any] | None, warmup: int, total: int) -> _Schedule:
        try:
            schedule = get_scheduler(
                name,
                self.optimizer,
                num_warmup_steps=warmup,
                num_training_steps=total,
                scheduler_specific_kwargs=dict(kwargs) if kwargs else None,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the schedule {name} could not be made: {error}",
                where="lr_scheduler_kwargs",
                expected="the arguments of transformers' schedule of that name",
            ) from error
        if isinstance(schedule, LambdaLR):
            return _ClosedForm(self.optimizer, schedule)
        return _MetricDriven(self.optimizer, schedule)

    @property
    def learning_rate(self) -> float:
        """The rate the next step will use, of parameters at the run's own rate."""
        rates = zip(self.optimizer.param_groups, self.full_rates, strict=True)
        group, full = max(rates, key=lambda rate: rate[1])  # any but one that stands still
        own = self.wanted.learning_rate
        return float(group["lr"]) if full in (own, 0.0) else float(group["lr"]) * own / full

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss to the fp32 sums."""
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def gradient_norm(self) -> Tensor:
        """Global norm of the step's summed gradients, free of loss scaling (fp32 scalar on the
        device).
        """
        if self.loss_scale is not None:
            self.gradients.scale(1.0 / self.loss_scale.scale)
        return self.gradients.norm()

    def step(self, norm: Tensor, next_step: int) -> None:
        """Clip by `norm`, move the masters, copy them into the module, set the rate of step
        `next_step`.
        """
        if self.max_grad_norm:
            self.gradients.scale((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.publish()
        self.skip(next_step)
        if self.loss_scale is not None:
            self.loss_scale.succeeded()

    def skip(self, next_step: int) -> None:
        """Forget the step's gradients without moving (an fp16 overflow), and go on with the
        schedule.
        """
        self.gradients.zero()
        self.schedule.set(next_step)

    def shrink_loss_scale(self) -> bool:
        """Answer an fp16 overflow; False when there is no scale to blame, or none left to take
        away.
        """
        return self.loss_scale is not None and self.loss_scale.overflowed()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the module's parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name].data_ptr() != parameter.data_ptr():
                parameter.copy_(self.masters[name])

    @torch.no_grad()
    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the masters of some parameters to the fp32 values that these have been rounded from."""
        for name, tensor in tensors.items():
            self.masters[name].copy_(tensor)

    @torch.no_grad()
    def load_masters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the masters, and with them the module's parameters."""
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.publish()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the weights an averaging optimizer answers for, in the masters and in the module; then with those it
        goes on from, to the bit. Others have only one kind.
        """
        if not self.averages:
            yield
            return
        kept = {name: master.clone() for name, master in self.masters.items()}
        self.optimizer.eval()  # type: ignore[attr-defined]
        self.publish()
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            self.load_masters(kept)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `kind.parameter_name` (exp_avg, exp_avg_sq, step …)."""
        return optimizers.state_tensors(self.optimizer, self.masters)

    def load_state_tensors(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None = None) -> None:
        """Take back what `state_tensors` gave, and `state_dict()["numbers"]`."""
        optimizers.load_state(self.optimizer, self.masters, tensors, numbers or {})

    def state_dict(self) -> dict[str, Any]:
        """What is not a tensor, JSON-able."""
        scale = self.loss_scale
        return {
            "numbers": optimizers.state_numbers(self.optimizer, self.masters),
            "schedule": self.schedule.state_dict(),
            "loss_scale": None if scale is None else [scale.scale, scale.good_steps],
        }

    def load_state_dict(self, state: Mapping[str, Any], steps_done: int) -> None:
        """Take back what `state_dict` gave, after `steps_done` optimizer steps."""
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.set(steps_done)
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.scale, self.loss_scale.good_steps = state["loss_scale"]

    def all_tensors(self) -> Sequence[Tensor]:
        """The masters, in a stable order (for a broadcast)."""
        return list(self.masters.values())

    def close(self) -> None:
        """Take the hooks off the module."""
        self.gradients.close()
