"""What a server has loaded: ids and what speaks under each, tokens, rewards."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trueup import __version__
from trueup.config.schema import RunConfig
from trueup.data.examples import Json, Message
from trueup.data.rendering import TemplateRefusal
from trueup.errors import ConfigError, ModelError
from trueup.inference.model import Model
from trueup.inference.server.asking import AskScore, Draw
from trueup.inference.server.failures import ApiError, refuse, too_late
from trueup.inference.server.settings import Settings
from trueup.inference.server.token_text import TokenText
from trueup.inference.server.tool_calls import family_of
from trueup.models import rope
from trueup.models.hub import download_adapter, hub_access
from trueup.models.reward import RewardModel
from trueup.rollout.engines import BASE, Engine, Limits, Sampling
from trueup.rollout.grammar import Grammar, NoGrammar

Made = TypeVar("Made")


@dataclass(frozen=True)
class Worth:
    """What an answer is worth; `tokens`: where a policy's part in it comes from, token by token."""

    score: float
    tokens: list[Json] | None = None

    def to_dict(self) -> Json:
        return {"score": self.score} | ({} if self.tokens is None else {"tokens": self.tokens})


class Served:
    """Models by id. Ids are names, never paths.

    Attributes:
        voices: id → the engine's adapter. rewards: id → the reward model.
        created: when it was loaded.
        fingerprint: of ids and version, for `system_fingerprint`.
    """

    def __init__(self, cfg: RunConfig, settings: Settings) -> None:
        self.cfg, self.settings = cfg, settings
        main = Model(cfg)
        base = short_name(str(cfg.model.model_name_or_path))
        acting = [short_name(name) for name in cfg.model.adapter_name_or_path]
        name = settings.name or ("+".join(acting) if acting else base)
        self.engine: Engine | None = None
        self.voices: dict[str, str | None] = {}
        self.rewards: dict[str, Model] = {}
        if main.scores:
            if settings.adapters:
                raise ConfigError(
                    "adapters are served on a language model, and this is a reward model", where="--adapter"
                )
            self.rewards[name] = main
        else:
            limits = Limits(max_slots=settings.limits.slots, max_queue=settings.limits.queue)
            self.engine = Engine(main.policy, main.tokenizer, main.template.stop_ids, limits)
            self.voices = self._voices(name, base)
        for path in settings.reward_models:
            self._add_reward(path)
        self.main = main
        self.template, self.tokenizer = main.template, main.tokenizer
        self.family = family_of(main.template)
        self.tokens = TokenText(main.tokenizer)
        self.created = int(time.time())
        ids = "\n".join([__version__, *self.voices, *self.rewards])
        self.fingerprint = f"fp_{hashlib.sha256(ids.encode()).hexdigest()[:10]}"
        # One thread writes prompts: tokenizers do not like company. Others wait for scores, and compile grammars.
        self._words = ThreadPoolExecutor(1, "trueup-words")
        self._scores = ThreadPoolExecutor(1, "trueup-scores")
        self._grammars = ThreadPoolExecutor(1, "trueup-grammars")

    def _voices(self, name: str, base: str) -> dict[str, str | None]:
        assert self.engine is not None
        voices: dict[str, str | None] = {name: None}
        for other, path in self.settings.adapters.items():
            if other in voices or other in (base, BASE):
                raise ConfigError(f"two models are called {other!r}", where="--adapter", fix="give it another name")
            self.engine.attach(other, [download_adapter(path, hub_access(self.cfg.model), "--adapter")])
            voices[other] = other
        if self.engine.adapters and base not in voices:
            voices[base] = BASE
        return voices

    def _add_reward(self, path: str) -> None:
        name = short_name(path)
        if name in self.voices or name in self.rewards:
            raise ConfigError(f"two models are called {name!r}", where="--reward-model", fix="rename its directory")
        model = Model(self.cfg.replace(model_name_or_path=path, adapter_name_or_path=[]))
        if not model.scores:
            raise ModelError(f"{path} is no reward model", where="--reward-model", expected="an output of stage: rm")
        self.rewards[name] = model

    # --- ids --------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        return [*self.voices, *self.rewards]

    @property
    def context(self) -> int:
        """Tokens that prompt and answer together may have."""
        if self.engine is not None:
            return self.engine.context
        return context_of(self.main)

    def voice(self, model: str) -> tuple[Engine, str | None]:
        """Who writes under this id. Raises ApiError."""
        self.known(model)
        if self.engine is None or model not in self.voices:
            raise refuse("model", f"{model} scores answers and does not write; POST /v1/score", "model_not_supported")
        return self.engine, self.voices[model]

    def known(self, model: str) -> str:
        """The id itself. Raises ApiError."""
        if model not in self.voices and model not in self.rewards:
            raise ApiError(404, f"there is no model {model[:200]!r} here", "model", "model_not_found")
        return model

    # --- prompts ----------------------------------------------------------------------------------

    async def in_words(self, work: Callable[[], Made]) -> Made:
        """The result of something that reads or writes tokens, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._words, work)

    async def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int]:
        """A conversation up to where the assistant begins. Raises ApiError."""
        return await self.in_words(lambda: prompt_of(self.main, messages, tools))

    async def grammar(self, text: str, field: str) -> Grammar:
        """A grammar ready to be kept to. Raises ApiError, naming the field that asks for it."""
        assert self.engine is not None
        work = asyncio.get_running_loop().run_in_executor(self._grammars, self.engine.compile, text)
        try:
            return await asyncio.wait_for(work, self.settings.limits.deadline)
        except NoGrammar as error:
            raise refuse(field, str(error)) from None
        except TimeoutError:
            raise too_late() from None

    def sampling(self, ask: Draw, max_tokens: int | None, logprobs: int | None, **more: Any) -> Sampling:
        """How to draw: what the request says, else the operator's config, else as OpenAI does. Raises ApiError."""
        keys, said = self.cfg.generate, self.cfg.explicit
        if max_tokens is not None and max_tokens > self.context:
            raise refuse("max_tokens", f"the model's context is {self.context:,} tokens", "context_length_exceeded")

        def chosen(value: Any, key: str, otherwise: Any) -> Any:
            return value if value is not None else keys[key] if key in said else otherwise

        greedy = "do_sample" in said and not keys.do_sample
        return Sampling(
            **{
                "temperature": chosen(ask.temperature, "temperature", 0.0 if greedy else 1.0),
                "top_p": chosen(ask.top_p, "top_p", 1.0),
                "top_k": max(chosen(ask.top_k, "top_k", 0), 0),
                "repetition_penalty": chosen(ask.repetition_penalty, "repetition_penalty", 1.0),
                "max_new_tokens": max_tokens or keys.max_new_tokens,
                "min_p": ask.min_p,
                "presence_penalty": ask.presence_penalty,
                "frequency_penalty": ask.frequency_penalty,
                "logit_bias": ask.logit_bias,
                "stop": ask.stops,
                "stop_ids": tuple(ask.stop_token_ids),
                "seed": None if ask.seed is None else ask.seed % 2**62,
                "logprobs": logprobs,
                "skip_special_tokens": ask.skip_special_tokens,
                **more,
            }
        )

    # --- rewards ----------------------------------------------------------------------------------

    async def score(self, ask: AskScore, conversations: Sequence[Sequence[Message]]) -> tuple[list[Worth], int]:
        """(what the last turn of each is worth, tokens read). Raises ApiError."""
        loop = asyncio.get_running_loop()
        if ask.model in self.rewards:
            if ask.reference or ask.logprobs:
                field = "reference" if ask.reference else "logprobs"
                raise refuse(field, f"{ask.model} is a reward model, and has none", "unsupported_parameter")
            reward = self.rewards[ask.model]
            return await loop.run_in_executor(self._scores, lambda: self._rewards(reward, conversations))
        engine, voice = self.voice(ask.model)
        reference = BASE if ask.reference is None else self.voice(ask.reference)[1]
        if ask.reference is None and (BASE not in engine.adapters or voice == BASE):
            message = f"{ask.model} is no reward model, and has no adapter whose preference could be read"
            raise refuse("model", message, "model_not_supported")
        return await loop.run_in_executor(
            self._scores, lambda: self._implicit(engine, (voice, reference), conversations, ask)
        )

    def _rewards(self, model: Model, conversations: Sequence[Sequence[Message]]) -> tuple[list[Worth], int]:
        rows = [answer_of(model, one) for one in conversations]
        assert isinstance(model.policy, RewardModel)
        scores = model.policy([prompt for prompt, _, _ in rows], [answer for _, answer, _ in rows])
        return [Worth(score) for score in scores.tolist()], sum(len(p) + len(a) for p, a, _ in rows)

    def _implicit(
        self, engine: Engine, voices: tuple[str | None, str | None], conversations: Sequence[Sequence[Message]],
        ask: AskScore,
    ) -> tuple[list[Worth], int]:  # fmt: skip
        """β (log π − log π_ref) of each answer, over the tokens that training trains (arXiv 2305.18290, eq. 5)."""
        rows = [answer_of(self.main, one, ask.complete) for one in conversations]
        sequences = [[*prompt, *answer] for prompt, answer, _ in rows]
        scored = [engine.score(sequences, adapter=adapter) for adapter in voices]
        found = []
        for number, (_, answer, trained) in enumerate(rows):
            policy, reference = ([t.logp for t in one[number].tokens[-len(answer) :]] for one in scored)
            ratios = [a - b for a, b, kept in zip(policy, reference, trained, strict=True) if kept]
            told = zip(answer, policy, reference, trained, strict=True) if ask.logprobs else ()
            found.append(Worth(ask.beta * sum(ratios), [self._token(*one) for one in told] if ask.logprobs else None))
        return found, sum(map(len, sequences))

    def _token(self, token: int, logp: float, reference: float, trained: bool) -> Json:
        return {
            "token": self.tokens.text(token), "bytes": self.tokens.raw(token), "logprob": logp,
            "reference_logprob": reference, "trained": trained,
        }  # fmt: skip

    def close(self) -> None:
        """End what is under way."""
        if self.engine is not None:
            self.engine.close(drain=False)
        self._words.shutdown(wait=False, cancel_futures=True)
        self._scores.shutdown(wait=False, cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)


