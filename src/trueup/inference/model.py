"""A model in one's own code: what it answers, how likely it finds answers, what they are worth to it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, log_softmax

from trueup import memory
from trueup.config.schema import RunConfig
from trueup.data.encoded import Answer, Encoded
from trueup.data.examples import Message, Messages
from trueup.data.forest import build_forest
from trueup.data.templates import load_template
from trueup.data.turns import RowProblem, ShapeProblem, Tags, parse_turns
from trueup.errors import ConfigError, DataError
from trueup.inference.export.export import write_merged
from trueup.inference.export.plan import Plan
from trueup.models.adapters import merge_adapters, merge_part, take_off
from trueup.models.hub import resolve_model
from trueup.models.load import (
    load_base,
    load_for_inference,
    pick_device,
    pick_dtype,
)
from trueup.models.logprobs import sum_by_sequence
from trueup.models.merging import Combination, load_beside
from trueup.models.policy import Policy
from trueup.models.quantise import dequantise, describe
from trueup.models.reward import RewardModel, is_reward_model, load_reward_model
from trueup.models.tokenizer import hub_access, load_tokenizer
from trueup.models.vocabulary import check_vocabulary
from trueup.rollout.engines import Engine, Sampling
from trueup.training.checkpoint import replace_files

log = logging.getLogger("trueup")

Conversation = Sequence[Mapping[str, Any] | Message]
Prompt = str | Conversation


class Model:
    """A policy or a reward model with its tokenizer and template; `trueup.load` makes one.

    A prompt is a text, which is what the user says, or a conversation of `{"role", "content"}`. Either is written as
    the template writes it in training.

    Attributes:
        policy: the model as a function from token forests to log-probabilities.
        tokenizer, template: how texts become tokens.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.tokenizer = load_tokenizer(cfg.model)
        data = cfg.data
        self.template = load_template(
            self.tokenizer, data.template, data.default_system, data.enable_thinking, data.preserve_thinking,
            data.tool_format, cfg.model.split_special_tokens,
        )  # fmt: skip
        self.policy = _load(cfg)
        check_vocabulary(self.policy.base, self.tokenizer, str(cfg.model.model_name_or_path))

    @property
    def scores(self) -> bool:
        """Whether it is a reward model."""
        return isinstance(self.policy, RewardModel)

    @cached_property
    def engine(self) -> Engine:
        if self.scores:
            raise ConfigError(
                "a reward model gives scores, and does not write", fix="ask it for .reward(prompt, answers)"
            )
        return Engine(self.policy, self.tokenizer, self.template.stop_ids)

    # --- answers ------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: Prompt, *, num_answers: None = None, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], *, num_answers: None = None, **sampling: Any) -> list[str]: ...
    def generate(self, prompts: Any, *, num_answers: int | None = None, **sampling: Any) -> Any:
        """The answer to a prompt, or the answers to many; with `num_answers` a list for each.

        Args:
            sampling: `temperature` (0, greedy, unless given), `top_p`, `top_k`, `max_new_tokens`, `seed`, `stop` and
                the others of `trueup.Sampling`.
        """
        single = _is_prompt(prompts)
        asked = [prompts] if single else list(prompts)
        choice = sampling_of(sampling)
        count = num_answers or 1
        ids = [self._prompt_ids(prompt) for prompt in asked]
        rounds = []
        for number in range(count):
            seeded = choice if choice.seed is None else replace(choice, seed=choice.seed + number)
            rounds.append(self.engine.generate_text(ids, seeded))
        answers = [list(group) for group in zip(*rounds, strict=True)]
        told = answers if num_answers else [group[0] for group in answers]
        return told[0] if single else told

    def chat(self, conversation: Prompt, *, stream: bool = False, **sampling: Any) -> str | Iterator[str]:
        """The next turn of a conversation; with `stream`, in pieces as they come."""
        if not stream:
            return self.generate(conversation, **sampling)
        return self.engine.stream(self._prompt_ids(conversation), sampling_of(sampling))

    # --- what it thinks of answers ----------------------------------------------------------------

    def logps(self, prompt: Prompt, answers: str | Sequence[str], *, per_token: bool = False) -> Any:
        """log π(answer | prompt) in nats: a number for one answer, a list for several.

        Sums over the tokens that training would train, the one that ends the answer among them; `per_token` gives
        these one by one. Several answers share the prompt's computation.
        """
        texts, single = _listed(answers)
        found = [v.tolist() if per_token else float(v.sum()) for v in self._token_logps(prompt, texts)]
        return found[0] if single else found

    def reward(
        self, prompt: Prompt, answers: str | Sequence[str], *, beta: float | None = None,
        reference: Model | None = None,
    ) -> Any:  # fmt: skip
        """What each answer is worth: a reward model's score, or the reward that a policy's preference amounts to.

        The latter is β (log π − log π_ref) (arXiv 2305.18290, eq. 5).

        Args:
            beta: of the training; 0.1 unless given.
            reference: what the policy is compared with; without its adapters, the policy itself, unless given.

        Raises:
            ConfigError: there is neither an adapter to switch off nor a `reference`.
        """
        texts, single = _listed(answers)
        if isinstance(self.policy, RewardModel):
            if beta is not None or reference is not None:
                raise ConfigError("`beta` and `reference` have no meaning for a reward model", fix="drop them")
            found = self._scores(self.policy, prompt, texts)
        else:
            there = [float(v.sum()) for v in self._token_logps(prompt, texts)]
            before = self._reference_logps(prompt, texts, reference)
            found = [(0.1 if beta is None else beta) * (a - b) for a, b in zip(there, before, strict=True)]
        return found[0] if single else found

    def _reference_logps(self, prompt: Prompt, answers: list[str], reference: Model | None) -> list[float]:
        if reference is not None:
            return reference.logps(prompt, answers)
        model = self.policy.model
        if not isinstance(model, PeftModel):
            raise ConfigError(
                "a reward is measured against a reference, and this model has no adapter to switch off",
                where="reward", fix="give reference=trueup.load(…): the model that the training started from",
            )  # fmt: skip
        with model.disable_adapter():
            return [float(v.sum()) for v in self._token_logps(prompt, answers)]

    @torch.inference_mode()
    def _token_logps(self, prompt: Prompt, answers: list[str]) -> list[Tensor]:
        if self.scores:
            raise ConfigError("a reward model has no log-probabilities", fix="ask it for .reward(prompt, answers)")
        messages = self._messages(prompt)
        example = Encoded(
            "", np.asarray(self.template.encode_prompt(messages), np.int32),
            tuple(Answer(*self._encoded(messages, text)) for text in answers),
        )  # fmt: skip
        forest = build_forest([example])
        logps = self.policy.token_logps(forest).cpu()
        sizes = sum_by_sequence(torch.ones_like(logps), forest.owner, forest.num_sequences)
        return list(torch.split(logps, sizes.long().tolist()))

    def _scores(self, model: RewardModel, prompt: Prompt, answers: list[str]) -> list[float]:
        messages = self._messages(prompt)
        prompts = [self.template.encode_prompt(messages)] * len(answers)
        return model(prompts, [self._encoded(messages, text)[0] for text in answers]).tolist()

    def _encoded(self, messages: Messages, answer: str) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.template.encode_answer(messages, (Message("assistant", answer),), None)
        return np.asarray(ids, np.int32), np.asarray(mask, bool)

    # --- files ------------------------------------------------------------------------------------

    def merge(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the model with its adapters folded in, its tokenizer and its template, as transformers loads them.

        Adapters are folded in fp32 and rounded once, to `dtype` (the model's own unless given). What was written is
        read back and compared with base and adapters, as by `trueup export`; export.json has the difference.

        Raises:
            ResourceError: the disk has no room. ModelError: an adapter does not fit, or the files are not the model.
        """
        target, section = Path(path), self.cfg.model
        name, cpu = str(section.model_name_or_path), torch.device("cpu")
        if memory.is_name(name):  # no longer known by it; the model itself is in `policy`
            root, location, starts = getattr(self.policy.base, "name_or_path", "") or name, name, []
        else:
            root, location, starts = resolve_model(name, section.adapter_name_or_path, hub_access(section))
        tokenizer = copy.deepcopy(self.tokenizer)
        self.template.attach(tokenizer)
        plan = Plan(
            self.cfg, target, root, location, starts, type(self.policy), self.policy.base, tokenizer, self.template,
            dtype or self.policy.dtype, Combination(), cpu,
        )  # fmt: skip

        def beside() -> Any:
            if memory.is_name(name):
                with self.policy.generating():  # with attention that knows of no forests
                    return self._merged()
            return load_beside(section, root, location, starts, Combination(), cpu, type(self.policy))

        target.mkdir(parents=True, exist_ok=True)
        replace_files(target, lambda stage: write_merged(stage, plan, beside, self._say_what_quantising_changed))
        return target

    def _merged(self) -> Any:
        """The model without adapters, fp32, with what they added."""
        name = str(self.cfg.model.model_name_or_path)
        if memory.is_name(name):
            model, part = copy.deepcopy(self.policy.model), None
            if isinstance(model, PeftModel):
                model, part = take_off(model)
            model = dequantise(model, torch.float32).float()
            return model if part is None else merge_part(model, part, name)
        section = self.cfg.model
        root, location, starts = resolve_model(name, section.adapter_name_or_path, hub_access(section))
        cpu = torch.device("cpu")
        kind = type(self.policy)
        base = load_base(location, section, cpu, torch.float32, root, kind, quantised=False, adapters=starts)
        return merge_adapters(base, starts)

    @torch.no_grad()
    def _say_what_quantising_changed(self, merged: Any) -> None:
        """Adapters trained over quantised weights are folded into full ones: how far that is from what was trained."""
        if self.scores or (kind := describe(self.policy.base)) is None:
            return
        ids = torch.arange(8, 8 + min(64, len(self.tokenizer) - 8))[None]
        with self.policy.generating():
            trained = self.policy.model(input_ids=ids.to(self.policy.device)).logits[0, :-1].float().cpu()
        written = merged(input_ids=ids.to(merged.device)).logits[0, :-1].float().cpu()
        target = ids[0, 1:, None]
        gaps = (log_softmax(trained, -1).gather(1, target) - log_softmax(written, -1).gather(1, target)).abs()
        log.warning(
            "the adapter was trained over %s and is folded into the weights in full: log-probabilities of a probe of "
            "%d tokens differ by %.2g on average and by %.2g at most",
            kind, len(gaps), float(gaps.mean()), float(gaps.max()),
        )  # fmt: skip

    # --- prompts ----------------------------------------------------------------------------------

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.template.encode_prompt(self._messages(prompt))

    def _messages(self, prompt: Prompt) -> Messages:
        if isinstance(prompt, str):
            return (Message("user", prompt),)
        turns = [turn.to_dict() if isinstance(turn, Message) else dict(turn) for turn in prompt]
        try:
            return parse_turns(turns, "prompt", Tags.from_registry({}))
        except (RowProblem, ShapeProblem) as error:
            raise DataError(
                f"the prompt is no conversation: {error}", where="prompt",
                expected='a text, or [{"role": "user", "content": …}, …]',
            ) from error  # fmt: skip


def _load(cfg: RunConfig) -> Policy:
    section = cfg.model
    if not is_reward_model(section):
        return load_for_inference(section, cfg.train)
    device = pick_device(section.device)
    dtype = pick_dtype(device, cfg.train.bf16, cfg.train.fp16)
    return load_reward_model(section, str(section.model_name_or_path), section.adapter_name_or_path, device, dtype)


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """The keywords of `generate` as the engine takes them. Raises ConfigError for one that there is not."""
    known = Sampling.__dataclass_fields__
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            f"generate has no argument {unknown[0]!r}", where="generate", expected=", ".join(known)
        )  # fmt: skip
    values = dict(given)
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    return Sampling(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _is_prompt(value: Any) -> bool:
    """Whether this is one prompt, and not a list of prompts."""
    return isinstance(value, str) or (bool(value) and isinstance(value[0], Mapping | Message))


def _listed(answers: str | Sequence[str]) -> tuple[list[str], bool]:
    return ([answers], True) if isinstance(answers, str) else (list(answers), False)
