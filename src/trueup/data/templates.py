"""Chat templates: conversations → spans of text, trained or not.

The tokenizer's own template comes first; named ones are `.jinja` files under `builtin/templates`. All are rendered by
transformers' sandbox. Nothing here knows the markup of a family: where an answer begins and ends is read off what
the template renders. A prompt is rendered with the generation header, exactly as at inference; an answer is what the
rendering of the whole conversation adds to it, up to and including the token that ends the turn.

Whatever we add to a template (a default system message, a system message merged into the first question, a missing
generation header) is written into the template's text itself, so that a saved tokenizer renders what was trained.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from trueup.data.examples import Json, Message
from trueup.data.spans import Span, SpanTokenizer, any_of
from trueup.data.turns import RowProblem
from trueup.errors import ConfigError, ModelError

log = logging.getLogger("trueup")

#: Limits on templates, which come from model repositories and are somebody else's code.
MAX_SOURCE_CHARS = 64 * 1024
MAX_RENDERED_CHARS = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shipped:
    """A named template: its file, and what the file cannot say."""

    file: str
    stop: tuple[str, ...] = ()  # tokens that end a turn beside the one the template writes and EOS
    plain: bool = (
        False  # words instead of control tokens: BOS only where the tokenizer itself puts one
    )
    default_system: str | None = None  # for people: the file holds it


TEMPLATES: dict[str, Shipped] = {
    "qwen": Shipped(
        "qwen",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": Shipped("qwen3"),
    "chatml": Shipped("chatml", stop=("<|im_end|>",)),
    "llama2": Shipped("llama2"),
    "llama3": Shipped("llama3", stop=("<|eom_id|>",)),
    "mistral": Shipped("mistral"),
    "gemma": Shipped("gemma"),
    "glm4": Shipped("glm4", stop=("<|user|>", "<|observation|>")),
    "chatglm3": Shipped("chatglm3", stop=("<|user|>", "<|observation|>")),
    "baichuan2": Shipped("baichuan2"),
    "phi": Shipped("phi"),
    "deepseek": Shipped("deepseek"),
    "deepseek3": Shipped("deepseek3"),
    "alpaca": Shipped(
        "alpaca",
        plain=True,
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "vicuna": Shipped(
        "vicuna",
        plain=True,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "default": Shipped("default", plain=True),
    "empty": Shipped("empty", plain=True),
}

ALIASES = {
    "qwen1.5": "qwen", "qwen2": "qwen", "qwen2.5": "qwen", "qwen2_5": "qwen",
    "qwen3_nothink": "chatml", "yi": "chatml", "smollm": "chatml",
    "llama-2": "llama2", "llama-3": "llama3", "llama3.1": "llama3", "llama3.2": "llama3", "llama3.3": "llama3",
    "gemma2": "gemma", "gemma3": "gemma", "chatglm": "glm4", "chatglm4": "glm4", "glm-4": "glm4",
    "phi3": "phi", "phi-3": "phi", "mixtral": "mistral", "deepseek2": "deepseek", "deepseek_v3": "deepseek3",
}  # fmt: skip

#: LLaMA-Factory's templates for text that we do not ship → the nearest that we do, if one is near.
KNOWN_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "bailing": (), "bailing_v2": (), "breeze": ("mistral",), "chatml_de": ("chatml",), "cohere": (),
    "cpm4": ("chatml",), "dbrx": ("chatml",), "deepseekr1": ("deepseek3",), "hy3": (), "deepseekcoder": ("deepseek",),
    "ernie": ("chatml",), "ernie_nothink": (), "exaone": (), "falcon": (), "falcon_h1": ("chatml",),
    "fewshot": ("empty",), "gemma3n": ("gemma",), "gemma4": ("gemma",), "gemma4n": ("gemma",), "glm4_moe": ("glm4",),
    "glm4_7": ("glm4",), "glmz1": ("glm4",), "gpt_oss": (), "granite3": (), "granite4": (), "hunyuan": (),
    "hunyuan_small": (), "hy_dense_1_8b": (), "hy_dense_7b": (), "index": (), "intern2": ("chatml",),
    "intern_s1": ("chatml",), "lfm2": ("chatml",), "llama2_zh": ("llama2",), "llama4": ("llama3",),
    "mimo": ("qwen3", "qwen"), "mimo_v2": ("qwen3", "qwen"), "minimax1": (), "minimax2": (), "ministral": ("mistral",),
    "ministral3": ("mistral",), "mistral_small": ("mistral",), "moonlight": (), "olmo": (), "openchat": (),
    "openchat-3.6": ("llama3",), "opencoder": ("chatml",), "phi_small": ("phi",), "phi4": ("chatml", "phi"),
    "phi4_mini": ("phi",), "qwen3_5": ("qwen3",), "qwen3_5_nothink": ("chatml",), "qwen3_6": ("qwen3",),
    "sailor": ("chatml",), "seed_coder": (), "seed_oss": (), "smollm2": ("chatml",), "solar": ("alpaca",),
    "starchat": ("phi",), "telechat2": (), "xuanyuan": ("vicuna",), "youtu": (), "yuan": (), "zephyr": ("phi",),
    "aeva": (),
}  # fmt: skip

OWN = "tokenizer"  # the name of a tokenizer's own template
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(RowProblem):
    """A conversation this template cannot express: the row is dropped, counted and shown."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn: the text a server would prompt with, and the text the model should add."""

    prompt: str
    answer: str