def prompt_of(model: Model, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int]:
    """Raises ApiError where the template does not take the conversation."""
    try:
        return model.template.encode_prompt(messages, tools)
    except (TemplateRefusal, ModelError) as error:
        raise refuse("messages", str(error).splitlines()[0]) from None


def answer_of(
    model: Model, messages: Sequence[Message], complete: bool = True
) -> tuple[list[int], list[int], list[bool]]:
    """(prompt, answer, which of its tokens training trains) of a conversation that ends with an answer.

    The token that ends an answer is there only if it is `complete`. Raises ApiError.
    """
    *before, last = messages
    if last.role != "assistant":
        raise refuse("messages", "the last message has to be the assistant's: it is what is scored")
    prompt = prompt_of(model, before)
    try:
        ids, trained = model.template.encode_answer(before, (last,), None)
    except (TemplateRefusal, ModelError) as error:
        raise refuse("messages", str(error).splitlines()[0]) from None
    if not complete and len(ids) and int(ids[-1]) in model.template.stop_ids:
        ids, trained = ids[:-1], trained[:-1]
    if not len(ids):
        raise refuse("messages", "the last message is empty: there is nothing to score")
    if (length := len(prompt) + len(ids)) > (most := context_of(model)):
        message = f"the conversation has {length:,} tokens, and the model takes {most:,}"
        raise ApiError(400, message, "messages", "context_length_exceeded")
    return prompt, ids.tolist(), trained.tolist()


def context_of(model: Model) -> int:
    """Tokens a model was made for."""
    return rope.context_of(model.policy.base.config, 2**31)


def short_name(name: str) -> str:
    """An id for a model: a hub's id as it is, of a directory its own name (with its run's, for a checkpoint)."""
    path = Path(name).expanduser()
    if not path.exists():
        return path.as_posix().strip("/") if not path.is_absolute() and ".." not in path.parts else path.name
    path = path.resolve()
    return f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
