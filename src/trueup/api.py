"""trueup from Python: train as a config says, with rows, models and functions of one's own; load what came of it.

    run = trueup.train("dpo.yaml", learning_rate=1e-5)
    run = trueup.train({"stage": "dpo", "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}, train_dataset=rows)
    print(run.metrics["eval_rewards/accuracies"], run.model().chat("Hello"))

A run started here is the run that the command line starts: the same config, checked in the same way; the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trueup import memory
from trueup.config.load import given, load_config
from trueup.config.schema import RunConfig
from trueup.data.given import GivenRows, rows_of
from trueup.errors import ConfigError
from trueup.inference.model import Model
from trueup.models.given import GivenModel, shape_of
from trueup.models.tokenizer import tokenizer_label
from trueup.recipes.run import run as run_recipe
from trueup.training import checkpoint as checkpoints
from trueup.training.events import Event, Observer
from trueup.training.observers import OBSERVERS
from trueup.training.run_files import read_metrics

Callback = Callable[[Event], None] | Observer


@dataclass(frozen=True)
class Run:
    """A run that has ended. Everything it knows is in the files of `output_dir`.

    Attributes:
        metrics: of train_results.json and eval_results.json together.
        config: what it was told, every key resolved.
    """

    output_dir: Path
    metrics: dict[str, float]
    config: RunConfig = field(repr=False)
    in_memory: GivenModel | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one for each logged step and each evaluation."""
        return read_metrics(self.output_dir)

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, the first step first."""
        return sorted(checkpoints.checkpoints(self.output_dir), key=checkpoints.step_of)

    def model(self, checkpoint: str | Path | None = None, **keys: Any) -> Model:
        """The trained model, or that of a checkpoint (a path, or the name of one of the run's).

        `keys` are those of `load`. A model that was handed over in memory has been trained in place, and is what the
        result speaks with.
        """
        cfg = self.config
        keys = {"template": cfg.data.template, "device": cfg.model.device, "bf16": cfg.train.bf16,
                "fp16": cfg.train.fp16, "trust_remote_code": cfg.model.trust_remote_code, **keys}  # fmt: skip
        if self.in_memory is not None and checkpoint is None:
            return load(self.in_memory.model, tokenizer=self.tokenizer, **keys)
        trained = self.output_dir if checkpoint is None else self.output_dir / checkpoint
        if not cfg.train.do_train:
            adapters = cfg.model.adapter_name_or_path
            return load(str(cfg.model.model_name_or_path), adapters, tokenizer=self.tokenizer, **keys)
        if cfg.tuning.finetuning_type in ("full", "freeze"):
            return load(trained, **keys)
        base = str(cfg.model.model_name_or_path)
        return load(trained if memory.is_name(base) else base, None if memory.is_name(base) else trained, **keys)


def train(
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    ref_model: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    objective: Callable[..., Any] | None = None,
    reward_functions: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
    callbacks: Iterable[Callback] = (),
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Train, evaluate or predict, as a config says.

    Args:
        config: a YAML or JSON file, or a dict of its keys; `keys` are added to it and win.
        model, ref_model: a name, a directory, a transformers model, or a peft model with one LoRA adapter, which is
            trained on. Models in memory are trained in place, in the run's device and dtype.
        tokenizer: of the model, where it is not the one that its name leads to.
        train_dataset, eval_dataset: rows in memory (a list of dicts, a `datasets.Dataset`), or names of datasets; for
            evaluation also several under their names, which are then reported one by one.
        objective: a loss in the place of the stage's. It gets what that one gets (`PairLogps`, `FeedbackLogps`,
            `Rankings` or `TokenLogps`) and returns a tensor of losses, which are averaged as the stage's are, or a
            `Loss`.
        reward_functions: functions that score answers, for stages that learn from rewards; each is called here, with
            the columns it has parameters for, or named as `reward_funcs` names them.
        callbacks: functions of an event (`trueup.training.events`), or observers. None of them can hurt the training:
            one that raises is named and switched off.
        quiet: print neither header nor progress.

    Raises:
        UserError: of the kind that tells who can mend it; see `trueup.errors`.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    told = _Told(given(config) if isinstance(config, str | Path) else dict(config or {}), dict(keys))
    told.model("model_name_or_path", "model", model)
    told.model("ref_model", "ref_model", ref_model)
    told.tokenizer(tokenizer)
    told.dataset("dataset", "train", train_dataset)
    if isinstance(eval_dataset, Mapping) and "train" not in eval_dataset:
        told.eval_datasets(eval_dataset)
    else:
        told.dataset("eval_dataset", "eval", eval_dataset)
    if objective is not None:
        told.keys["custom_objective"] = told.hold(_name_of(objective), objective)
    if reward_functions is not None:
        told.rewards([reward_functions] if callable(reward_functions) else reward_functions)
    told.objects[OBSERVERS] = [_observer(callback) for callback in callbacks]
    with told.lent():
        cfg = load_config(config, keys=told.keys)
        done = run_recipe(cfg, Console(quiet=quiet))
    return Run(done.output_dir, dict(done.metrics), cfg, told.objects.get("model"), tokenizer)


def load(
    model: Any, adapter: str | Path | Sequence[str | Path] | None = None, *, tokenizer: Any = None, **keys: Any
) -> Model:
    """A model to talk to and to ask, with its adapters.

    Args:
        model: a name, a directory (of an adapter too: its base is found), a transformers model or a peft model.
        adapter: adapters on it, in order.
        tokenizer: where it is not the one that the model's name leads to.
        keys: of a config: `template`, `device`, `bf16`, `trust_remote_code`, `default_system` …

    Raises:
        ConfigError, ModelError: it cannot be loaded.
    """
    told = _Told({}, dict(keys))
    told.model("model_name_or_path", "model", model)
    told.tokenizer(tokenizer)
    if adapter:
        told.keys["adapter_name_or_path"] = [
            str(a) for a in ([adapter] if isinstance(adapter, str | Path) else adapter)
        ]
    with told.lent():
        found = Model(load_config({}, keys=told.keys, verb="infer"))
        if "model" in told.objects:
            found.policy.shared = False  # its owner's model keeps transformers' attention
    return found


class _Told:
    """What a call says: keys, and objects with the names under which the keys know them."""

    def __init__(self, config: dict[str, Any], keys: dict[str, Any]) -> None:
        self.config, self.keys = config, keys
        self.objects: dict[str, Any] = {}

    def hold(self, label: str, value: Any) -> str:
        """The name of an object from now on."""
        label = _unused(label, self.objects)
        self.objects[label] = value
        return memory.PREFIX + label

    def model(self, key: str, label: str, model: Any) -> None:
        """A model's name, or the model itself."""
        if model is None:
            return
        if isinstance(model, str | Path):
            self.keys[key] = str(model)
            return
        lent = GivenModel(model)
        self.keys[key] = self.hold(label, lent)
        if key == "model_name_or_path" and lent.has_adapter:
            self._adapter_of(lent)

    def _adapter_of(self, lent: GivenModel) -> None:
        """The adapter that is there is the one that trains: keys that ask for another are refused."""
        shape = {"finetuning_type": "lora", **shape_of(next(iter(lent.model.peft_config.values())))}
        asked = {**self.config, **self.keys}
        if other := [key for key in shape if key in asked and asked[key] != shape[key]]:
            raise ConfigError(
                f"the peft model in memory has an adapter with {other[0]}: {shape[other[0]]}, and it is what trains",
                where=other[0], fix="drop the key, or give the model without an adapter",
            )  # fmt: skip
        self.keys |= shape

    def tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is None:
            return
        name = {**self.config, **self.keys}.get("model_name_or_path")
        self.objects[tokenizer_label(str(name))] = tokenizer

    def dataset(self, key: str, label: str, dataset: Any) -> None:
        """Names of datasets, or rows."""
        if dataset is None:
            return
        if isinstance(dataset, str | Path):
            self.keys[key] = str(dataset)
        elif isinstance(dataset, list | tuple) and dataset and all(isinstance(name, str | Path) for name in dataset):
            self.keys[key] = [str(name) for name in dataset]
        else:
            self.keys[key] = [self._rows(label, dataset, key)]

    def eval_datasets(self, datasets: Mapping[str, Any]) -> None:
        """Several, each under its name."""
        self.keys["eval_dataset"] = [self._rows(str(name), rows, "eval_dataset") for name, rows in datasets.items()]
        self.keys["eval_on_each_dataset"] = True

    def _rows(self, label: str, dataset: Any, key: str) -> str:
        rows = dataset if isinstance(dataset, GivenRows) else GivenRows(rows_of(dataset, key))
        return self.hold(label, rows)

    def rewards(self, functions: Iterable[Callable[..., Any] | str]) -> None:
        self.keys["reward_funcs"] = [f if isinstance(f, str) else self.hold(_name_of(f), f) for f in functions]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While open, the objects are there; models are given back at the end."""
        try:
            with memory.holding(self.objects):
                yield
        finally:
            for thing in self.objects.values():
                if isinstance(thing, GivenModel):
                    thing.give_back()


def _unused(label: str, taken: Mapping[str, Any]) -> str:
    """The label, with a number if it is taken."""
    number = 2
    while (numbered := label if number == 2 and label not in taken else f"{label}_{number}") in taken:
        number += 1
    return numbered


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isidentifier() else "function"  # a lambda


@dataclass(frozen=True)
class _Function:
    """A plain function as an observer."""

    function: Callable[[Event], None]

    def observe(self, event: Event) -> None:
        self.function(event)


def _observer(callback: Callback) -> Observer:
    if hasattr(callback, "observe"):
        return callback  # type: ignore[return-value]
    if callable(callback):
        return _Function(callback)
    raise ConfigError(
        f"a callback is {type(callback).__name__}", where="callbacks",
        expected="a function of an event, or an object with observe(event)",
    )  # fmt: skip