class ChatTemplate:
    """A template bound to a tokenizer. Made by `load_template`.

    Attributes: `name`; `jinja`, its text with everything we added; `end`, the text that ends an answer inside a
    conversation ("" if the template writes none); `final`, what is put after the last answer then; `stop_ids`, the
    token ids at which generation stops, the end of a turn first; `unknown_stops`, end markers of the template that
    are not tokens of this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        jinja: str,
        *,
        stop: Sequence[str] = (),
        enable_thinking: bool | None = True,
        preserve_thinking: bool = False,
        split_special_tokens: bool = True,
    ) -> None:
        if len(jinja) > MAX_SOURCE_CHARS:
            raise ModelError(
                f"the chat template has {len(jinja)} characters, more than the {MAX_SOURCE_CHARS} allowed",
                fix="set template: to a named one, or shorten the model's chat_template.jinja",
            )
        self.tokenizer = tokenizer
        self.name = name
        self.enable_thinking = enable_thinking
        self.preserve_thinking = preserve_thinking
        self.split_special_tokens = split_special_tokens
        self._variables = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
        self._variables.pop("pad_token", None)  # ours to choose, and no template's business
        self._set_source(jinja)
        self._adapt()
        self._control = any_of(self._control_tokens())
        self._find_ends(tuple(stop))
        self.spans = SpanTokenizer(tokenizer, self._control_tokens())

    # --- what a template says -------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, for people to read. Raises TemplateRefusal."""
        dicts = [message.to_dict() for message in messages]
        return self._render(dicts, tools, add_generation_prompt, self.enable_thinking)

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Json] | None = None
    ) -> list[int]:
        """Token ids of a prompt, up to and including the assistant's header. Raises TemplateRefusal."""
        span = Span(self.prompt_text(messages, tools), trained=False)
        return self.spans.encode([[span]])[0][0].tolist()

    def encode_answer(
        self,
        prompt: Sequence[Message],
        answer: Sequence[Message],
        tools: Sequence[Json] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [A] int32 and loss mask [A] bool of `answer`, to stand after `encode_prompt(prompt)`."""
        opening, *rest = self.answer_spans(prompt, [answer], tools)[0]
        return flatten(rest, self.spans.encode([[opening, *rest]])[0][1:])

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Json] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] int32 and loss mask [T] bool of a whole conversation.

        Raises TemplateRefusal if the template rewrites earlier turns, so that no single sequence shows every
        answer as it was given: `chat_spans` then gives one sequence per answer.
        """
        sequences = self.chat_spans(messages, tools)
        if len(sequences) > 1:
            raise TemplateRefusal("the chat template rewrites earlier turns")
        return flatten(sequences[0], self.spans.encode(sequences)[0])

    def attach(self, tokenizer: Any) -> None:
        """Make this the template that `tokenizer` is saved with."""
        tokenizer.chat_template = self.jinja

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides what this template makes of a conversation."""
        parts = [self._source, self.end, self.final, self.enable_thinking, self.preserve_thinking,
                 self.split_special_tokens, self._variables]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # --- spans ----------------------------------------------------------------------------------------------

    def prompt_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The text a server would prompt with; control tokens in the messages are broken up."""
        thinking = self.enable_thinking if thinking is None else thinking
        return self._render(self._clean(messages), self._protect(tools), True, thinking)

    def answer_spans(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        tools: Sequence[Json] | None = None,
    ) -> list[list[Span]]:
        """For each answer, which may hold several turns, its spans after those of the shared prompt, the first.

        One header for all: with `enable_thinking: None` it invites reasoning if any of the answers reasons.
        """
        thinking = self._thinking([message for answer in answers for message in answer])
        sequences = []
        for answer in answers:
            spans = self._conversation([*prompt, *answer], tools, len(prompt), thinking)
            if len(spans) > 1:
                raise TemplateRefusal(
                    "the chat template rewrites earlier turns of an answer of several turns"
                )
            sequences.append(spans[0])
        return sequences

    def chat_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None = None,
        mask_history: bool = False,
    ) -> list[list[Span]]:
        """The spans of a conversation in which every assistant turn (with `mask_history`, the last) is trained.

        Usually one sequence. Where the template rewrites earlier turns (Qwen3 drops their reasoning), one for each
        assistant turn, with the history as a server would show it.
        """
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise TemplateRefusal("no assistant turn")
        messages = messages[: answers[-1] + 1]
        if self._marks_generation and (spans := self._marked(messages, tools, mask_history)):
            return [spans]
        first = answers[-1] if mask_history else 0
        return self._conversation(messages, tools, first, self._thinking(messages[first:]))

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Json] | None,
        first: int,
        thinking: bool | None,
    ) -> list[list[Span]]:
        dicts, tools = self._clean(messages), self._protect(tools)
        turns = [
            self._turn(dicts, i, tools, thinking)
            for i in range(first, len(dicts))
            if dicts[i]["role"] == "assistant"
        ]
        joined = self._join(turns)
        return [joined] if joined else [self._join([turn]) or [] for turn in turns]

    def _turn(
        self, messages: list[Json], i: int, tools: Sequence[Json] | None, thinking: bool | None
    ) -> Turn:
        prompt = self._render(messages[:i], tools, True, thinking)
        full = self._render(messages[: i + 1], tools, False, thinking)
        content = messages[i]["content"]
        added = full.removeprefix(prompt) if full.startswith(prompt) else None
        if added is not None and ("</think>" in added or "</think>" not in content):
            answer = self._close(added)
        elif self._opened is not None:
            # The template drops reasoning even from the newest answer, or its header opens a thought that it does
            # not repeat there. What the model has to write after that header is then the content itself.
            answer = self._after_header(content) + self.end
        else:
            raise TemplateRefusal("the chat template's header does not lead to its answers")
        visible = content.rpartition("</think>")[2].strip()
        if visible not in answer:
            raise TemplateRefusal("the chat template leaves out part of the answer")
        return Turn(prompt, answer)

    def _join(self, turns: list[Turn]) -> list[Span] | None:
        """One sequence of all turns; None if a later prompt does not begin with the earlier turns."""
        spans: list[Span] = []
        text = ""
        for number, turn in enumerate(turns):
            if not turn.prompt.startswith(text):
                return None
            opening = turn.prompt[len(text) :]
            if number and (stop := self._stops.match(opening)) and not self.end:
                # Families without an end of turn stop by opening the next header: that token is the answer's end.
                spans[-1] = Span(spans[-1].text + stop[0], trained=True)
                opening = opening[stop.end() :]
            spans += [Span(opening, trained=False), Span(turn.answer, trained=True)]
            text = turn.prompt + turn.answer
        if not self.end:
            spans[-1] = Span(spans[-1].text + self.final, trained=True)
        return spans

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Json] | None, mask_history: bool
    ) -> list[Span] | None:
        """Spans by the template's own {% generation %} marks, each completed by the end of its turn."""
        text, marks = self._render_marked(self._clean(messages), self._protect(tools))
        spans: list[Span] = []
        cursor = 0
        for start, stop in marks[-1:] if mask_history else marks:
            if self.end and not text[start:stop].rstrip().endswith(self.end.rstrip()):
                stop += len(self.end) if text.startswith(self.end, stop) else 0
            spans += [Span(text[cursor:start], trained=False), Span(text[start:stop], trained=True)]
            cursor = stop
        if spans and not self.end:
            spans[-1] = Span(spans[-1].text + self.final, trained=True)
        return spans or None

    def _close(self, added: str) -> str:
        """What an answer's rendering adds, without what follows the token that ends it."""
        if self._after and added.endswith(self._after):
            return added.removesuffix(self._after) + self.end
        last = None
        for last in self._control.finditer(added):
            pass
        return added[: last.end()] if last and not added[last.end() :].strip() else added

    def _after_header(self, content: str) -> str:
        if not self._opened:
            return content
        if "</think>" in content:
            return content.partition("<think>")[2].lstrip("\n") if "<think>" in content else content
        return "\n</think>\n\n" + content  # nothing was thought

    def _clean(self, messages: Sequence[Message]) -> list[Json]:
        dicts = [message.to_dict() for message in messages]
        if self.enable_thinking is False:
            for message in dicts:
                if message["role"] == "assistant":
                    message["content"] = _THOUGHT.sub("", message["content"])
        return self._protect(dicts)

    def _protect(self, value: Any) -> Any:
        """`value` with the control tokens in its strings broken up, at any depth."""
        if isinstance(value, str):
            return self.spans.protect(value) if self.split_special_tokens else value
        if isinstance(value, dict):
            return {key: self._protect(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._protect(item) for item in value]
        return value

    def _thinking(self, messages: Iterable[Message]) -> bool | None:
        if self.enable_thinking is not None:
            return self.enable_thinking
        return any(
            message.role == "assistant" and "</think>" in message.content for message in messages
        )

    # --- rendering ------------------------------------------------------------------------------------------

    def _set_source(self, jinja: str) -> None:
        self.jinja = jinja
        self._source = _frozen_dates(jinja) + jinja
        self._marks_generation = bool(_GENERATION_TAG.search(jinja))

    def _render(
        self,
        messages: list[Json],
        tools: Sequence[Json] | None,
        generation: bool,
        thinking: bool | None,
    ) -> str:
        return self._call(messages, tools, thinking, add_generation_prompt=generation)[0]

    def _render_marked(
        self, messages: list[Json], tools: Sequence[Json] | None
    ) -> tuple[str, list[Any]]:
        return self._call(messages, tools, self.enable_thinking, return_assistant_tokens_mask=True)

    def _call(
        self,
        messages: list[Json],
        tools: Sequence[Json] | None,
        thinking: bool | None,
        **options: Any,
    ) -> tuple[str, list[Any]]:
        variables = dict(self._variables)
        if thinking is not None:
            variables["enable_thinking"] = thinking
        if self.preserve_thinking:
            variables["preserve_thinking"] = True
        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                tools=list(tools) if tools else None,
                chat_template=self._source,
                **options,
                **variables,
            )
        # Templates are other people's code: besides jinja's own errors they raise what Python's operators raise.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
        ) as error:
            raise TemplateRefusal(
                "the chat template refuses the conversation", str(error)
            ) from error
        if len(texts[0]) > MAX_RENDERED_CHARS:
            raise TemplateRefusal(
                "the rendered conversation is too long", f"{len(texts[0])} characters"
            )
        return texts[0], marks[0] if marks else []

    # --- what the template does, found by trying it out --------------------------------------------------------

    def _adapt(self) -> None:
        """Write into the template what it lacks: a place for the system message, a generation header."""
        try:
            self._render(_QUESTION, None, True, self.enable_thinking)
            full = self._render([*_QUESTION, _ANSWER], None, False, self.enable_thinking)
        except TemplateRefusal as refusal:
            raise ModelError(
                f"chat template {self.name!r} cannot render a question and an answer: {refusal.detail}",
                fix="set template: to a named one",
            ) from refusal
        if not self._shows_system():
            self._set_source(_MERGE_SYSTEM + self.jinja)
            log.info(
                "This chat template has no system message: one is put before the first question."
            )
        header = self._missing_header(full)
        if header:
            self._set_source(
                self.jinja.removesuffix("\n")
                + "{% if add_generation_prompt %}{{ " + _quoted(header) + " }}{% endif %}"
            )  # fmt: skip

    def _shows_system(self) -> bool:
        system = {"role": "system", "content": "systemprobe"}
        try:
            text = self._render([system, *_QUESTION], None, True, self.enable_thinking)
        except TemplateRefusal:
            return False
        return "systemprobe" in text and _QUESTION[0]["content"] in text

    def _missing_header(self, full: str) -> str:
        """What stands between question and answer if the template ignores `add_generation_prompt`."""
        prompt = self._render(_QUESTION, None, True, self.enable_thinking)
        closed = self._render(_QUESTION, None, False, self.enable_thinking)
        before = full.partition(_ANSWER["content"])[0]
        return (
            before.removeprefix(prompt).rstrip(" ")
            if prompt == closed and before.startswith(prompt)
            else ""
        )

    def _find_ends(self, stop: tuple[str, ...]) -> None:
        full = self._render([*_QUESTION, _ANSWER], None, False, self.enable_thinking)
        prompt = self._render(_QUESTION, None, True, self.enable_thinking)
        before, found, self._after = full.partition(_ANSWER["content"])
        if not found or not (before.startswith(prompt) or prompt.startswith(before)):
            raise ModelError(
                f"chat template {self.name!r} renders answers that do not begin where its generation header ends",
                fix="set template: to a named one",
            )
        #: What the generation header says beyond the answer's own header: "<think>\n" for models that always think.
        self._opened = prompt[len(before) :] if prompt.startswith(before) else ""
        #: Whether an answer without reasoning gets an empty <think> block, as a part of the answer.
        self.adds_empty_thought = "<think>" in before.removeprefix(prompt) or bool(self._opened)
        closing = self._control.search(self._after)
        self.end = self._after[: closing.end()] if closing else ""
        self.unknown_stops = () if closing else _markers(self._after)
        vocabulary = self.tokenizer.get_vocab()
        known = [token for token in stop if token in vocabulary]
        if not closing and not self._after and not known:
            known = self._next_header()
        eos = self._variables["eos_token"]
        self.final = "" if closing else (known[0] if known else eos)
        if not closing and not self.final:
            raise ModelError(
                "neither the chat template nor the tokenizer has a token that ends an answer",
                fix="give the tokenizer an eos_token",
            )
        tokens = dict.fromkeys([closing[0] if closing else self.final, *known, eos])
        self.stop_ids = tuple(vocabulary[token] for token in tokens if token in vocabulary)
        self._stops = any_of(known)

    def _next_header(self) -> list[str]:
        """The token that follows an answer which nothing closes, if it opens the next turn (GLM's <|user|>)."""
        if self.name in TEMPLATES:
            return []
        try:
            full = self._render(
                [*_QUESTION, _ANSWER, *_QUESTION], None, False, self.enable_thinking
            )
        except TemplateRefusal:
            return []
        following = self._control.match(full.partition(_ANSWER["content"])[2])
        return [following[0]] if following else []

    def _control_tokens(self) -> set[str]:
        """Tokens that only the template may write: the special ones, and ordinary added ones its headers consist of.

        Tags such as <think> and <tool_call> are part of what models write, so they stay tokens in answers.
        """
        header = self._render(_QUESTION, None, True, self.enable_thinking)
        return {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if len(token.content.strip()) > 1
            and (
                token.special
                or (token.content in header and not re.fullmatch(r"</?\w+>", token.content))
            )
        }

    def count_control_tokens(self, texts: Iterable[str]) -> int:
        """How many control tokens stand written in `texts`."""
        return sum(len(self._control.findall(text)) for text in texts)

    @cached_property
    def plain_prefix(self) -> list[int]:
        """The ids that open a text without a template (BOS, for tokenizers that put one)."""
        return _plain_prefix(self.tokenizer)

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        tool = {
            "type": "function",
            "function": {"name": "toolprobe", "description": "", "parameters": {}},
        }
        try:
            return "toolprobe" in self._render(_QUESTION, [tool], True, self.enable_thinking)
        except TemplateRefusal:
            return False


