"""How unsure the policy is, token by token, in the steps that are logged (`log_entropy`)."""

from __future__ import annotations

from torch import Tensor

from trueup.config.schema import TrainSection
from trueup.models.logprobs import token_entropy
from trueup.models.policy import Policy
from trueup.training.plan import make_plan
from trueup.types import Metrics


class EntropyGauge:
    """The mean entropy (nats) of the policy's distributions at the predicted tokens of a logged step or an evaluation.

    It costs one more product of the head without gradient, on the hidden states that the loss is made of; in all other
    steps, and when it is off, nothing.
    """

    def __init__(self, train: TrainSection, steps_per_epoch: int) -> None:
        self._on = train.log_entropy
        self._plan = make_plan(train, steps_per_epoch) if self._on and train.do_train else None
        self._due = False

    def begin(self, steps_done: int | None) -> None:
        """A step begins, or (None) an evaluation."""
        logged = steps_done is None or (self._plan is not None and self._plan.logs(steps_done + 1))
        self._due = self._on and logged

    def read(self, policy: Policy, hidden: Tensor) -> Metrics:
        """The metric of a micro-batch with hidden states [N, H], if this step is logged."""
        if not self._due:
            return {}
        return {"entropy": (token_entropy(hidden.detach(), policy.head).sum(), float(len(hidden)))}
