"""The rewards and the judge that a config names, ready to be asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trueup import memory
from trueup.config.schema import RunConfig
from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Message
from trueup.data.templates import load_template, own_source
from trueup.errors import ConfigError
from trueup.models.hub import is_adapter_dir, resolve_model
from trueup.models.load import hub_access, load_tokenizer
from trueup.models.quantise import in_bits
from trueup.models.reward import RewardModel, load_reward_model
from trueup.models.scorer import is_text_classifier, load_text_scorer
from trueup.models.tokenizer import UNCHANGED
from trueup.recipes.prompts import PromptRows
from trueup.rollout.rewards import (
    Answered,
    FunctionReward,
    GivenReward,
    HttpReward,
    ModelReward,
    Reward,
    Workers,
    as_columns,
)
from trueup.rollout.worker import file_and_function

log = logging.getLogger("trueup")


class Judges:
    """Every reward with its weight, and the judge of pairs if there is one."""

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float], judge: str | None, workers: Workers
    ) -> None:
        self.rewards = list(rewards)
        self.names = _distinct([reward.name for reward in rewards])
        self.weights = np.array(weights, dtype=np.float64)
        self.judge = judge
        self.workers = workers

    def score(self, answers: Sequence[Answered]) -> np.ndarray:
        """[S, rewards] float64; NaN where a reward has no opinion, or one that is not finite."""
        columns = [[np.nan if s is None else s for s in reward.score(answers)] for reward in self.rewards]
        scores = np.array(columns, dtype=np.float64).reshape(len(self.rewards), len(answers)).T
        return np.where(np.isfinite(scores), scores, np.nan)

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """[S, rewards] → [S] weighted sums; NaN where no reward has an opinion."""
        known = np.isfinite(scores)
        return np.where(known.any(axis=1), np.nansum(scores * self.weights, axis=1), np.nan)

    def prefer(self, first: Sequence[Answered], second: Sequence[Answered]) -> list[int]:
        """What the judge says of each pair: 0 the first is better, 1 the second, -1 neither."""
        assert self.judge is not None
        batch = as_columns(first)
        batch["completions"] = [[a.completion, b.completion] for a, b in zip(first, second, strict=True)]
        return [-1 if verdict is None else int(verdict) for verdict in self.workers.call(self.judge, batch)]

    def close(self) -> None:
        for reward in self.rewards:
            reward.close()
        self.workers.close()


def load_judges(
    cfg: RunConfig, template: ChatTemplate, rows: PromptRows, device: torch.device, dtype: torch.dtype
) -> Judges:
    """Everything that says what an answer is worth.

    Raises:
        ConfigError: a function is not there. ModelError: the reward model cannot be had.
    """
    online = cfg.online
    workers = Workers(online.reward_timeout)
    try:
        rewards: list[Reward] = [_function(name, workers) for name in online.reward_funcs]
        if online.judge:
            workers.check(online.judge, "judge")
        if online.reward_model:
            rewards.append(_reward_model(cfg, template, rows, device, dtype))
    except BaseException:
        workers.close()
        raise
    return Judges(rewards, online.reward_weights or [1.0] * len(rewards), online.judge, workers)


def _function(name: str, workers: Workers) -> Reward:
    if memory.is_name(name):
        return GivenReward(name.removeprefix(memory.PREFIX), memory.held(name, "reward_funcs"))
    return FunctionReward(name, workers)


def _reward_model(
    cfg: RunConfig, template: ChatTemplate, rows: PromptRows, device: torch.device, dtype: torch.dtype
) -> Reward:
    name = str(cfg.online.reward_model)
    if name.startswith(("http://", "https://")):
        return HttpReward(name)
    _check_kind(cfg, name)
    if not cfg.online.reward_model_adapters and not is_adapter_dir(name) and is_text_classifier(cfg.model, name):
        if cfg.online.reward_model_quantization_bit:
            raise ConfigError(
                f"`reward_model: {name}` is no decoder, and is small enough to stay as it is",
                where="reward_model_quantization_bit", fix="drop it",
            )  # fmt: skip
        scorer = load_text_scorer(cfg.model, name, device, dtype)
        return ModelReward(lambda answers: scorer([a.prompt for a in answers], [a.completion for a in answers]))
    section = in_bits(cfg.model, cfg.online.reward_model_quantization_bit)
    section = section.model_copy(update=UNCHANGED)
    found = load_reward_model(section, name, cfg.online.reward_model_adapters, device, dtype)
    return ModelReward(_Rendered(found, _template_of(cfg, name, template), rows))


def _check_kind(cfg: RunConfig, name: str) -> None:
    """Whether the reward model is what `reward_model_type` says: one with adapters, or a whole one."""
    kind = cfg.online.reward_model_type
    if kind is None:
        return
    keys = "reward_model", "reward_model_adapters"
    _, _, adapters = resolve_model(name, cfg.online.reward_model_adapters, hub_access(cfg.model), keys)
    if (kind == "lora") != bool(adapters):
        is_now = "is an adapter" if adapters else "is a whole model, and there are no reward_model_adapters"
        raise ConfigError(
            f"`reward_model_type: {kind}`, but `reward_model: {name}` {is_now}", where="reward_model_type",
            fix="drop reward_model_type: what reward_model is can be seen",
        )  # fmt: skip


def _template_of(cfg: RunConfig, name: str, template: ChatTemplate) -> ChatTemplate:
    """The reward model's own template, on its own tokenizer; the run's where it has none."""
    update = {**UNCHANGED, "model_name_or_path": name, "adapter_name_or_path": cfg.online.reward_model_adapters}
    tokenizer = load_tokenizer(cfg.model.model_copy(update=update))
    if own_source(tokenizer) is None:
        log.info("the reward model has no chat template of its own: it reads that of the run, %s", template.name)
        return load_template(tokenizer, template.name)
    return load_template(tokenizer, None)


class _Rendered:
    """A reward model on conversations: the row's messages and the answer, as its own template writes them."""

    def __init__(self, model: RewardModel, template: ChatTemplate, rows: PromptRows) -> None:
        self.model, self.template, self.rows = model, template, rows

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        prompts, replies = [], []
        for answer in answers:
            asked = self.rows.prompt(answer.row)
            reply = (Message("assistant", answer.completion),)
            prompts.append(self.template.encode_prompt(asked.messages, asked.tools))
            replies.append(self.template.encode_answer(asked.messages, reply, asked.tools)[0])
        return self.model(prompts, replies).tolist()


def reward_names(cfg: RunConfig) -> list[str]:
    """The names that a run's rewards are logged under."""
    functions = [name.rpartition(":")[2] for name in cfg.online.reward_funcs]
    return _distinct(functions + ["reward_model"] * bool(cfg.online.reward_model))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names to log under; a second one of the same name gets a number."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def check_files(cfg: RunConfig) -> None:
    """Whether files of functions are there and a reward model is what it is said to be; before anything is loaded."""
    online = cfg.online
    if online.reward_model and online.reward_model_type in ("lora", "full") and Path(online.reward_model).is_dir():
        _check_kind(cfg, online.reward_model)
    for key, names in (("reward_funcs", online.reward_funcs), ("judge", [online.judge or ""])):
        for name in names:
            path, _ = file_and_function(name)
            if path and not memory.is_name(name) and not Path(path).is_file():
                raise ConfigError(f"there is no file {path}", where=key, expected="FILE.py:NAME", fix=f"create {path}")