_PROBE = Message("user", "questionprobe")
_QUESTION: list[Json] = [_PROBE.to_dict()]
_ANSWER: Json = {"role": "assistant", "content": "answerprobe"}
_MERGE_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set messages = [{'role': 'user', 'content': "
    "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] %}{% endif %}\n"
)


def load_template(
    tokenizer: Any,
    name: str | None = None,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
    preserve_thinking: bool = False,
    tool_format: str | None = None,
    split_special_tokens: bool = True,
) -> ChatTemplate:
    """The chat template to use with `tokenizer`, which also gets a padding token if it lacks a distinct one.

    Args:
        name: a shipped template or the path of a .jinja file; None means the tokenizer's own, or `default` (said once) if it has none.
        default_system: the system message of conversations that bring none; None leaves that to the template.
        enable_thinking: True renders prompts that invite reasoning, False ones that refuse it (and removes it from
            answers), None goes by whether an example's answer reasons.
        preserve_thinking: keep the reasoning of earlier turns, with templates that can.
        split_special_tokens: control tokens written in a message stay text; False lets them act.

    Raises: ConfigError for names we do not have, ModelError for templates that cannot be used.
    """
    label, source, shipped = _choose(tokenizer, name)
    if tool_format and tool_format not in (label, shipped and shipped.file):
        raise ConfigError(
            f"tool_format {tool_format!r} has no effect: the chat template {label!r} decides how tools are written",
            where="tool_format",
            fix="leave tool_format out, or choose the template that writes tools that way",
        )
    if shipped and shipped.plain and not _plain_prefix(tokenizer):
        source = source.replace("{{- bos_token -}}\n", "")
    if default_system is not None:
        source = (
            "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
            + _quoted(default_system) + "}] + messages %}{% endif %}\n" + source
        )  # fmt: skip
    if preserve_thinking and "preserve_thinking" not in source:
        log.warning(
            "preserve_thinking: true has no effect with this chat template, which treats earlier reasoning "
            "its own way; template: qwen3 knows it."
        )
    template = ChatTemplate(
        tokenizer,
        label,
        source,
        stop=shipped.stop if shipped else (),
        enable_thinking=enable_thinking,
        preserve_thinking=preserve_thinking,
        split_special_tokens=split_special_tokens,
    )
    _say_what_does_not_fit(tokenizer, template, shipped)
    choose_pad_token(tokenizer, template.stop_ids, template.render([_PROBE], None, True))
    return template


def shipped_source(name: str) -> str:
    """The text of a shipped template, by its file's name."""
    path = resources.files("trueup.builtin") / "templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8").removesuffix("\n")


