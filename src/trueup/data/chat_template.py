"""One chat template bound to one tokenizer: conversations → spans of text, trained or not.

A prompt is rendered with the generation header, exactly as at inference; an answer is what the
rendering of the whole conversation adds to it, up to and including the token that ends the turn. So
masks are right by construction, also for templates that trim, merge or rewrite.

Whatever we add to a template (a system message merged into the first question, a missing generation
header) is written into its text, so that a saved tokenizer renders what was trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trueup.data.examples import Json, Message
from trueup.data.rendering import Renderer, TemplateRefusal
from trueup.data.spans import Span, SpanTokenizer, any_of
from trueup.data.template_probe import adapt, control_tokens, find_ends, shows_tools

_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn: the text a server would prompt with, and what the model should add."""

    prompt: str
    answer: str


class ChatTemplate:
    """A template bound to a tokenizer. Made by `load_template`.

    Attributes:
        name, jinja: its name, and its text with everything we added.
        ends: where its answers begin and end.
        stop_ids: token ids at which generation stops, the end of a turn first.
        plain_prefix: the ids that open a text without a template (BOS, where there is one).
        supports_tools: whether it tells the model which tools there are.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        jinja: str,
        *,
        stop: Sequence[str] | None = None,
        enable_thinking: bool | None = True,
        preserve_thinking: bool = False,
        split_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.enable_thinking = enable_thinking
        self.split_special_tokens = split_special_tokens
        variables = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
        variables.pop("pad_token", None)  # ours to choose, and no template's business
        if preserve_thinking:
            variables["preserve_thinking"] = True
        self.renderer = adapt(Renderer(jinja, variables), name, enable_thinking)
        self.jinja = self.renderer.source
        self.ends = find_ends(self.renderer, tokenizer, name, enable_thinking, stop)
        self.stop_ids = tuple(tokenizer.convert_tokens_to_ids(list(self.ends.stops)))
        control = control_tokens(self.renderer, tokenizer, enable_thinking)
        self.spans = SpanTokenizer(tokenizer, control)
        self.plain_prefix = plain_prefix(tokenizer)
        self._control = any_of(control)
        self._stops = any_of(self.ends.stops)

    @cached_property
    def supports_tools(self) -> bool:
        return shows_tools(self.renderer, self.enable_thinking)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides what this template makes of a conversation."""
        settings = [self.enable_thinking, self.split_special_tokens, self.renderer.variables]
        parts = json.dumps([self.jinja, *astuple(self.ends), *settings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    # --- for those who want text or ids of one conversation -----------------------------

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, for people to read. Raises TemplateRefusal."""
        dicts = [message.to_dict() for message in messages]
        thinking = self.enable_thinking
        return self.renderer.text(dicts, tools, header=add_generation_prompt, thinking=thinking)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int]:
        """Token ids of a prompt, including the assistant's header. Raises TemplateRefusal."""
        span = Span(self.prompt_text(messages, tools), trained=False)
        return self.spans.encode([[span]])[0][0].tolist()

    def encode_answer(
        self,
        prompt: Sequence[Message],
        answer: Sequence[Message],
        tools: Sequence[Json] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [A] int32 and loss mask [A] bool of `answer`, to follow `encode_prompt(prompt)`."""
        opening, *rest = self.answer_spans(prompt, [answer], tools)[0]
        return flatten(rest, self.spans.encode([[opening, *rest]])[0][1:])

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Json] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T] int32 and loss mask [T] bool of a whole conversation.

        Raises TemplateRefusal if the template rewrites earlier turns, so that no single sequence
        shows every answer as it was given: `chat_spans` then gives one sequence for each.
        """
        sequences = self.chat_spans(messages, tools)
        if len(sequences) > 1:
            raise TemplateRefusal("the chat template rewrites earlier turns")
        return flatten(sequences[0], self.spans.encode(sequences)[0])

    def attach(self, tokenizer: Any) -> None:
        """Make this the template that `tokenizer` is saved with."""
        tokenizer.chat_template = self.jinja

    def has_control_tokens(self, texts: Iterable[str]) -> bool:
        """Whether control tokens stand written in any of `texts`."""
        return any(map(self._control.search, texts))

    # --- spans --------------------------------------------------------------------------

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> str:
        """The text a server would prompt with; control tokens in the messages are broken up."""
        dicts, tools, thinking = self._clean(messages), self._protect(tools), self.enable_thinking
        return self.renderer.text(dicts, tools, header=True, thinking=thinking)

    def answer_spans(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        tools: Sequence[Json] | None = None,
    ) -> list[list[Span]]:
        """For each answer, which may hold several turns: the shared prompt's span, then its own.

        One header for all: with `enable_thinking: None` it invites reasoning if any answer reasons.
        """
        thinking = self._thinking([message for answer in answers for message in answer])
        opening, tools = self._clean(prompt), self._protect(tools)
        header = self.renderer.text(opening, tools, header=True, thinking=thinking)
        sequences = []
        for answer in answers:
            dicts = [*opening, *self._clean(answer)]
            turns = [
                self._turn(dicts[: i + 1], tools, thinking, header if i == len(prompt) else None)
                for i, message in enumerate(answer, len(prompt))
                if message.role == "assistant"
            ]
            spans = self._join(turns)
            if spans is None:
                raise TemplateRefusal("the chat template rewrites turns inside an answer")
            sequences.append(spans)
        return sequences

    def chat_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None = None,
        mask_history: bool = False,
    ) -> list[list[Span]]:
        """The spans of a conversation whose assistant turns (`mask_history`: the last) are trained.

        Usually one sequence. Where the template rewrites earlier turns (Qwen3 drops their
        reasoning), one for each assistant turn, with the history as a server would show it.
        """
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise TemplateRefusal("no assistant turn")
        messages = messages[: answers[-1] + 1]
        if self.renderer.marks_answers and (spans := self._marked(messages, tools, mask_history)):
            return [spans]
        turns = self._turns(messages, tools, answers[-1] if mask_history else 0)
        joined = self._join(turns)
        return [joined] if joined else [self._join([turn]) or [] for turn in turns]

    def _turns(self, messages: Sequence[Message], tools: Sequence[Json] | None, first: int) -> list[Turn]:
        """The assistant turns from message `first` on, each with its own `thinking`."""
        dicts, tools = self._clean(messages), self._protect(tools)
        return [
            self._turn(dicts[: i + 1], tools, self._thinking([message]))
            for i, message in enumerate(messages)
            if i >= first and message.role == "assistant"
        ]

    def _turn(
        self, messages: list[Json], tools: Sequence[Json] | None, thinking: bool | None, prompt: str | None = None
    ) -> Turn:
        """The last message as a turn; `prompt` is the rendering of the others, if it is known."""
        if prompt is None:
            prompt = self.renderer.text(messages[:-1], tools, header=True, thinking=thinking)
        full = self.renderer.text(messages, tools, thinking=thinking)
        content = messages[-1]["content"]
        added = full[len(prompt) :] if full.startswith(prompt) else ""
        if added and ("</think>" in added or "</think>" not in content):
            answer = self._closed(added)
        else:
            # The template drops reasoning even from the newest answer, or its header opens a
            # thought that it does not repeat there. The model then writes the content itself.
            answer = self._after_header(content) + self.ends.end
        if content.rpartition("</think>")[2].strip() not in answer:
            raise TemplateRefusal("the chat template leaves out part of an answer")
        return Turn(prompt, answer)

    def _join(self, turns: list[Turn]) -> list[Span] | None:
        """One sequence of all turns; None if a prompt does not begin with the turns before it."""
        spans: list[Span] = []
        text = ""
        for number, turn in enumerate(turns):
            if not turn.prompt.startswith(text):
                return None
            opening = turn.prompt[len(text) :]
            if number and not self.ends.end and (stop := self._stops.match(opening)):
                # Families without an end of turn stop by opening the next header.
                spans[-1] = Span(spans[-1].text + stop[0], trained=True)
                opening = opening[stop.end() :]
            spans += [Span(opening, trained=False), Span(turn.answer, trained=True)]
            text = turn.prompt + turn.answer
        return self._finished(spans)

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Json] | None, mask_history: bool
    ) -> list[Span] | None:
        """Spans by the template's own {% generation %} marks, each with the end of its turn."""
        dicts, tools = self._clean(messages), self._protect(tools)
        text, marks = self.renderer.marked(dicts, tools, self.enable_thinking)
        end = self.ends.end
        spans: list[Span] = []
        cursor = 0
        for start, stop in marks[-1:] if mask_history else marks:
            closed = text[start:stop].rstrip().endswith(end.strip())
            stop += 0 if closed or not text.startswith(end, stop) else len(end)
            spans += [Span(text[cursor:start], trained=False), Span(text[start:stop], trained=True)]
            cursor = stop
        return self._finished(spans) if spans else None

    def _finished(self, spans: list[Span]) -> list[Span]:
        """Put after the last answer what the template leaves to the next turn."""
        if self.ends.final:
            spans[-1] = Span(spans[-1].text + self.ends.final, trained=True)
        return spans

    def _closed(self, added: str) -> str:
        """What an answer's rendering adds, without what follows the token that ends it."""
        if added.endswith(self.ends.after):
            return added.removesuffix(self.ends.after) + self.ends.end
        # Turns of another sort, such as tool calls, may end otherwise: with a control token.
        closing = [match.end() for match in self._control.finditer(added)]
        return added[: closing[-1]] if closing and not added[closing[-1] :].strip() else added

    def _after_header(self, content: str) -> str:
        if not self.ends.opened:
            return content
        if "</think>" not in content:  # nothing was thought
            return "\n</think>\n\n" + content
        return content.partition("<think>")[2].lstrip("\n") or content

    def _clean(self, messages: Sequence[Message]) -> list[Json]:
        return [self._clean_message(message) for message in messages]

    def _clean_message(self, message: Message) -> Json:
        content = message.content
        if self.enable_thinking is False and message.role == "assistant":
            content = _THOUGHT.sub("", content)
        clean: Json = {"role": message.role, "content": self._protect(content)}
        if message.tool_calls:
            clean["tool_calls"] = self._protect(list(message.tool_calls))
        return clean

    def _protect(self, value: Any) -> Any:
        """`value` with the control tokens in its strings broken up, at any depth (D23)."""
        if isinstance(value, str):
            return self.spans.protect(value) if self.split_special_tokens else value
        if isinstance(value, dict):
            return {key: self._protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._protect(item) for item in value]
        return value

    def _thinking(self, messages: Iterable[Message]) -> bool:
        if self.enable_thinking is not None:
            return self.enable_thinking
        return any(m.role == "assistant" and "</think>" in m.content for m in messages)


def flatten(spans: Sequence[Span], ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int32 and mask [T] bool of spans and their tokens."""
    if len(ids) == 1:
        return ids[0], np.full(len(ids[0]), spans[0].trained)
    mask = [np.full(len(tokens), span.trained) for span, tokens in zip(spans, ids, strict=True)]
    return np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, bool), *mask])


def plain_prefix(tokenizer: Any) -> list[int]:
    """The ids this tokenizer puts before any text of its own accord."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:i] for i in starts if whole[i : i + len(bare)] == bare), [])
