"""TRL's trainers: each is a run of trueup, told in TRL's words. What a run knows it reads from the run's files."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn
from transformers.trainer_utils import TrainOutput

from trueup import api
from trueup.config.load import load_config
from trueup.config.methods import STAGES
from trueup.data.given import GivenRows, rows_of
from trueup.errors import ConfigError
from trueup.models.plain import load_plain, model_type
from trueup.models.policy import Policy
from trueup.models.reward import RewardModel
from trueup.training import checkpoint as checkpoints
from trueup.training.run_files import METRICS_FILE, read_metrics
from trueup.training.signals import Stopped
from trueup.trl import callbacks as watching
from trueup.trl.configs import Config, DPOConfig, GRPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from trueup.trl.data import formatted, given_rows, is_conversation, lora_keys, quantization_keys, trl_reward

log = logging.getLogger("trueup")

#: beginnings of the names of a model's files.
_MODEL_FILES = (
    "adapter_", "model", "config.json", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab",
    "merges", "chat_template", "sentencepiece", "spiece",
)  # fmt: skip
#: keys that say how a model is loaded.
_OF_LOADING = (
    "device", "use_cpu", "no_cuda", "bf16", "fp16", "trust_remote_code", "model_revision", "revision", "cache_dir",
    "hf_hub_token", "hub",
)  # fmt: skip
#: keys of a training that an evaluation has none of.
_OF_TRAINING = (
    "eval_strategy", "evaluation_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "early_stopping_steps", "resume_from_checkpoint", "do_train",
    "overwrite_output_dir", "save_total_limit",
)  # fmt: skip


@dataclass
class State:
    """What transformers' TrainerState tells, read from the run's directory."""

    directory: Path
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """A row for each logged step and each evaluation, and one at the end."""
        rows = read_metrics(self.directory) if (self.directory / METRICS_FILE).exists() else []
        return [*rows, dict(self.summary)] if self.summary else rows

    @property
    def global_step(self) -> int:
        return max((int(row["step"]) for row in self.log_history if "step" in row), default=0)

    @property
    def epoch(self) -> float:
        return max((float(row["epoch"]) for row in self.log_history if "epoch" in row), default=0.0)


class Trainer:
    """What the trainers have in common. Their arguments are TRL's; those of older versions are taken too.

    Args:
        model: a name, a directory, a model, or a peft model; one that is given itself is trained in place.
        ref_model: the reference, where it is not the model as it was given.
        args: the config.
        processing_class, tokenizer: the tokenizer.
        peft_config: an adapter to train; without one, and without a peft model, all weights are trained.

    Raises:
        ConfigError: for an argument that cannot be honoured.
    """

    config_class: ClassVar[type[Config]]

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        ref_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        quantization_config: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        **more: Any,
    ) -> None:
        _refuse_what_a_run_makes_itself(data_collator, compute_metrics, optimizers, more)
        if isinstance(model, nn.Module) and model is ref_model:
            raise ConfigError("`model` and `ref_model` are one object", where="ref_model", fix="ref_model=None")
        self._given = model if isinstance(model, nn.Module) else str(model)
        self.args = self.config_class.of(args, more)
        if self.args.output_dir is None:
            kind = type(self).__name__.removesuffix("Trainer")
            self.args.output_dir = f"{Path(_name_of(self._given)).name}-{kind}"
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.ref_model = ref_model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._adapter = self._adapter_keys(peft_config) | quantization_keys(quantization_config)
        self._callbacks, early = watching.split(list(callbacks or ()))
        self._keys = self.args.keys() | early | self._longest()
        self._watchers: list[watching.Watcher] = []
        self._trained: Path | None = None
        self._model: nn.Module | None = self._given if isinstance(self._given, nn.Module) else None
        self.state = State(Path(self.args.output_dir))
        self.accelerator = SimpleNamespace(print=_print_on_first, is_main_process=_is_first())

    # --- what a script does with it -----------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | None = None, **more: Any) -> TrainOutput:
        """Train; from a checkpoint, or with True from the newest, if it is asked for."""
        if more := {name: value for name, value in more.items() if value is not None}:
            raise ConfigError(f"train() has no argument {', '.join(more)}", where="train")
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on", where="train_dataset", fix="give train_dataset")
        keys = dict(self._keys)
        if resume_from_checkpoint:
            keys["resume_from_checkpoint"] = "auto" if resume_from_checkpoint is True else str(resume_from_checkpoint)
        evaluates = self.args.eval_strategy not in ("no", None) or self.args.do_eval
        self._watchers = [watching.Watcher(callback, self.args, self) for callback in self._callbacks]
        metrics = self._run(keys, self.train_dataset, self.eval_dataset if evaluates else None)
        self.state.summary = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
        return TrainOutput(self.state.global_step, metrics.get("train_loss", float("nan")), metrics)

    def evaluate(self, eval_dataset: Any = None, **more: Any) -> dict[str, float]:
        """Metrics on held-out rows: of the model as it is now."""
        if more.get("metric_key_prefix", "eval") != "eval" or more.get("ignore_keys"):
            raise ConfigError("evaluate() takes eval_dataset alone; metrics begin with eval_", where="evaluate")
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ConfigError("there is nothing to evaluate on", where="eval_dataset", fix="give eval_dataset")
        keys = {name: value for name, value in self._keys.items() if name not in _OF_TRAINING}
        keys |= {"do_train": False, "do_eval": True, **self._present()}
        return self._run(keys, None, rows, evaluating=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained model where it is wanted; in the run's directory it is anyway."""
        target = Path(output_dir or self.args.output_dir)
        if self._trained is None:
            self.model.save_pretrained(target)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(target)
        elif target.resolve() != self._trained.resolve() and _is_first():
            target.mkdir(parents=True, exist_ok=True)
            checkpoints.replace_files(target, functools.partial(_copy_model, self._trained))

    def save_state(self) -> None:
        """Nothing: trainer_state.json is written when a run ends."""

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print metrics, one a line."""
        for name, value in metrics.items():
            _print_on_first(f"  {split} {name} = {value}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Nothing: a run writes train_results.json, eval_results.json and all_results.json itself."""

    def end(self) -> None:
        """Nothing: a run ends its trackers itself."""

    def add_callback(self, callback: Any) -> None:
        told, early = watching.split([callback])
        self._callbacks += told
        self._keys |= early

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            "uploading is not supported yet", where="push_to_hub", fix=f"upload {self.args.output_dir} with `hf upload`"
        )

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    @property
    def model(self) -> nn.Module:
        """The model that was given, with its adapter; of a name, what transformers and peft load."""
        if self._model is None:
            reads = {name: value for name, value in self._keys.items() if name in _OF_LOADING}
            adapted = self._trained is not None and (self._trained / "adapter_config.json").exists()
            adapter = {"adapter_name_or_path": str(self._trained)} if adapted else {}
            name = str(self._given if adapted or self._trained is None else self._trained)
            cfg = load_config({"model_name_or_path": name, **adapter, **reads}, verb="infer")
            kind = RewardModel if self.config_class.stage == "rm" else Policy
            self._model = load_plain(cfg.model, cfg.train, kind)
        return self._model

    # --- how it is told -----------------------------------------------------------------------

    def _run(self, keys: dict[str, Any], train: Any, evaluation: Any, evaluating: bool = False) -> dict[str, float]:
        extra = {} if evaluating else self._functions()
        name = keys.pop("model_name_or_path", None)
        ref = keys.pop("ref_model", self.ref_model if STAGES[keys["stage"]].reference else None)
        try:
            run = api.train(
                keys, model=name or self._given, ref_model=ref, tokenizer=self.processing_class,
                train_dataset=self._rows(train, "train_dataset"), eval_dataset=self._rows(evaluation, "eval_dataset"),
                callbacks=self._watchers if not evaluating else (), **extra,
            )  # fmt: skip
        except Stopped:
            if evaluating or not any(watcher.asked_to_stop for watcher in self._watchers):
                raise
            self._trained = checkpoints.all_valid(self.state.directory)[-1].path
            self._forget()
            return {}
        if not evaluating:
            self._trained = run.output_dir
            self._forget(run.in_memory)
        return run.metrics

    def _forget(self, lent: Any = None) -> None:
        """The model is another one now."""
        if isinstance(self._given, nn.Module):
            self._given = self._model = lent.model if lent is not None else self._given
            self._adapter = {}
            self._keys = {name: value for name, value in self._keys.items() if not name.startswith("lora_")}
            return
        self._model = None

    def _adapter_keys(self, peft_config: Any) -> dict[str, Any]:
        has_adapter = hasattr(self._given, "peft_config")
        if peft_config is None:
            return {} if has_adapter else {"finetuning_type": "full"}
        if has_adapter:
            raise ConfigError(
                "the model has an adapter already, and `peft_config` asks for another", where="peft_config",
                fix="drop peft_config to train the adapter that is there",
            )  # fmt: skip
        keys = lora_keys(peft_config, _type_of(self._given))
        dropout = keys.pop("lora_dropout", 0.0)
        if dropout and self.args.given.get("disable_dropout", self.args.defaults.get("disable_dropout", False)):
            log.info("`lora_dropout` has no part: disable_dropout is on; disable_dropout=False leaves it")
        else:
            keys["lora_dropout"] = dropout
        return keys

    def _longest(self) -> dict[str, Any]:
        """The length that Unsloth's loader was told, where the config is told none."""
        longest = getattr(self._given, "max_seq_length", None)
        said = {"max_length", "max_seq_length", "cutoff_len"} & self.args.given.keys()
        found = dict(self._adapter)
        if isinstance(longest, int) and not said and "max_length" in self.args.defaults:
            self.args.max_length = longest
            found |= {"max_length": longest}
        return found

    def _functions(self) -> dict[str, Any]:
        """What else a run is given."""
        return {}

    def _rows(self, dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, Mapping) and "train" not in dataset:
            return {key: self._given_rows(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
        return self._given_rows(dataset, name)

    def _given_rows(self, dataset: Any, name: str) -> GivenRows:
        return given_rows(dataset, name)

    def _present(self) -> dict[str, Any]:
        """Keys of the model as it is now, for an evaluation."""
        # Before the training it has a directory of its own: the run's is to be empty when it begins.
        found: dict[str, Any] = {} if self._trained else {"output_dir": f"{self.args.output_dir}-before"}
        reference = self.ref_model
        if isinstance(self._given, str):
            adapted = self._trained is not None and (self._trained / "adapter_config.json").exists()
            if self._trained is not None:
                found["adapter_name_or_path" if adapted else "model_name_or_path"] = str(self._trained)
            if not adapted:  # with an adapter, it is the model without
                reference = reference or self._given
        if STAGES[self.config_class.stage].reference and reference is not None:
            found["ref_model"] = reference
        return found


class _WithReference(Trainer):
    """Trainers whose second argument is the reference."""

    def __init__(self, model: Any = None, ref_model: Any = None, args: Any = None, **more: Any) -> None:
        super().__init__(model, args, ref_model=ref_model, **more)


class DPOTrainer(_WithReference):
    """Preference pairs: rows of prompt, chosen and rejected."""

    config_class = DPOConfig


class KTOTrainer(_WithReference):
    """Answers that are wanted or not: rows of prompt, completion and label."""

    config_class = KTOConfig


class ORPOTrainer(Trainer):
    """Preference pairs without a reference."""

    config_class = ORPOConfig


class RewardTrainer(Trainer):
    """A reward model of preference pairs."""

    config_class = RewardConfig


class SFTTrainer(Trainer):
    """Texts, conversations, or prompts with completions.

    As with TRL, a conversation is trained whole unless `assistant_only_loss` is set, and of a prompt with a completion
    the completion alone unless `completion_only_loss=False`.
    """

    config_class = SFTConfig

    def __init__(self, model: Any = None, args: Any = None, *, formatting_func: Any = None, **more: Any) -> None:
        self.formatting_func = formatting_func
        super().__init__(model, args, **more)
        if self.train_dataset is not None:
            self._keys |= self._kind(self.train_dataset)

    def _kind(self, dataset: Any) -> dict[str, Any]:
        """The stage, and what is trained, as the rows are."""
        rows = rows_of(dataset, "train_dataset")
        first = rows[0] if rows else {}
        if self.formatting_func is not None or self.args_of_rows("dataset_text_field", "text") in first:
            return {"stage": "pt"}
        if "completion" in first:
            only = self.args_of_rows("completion_only_loss", None)
            return {"train_on_prompt": only is False}
        only = self.args_of_rows("assistant_only_loss", False)
        if is_conversation(first) and not only:
            log.info("conversations are trained whole; assistant_only_loss=True trains the answers alone")
        return {"train_on_prompt": not only}

    def args_of_rows(self, name: str, usual: Any) -> Any:
        """What the config says of the rows."""
        value = self.args.given.get(name, usual)
        return usual if value is None else value

    def _given_rows(self, dataset: Any, name: str) -> GivenRows:
        if self.formatting_func is not None:
            return GivenRows(formatted(dataset, self.formatting_func, name))
        column = self.args_of_rows("dataset_text_field", "text")
        rows = given_rows(dataset, name)
        if rows.rows and column in rows.rows[0]:
            return GivenRows(rows.rows, columns={"text": column})
        return rows


class GRPOTrainer(Trainer):
    """Prompts, and functions or a reward model that say what answers are worth."""

    config_class = GRPOConfig

    def __init__(self, model: Any = None, reward_funcs: Any = None, args: Any = None, **more: Any) -> None:
        rewards = (
            [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else list(reward_funcs or ())
        )
        for argument in ("reward_processing_classes", "tools", "rollout_func", "environment_factory"):
            if more.pop(argument, None) is not None:
                raise ConfigError(f"`{argument}` cannot be honoured", where=argument, fix="see reward_funcs")
        if any(isinstance(reward, nn.Module) for reward in rewards):
            raise ConfigError("a reward model is given by its name or directory (reward_model)", where="reward_funcs")
        if any(inspect.iscoroutinefunction(reward) for reward in rewards):
            raise ConfigError("reward functions are plain functions, not coroutines", where="reward_funcs")
        self.reward_models = [reward for reward in rewards if isinstance(reward, str)]
        self.reward_funcs = [reward for reward in rewards if not isinstance(reward, str)]
        if len(self.reward_models) > 1:
            raise ConfigError("there is one reward model (reward_model) to a run", where="reward_funcs")
        super().__init__(model, args, **more)
        if self.reward_models:
            self._keys["reward_model"] = self.reward_models[0]

    def _functions(self) -> dict[str, Any]:
        return {"reward_functions": [trl_reward(f) for f in self.reward_funcs]} if self.reward_funcs else {}

    def evaluate(self, eval_dataset: Any = None, **more: Any) -> dict[str, float]:
        raise ConfigError(
            "a stage that answers prompts is evaluated while it trains", where="evaluate",
            fix="give eval_dataset and eval_strategy",
        )  # fmt: skip


def _refuse_what_a_run_makes_itself(
    data_collator: Any, compute_metrics: Any, optimizers: tuple[Any, Any], more: Mapping[str, Any]
) -> None:
    made = {
        "data_collator": (data_collator, "batches are forests; see train_on_prompt, mask_history, packing"),
        "compute_metrics": (compute_metrics, "callbacks see every metric"),
        "optimizers": (any(optimizers) or None, "optim, learning_rate, lr_scheduler_type"),
        "preprocess_logits_for_metrics": (more.get("preprocess_logits_for_metrics"), "logits are never built"),
        "optimizer_cls_and_kwargs": (more.get("optimizer_cls_and_kwargs"), "optim, learning_rate"),
        "compute_loss_func": (more.get("compute_loss_func"), "trueup.train(objective=…)"),
    }
    for name, (value, instead) in made.items():
        if value is not None:
            raise ConfigError(
                f"`{name}` cannot be honoured: a run makes its own", where=name, fix=f"instead: {instead}"
            )


def _name_of(model: Any) -> str:
    if isinstance(model, str):
        return model
    return getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "") or "model"


def _type_of(model: Any) -> str:
    """What transformers calls its architecture."""
    if isinstance(model, nn.Module):
        return str(model.config.model_type)  # type: ignore[union-attr]
    return model_type(load_config({"model_name_or_path": model}, verb="infer").model)


def _copy_model(source: Path, target: Path) -> None:
    """The files that transformers and peft load."""
    for path in source.iterdir():
        if path.is_file() and path.name.startswith(_MODEL_FILES):
            shutil.copy2(path, target / path.name)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_on_first(*words: Any, **how: Any) -> None:
    if _is_first():
        print(*words, **how)
