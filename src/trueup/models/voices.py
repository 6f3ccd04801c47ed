"""One base, many voices: which adapters act is switched between forwards, for requests that name them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from peft import PeftModel

from trueup.errors import ConfigError
from trueup.models.adapters import add_frozen
from trueup.models.fused import fuse
from trueup.models.policy import Policy

BASE = "base"  # the name under which a policy speaks without its adapters


class Voices:
    """The voices of a policy: None, as it was found; `BASE`, no adapter; and those that were added.

    Whoever switches holds the model. `rest` puts everything back: which adapters act, and what trains.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._names: dict[str, list[str]] = {}  # voice → peft's names of its adapters
        self._plain = not isinstance(policy.model, PeftModel)  # as it was found
        self._current: str | None = None
        self._back = ExitStack()

    @property
    def names(self) -> tuple[str, ...]:
        return (BASE, *self._names) if isinstance(self.policy.model, PeftModel) else ()

    def __contains__(self, name: str | None) -> bool:
        return name is None or name == BASE or name in self._names

    def add(self, name: str, directories: Sequence[str | Path]) -> None:
        """Load adapters that act in sum. Raises ModelError where they do not fit, ConfigError for a name in use."""
        if name in self:
            raise ConfigError(f"two adapters are called {name!r}", where=name, fix="give each a name of its own")
        assert self._current is None
        acting = [] if self._plain else list(self.policy.model.active_adapters)  # type: ignore[attr-defined]
        inner = [f"voice_{len(self._names)}_{index}" for index in range(len(directories))]
        self.policy.model = model = add_frozen(self.policy.model, inner, directories)
        if self.policy.boosted:
            fuse(model)
        self._names[name] = inner
        if self._plain:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.set_adapter(acting, inference_mode=True)

    def use(self, name: str | None) -> None:
        """Speak so from now on."""
        if name == self._current:
            return
        self.rest()
        model = self.policy.model
        if name is None or not isinstance(model, PeftModel) or (name == BASE and self._plain):
            return
        self._keep(model)
        if name == BASE:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.base_model.set_adapter(self._names[name], inference_mode=True)
        self._current = name

    def rest(self) -> None:
        """As it was found."""
        self._back.close()
        self._current = None

    def _keep(self, model: PeftModel) -> None:
        """Write down what is to be put back: the acting adapters, and, since peft changes it, what trains."""
        acting = list(model.active_adapters)
        trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

        def back() -> None:
            model.base_model.enable_adapter_layers()
            model.base_model.set_adapter(acting if len(acting) != 1 else acting[0])
            if self._plain:
                model.base_model.disable_adapter_layers()
            for parameter, flag in trains:
                parameter.requires_grad_(flag)

        self._back.callback(back)