def resolve_name(name: str) -> str:
    """The canonical name of a shipped template. Raises ConfigError, naming the nearest ones."""
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in TEMPLATES:
        return key
    near = KNOWN_ELSEWHERE.get(key) or difflib.get_close_matches(
        key, [*TEMPLATES, *ALIASES], n=3, cutoff=0.5
    )
    known = key in KNOWN_ELSEWHERE
    raise ConfigError(
        f"template {name!r} is a template of LLaMA-Factory that trueup does not ship"
        if known
        else f"there is no template named {name!r}",
        where="template",
        expected=("nearest: " + ", ".join(near) + "; " if near else "")
        + "all: "
        + ", ".join(TEMPLATES),
        fix="leave template empty to use the tokenizer's own",
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}",
            where=f"template: {path}",
            fix="give the path of a .jinja file",
        ) from error


def own_source(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template; where it has one more for tools, both in one."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        default, tools = own.get("default") or next(iter(own.values()), None), own.get("tool_use")
        if default and tools:
            return "{% if tools %}" + tools + "{% else %}" + default + "{% endif %}"
        return default
    return own or None


def choose_pad_token(tokenizer: Any, stop_ids: Sequence[int], rendered: str = "") -> None:
    """Give `tokenizer` a padding token that ends nothing, if its vocabulary holds a token without another use (C9):
    one that is not a stop token and not part of the template (`rendered`).

    Batches are never padded here and masks never go by id, so this matters to other programs that load the result.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stop_ids:
        return
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    for pattern in (
        r"^\W{1,2}pad\W{1,2}$",
        r"right_pad",
        r"reserved|unused|dummy|placeholder|extra_\d",
        r"pad",
    ):
        for token in names:
            if (
                re.search(pattern, token, re.IGNORECASE)
                and token not in taken
                and token not in rendered
            ):
                tokenizer.pad_token = token
                log.info("The tokenizer has no padding token of its own: %s is used.", token)
                return
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in stop_ids:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def flatten(spans: Sequence[Span], ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int32 and mask [T] bool of spans and their tokens."""
    mask = [np.full(len(tokens), span.trained) for span, tokens in zip(spans, ids, strict=True)]
    return np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, bool), *mask])


def _choose(tokenizer: Any, name: str | None) -> tuple[str, str, Shipped | None]:
    if name and name.endswith(".jinja"):
        return name, _read_template(Path(name)), None
    if name:
        key = resolve_name(name)
        return key, shipped_source(TEMPLATES[key].file), TEMPLATES[key]
    own = own_source(tokenizer)
    if own:
        return OWN, own, None
    log.warning(
        "The tokenizer has no chat template and none is named: template `default` is used (Human: … Assistant: …). "
        "Set template: to choose another."
    )
    return "default", shipped_source("default"), TEMPLATES["default"]


def _say_what_does_not_fit(tokenizer: Any, template: ChatTemplate, shipped: Shipped | None) -> None:
    if template.unknown_stops:
        markers = ", ".join(template.unknown_stops)
        log.warning(
            "Template %s ends turns with %s, which is no token of this tokenizer: it is written as text, and answers "
            "end with %s instead. Use the model's own template, or add_special_tokens: '%s' with resize_vocab: true.",
            template.name, markers, template.final, ",".join(template.unknown_stops),
        )  # fmt: skip
    own = own_source(tokenizer)
    if shipped is None or not own or own == template.jinja:
        return
    difference = _difference(template, own)
    if difference:
        log.warning(
            "Template %s is not the tokenizer's own; a server that uses the model's own would prompt differently. %s "
            "Leave template empty to train with the model's own.",
            template.name, difference,
        )  # fmt: skip


def _difference(template: ChatTemplate, own: str) -> str:
    """Where the two first differ on a probe conversation, in words; "" if they do not."""
    probe = [*_QUESTION, _ANSWER, *_QUESTION]
    ours = template._render(probe, None, True, template.enable_thinking)
    try:
        theirs = ChatTemplate(
            template.tokenizer, OWN, own, enable_thinking=template.enable_thinking
        )
        text = theirs._render(probe, None, True, template.enable_thinking)
    except (ModelError, TemplateRefusal):
        return ""
    if ours == text:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, text, strict=False)) if a != b),
        min(len(ours), len(text)),
    )
    start = max(0, at - 12)
    return f"First difference: {ours[start : at + 30]!r} here, {text[start : at + 30]!r} there."


def _plain_prefix(tokenizer: Any) -> list[int]:
    """The ids this tokenizer puts before any text of its own accord."""
    with_special, bare = (
        tokenizer("a")["input_ids"],
        tokenizer("a", add_special_tokens=False)["input_ids"],
    )
    for start in range(len(with_special) - len(bare) + 1):
        if with_special[start : start + len(bare)] == bare:
            return with_special[:start]
    return []


def _markers(text: str) -> tuple[str, ...]:
    """Things in `text` that look like control tokens: <|im_end|>, </s>, [/INST], <end_of_turn>."""
    return tuple(re.findall(r"<[|｜/]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]", text))


def _quoted(text: str) -> str:
    """`text` as a jinja string literal, whose escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)


def _frozen_dates(source: str) -> str:
    """A macro that shadows `strftime_now`, so that the same data renders to the same tokens tomorrow."""
    formats = dict.fromkeys(re.findall(r"strftime_now\(\s*[\"']([^\"']*)[\"']\s*\)", source))
    if not formats:
        return ""
    day = date(2024, 7, 26)  # the day Llama 3's own template falls back to
    cases = "".join(
        "{% if format == " + _quoted(f) + " %}{{ " + _quoted(day.strftime(f)) + " }}{% endif %}"
        for f in formats
    )
    return "{% macro strftime_now(format) %}" + cases + "{% endmacro %}\n"
