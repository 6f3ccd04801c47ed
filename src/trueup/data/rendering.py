"""Chat templates are other people's programs: here they run, sandboxed and within limits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from trueup.data.examples import Json
from trueup.data.time_limit import OutOfTime, time_limit
from trueup.data.turns import RowProblem
from trueup.data.unseen import Frame, frame, may_be_blind
from trueup.errors import ModelError

MAX_SOURCE_CHARS = 64 * 1024
MAX_RENDERED_CHARS = 8 * 1024 * 1024
MAX_SECONDS = 10.0
_MOST_FRAMES = 4096

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*[\"']([^\"']*)[\"']\s*\)")
#: `strftime_now` says this day, the one Llama 3's template falls back to: the same data must render
#: to the same tokens tomorrow.
_DAY = date(2024, 7, 26)
_ABSENT = {"tools": None, "documents": None}
_SCALARS = (str, bool, int, float, type(None))
# Besides jinja's own errors, templates raise what Python's operators raise.
_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError,
    ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


_OTHER_TEMPLATE = "read the model's chat_template.jinja before you trust it, or set template: to a named one"


class TemplateRefusal(RowProblem):
    """A conversation this template cannot express: the row is dropped, counted and shown."""


class Renderer:
    """A template's text, ready to render conversations.

    Attributes: `source`, the text; `marks_answers`, whether it has {% generation %} blocks.
    """

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, {MAX_SOURCE_CHARS} are allowed",
                fix="set template: to a named one, or shorten the model's chat_template.jinja",
            )
        if _raises_powers(source):  # 9**9**9 takes for ever, and nothing could stop it
            raise ModelError("the chat template computes powers (**)", fix=_OTHER_TEMPLATE)
        self.source = source
        self.variables = variables
        self.marks_answers = bool(_GENERATION_TAG.search(source))
        self._program = _frozen_days(source) + source
        self._globals: dict[str, Any] | None = None
        self._frames: dict[tuple[Any, ...], Frame | None] = {}
        self._plain = all(type(value) in _SCALARS for value in variables.values())

    def wrapped(self, before: str = "", after: str = "") -> Renderer:
        """The same template with text put around it."""
        body = self.source.removesuffix("\n") if after else self.source
        return Renderer(before + body + after, self.variables)

    def text(
        self,
        messages: list[Json],
        tools: Sequence[Json] | None = None,
        *,
        header: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """The conversation; with `header`, up to where the assistant begins to speak."""
        return self._call(messages, tools, thinking, header=header)[0][0]

    def marked(
        self, messages: list[Json], tools: Sequence[Json] | None, thinking: bool | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and where in it the template's {% generation %} blocks are."""
        texts, marks = self._call(messages, tools, thinking, marked=True)
        return texts[0], marks[0]

    def _call(
        self,
        messages: list[Json],
        tools: Sequence[Json] | None,
        thinking: bool | None,
        header: bool = False,
        marked: bool = False,
    ) -> tuple[list[str], list[Any]]:
        asked = {} if thinking is None else {"enable_thinking": thinking}
        plain = not tools and not marked and self._plain and not any("tool_calls" in m for m in messages)
        if plain and (around := self._frames.get(_frame_key(messages, header, thinking))):
            return [_bounded(around.filled(messages))], []
        try:
            with time_limit(MAX_SECONDS):
                if plain:
                    texts, marks = [self._direct(messages, header, thinking)], []
                else:
                    texts, marks = render_jinja_template(
                        conversations=[messages],
                        tools=list(tools) if tools else None,
                        chat_template=self._program,
                        add_generation_prompt=header,
                        return_assistant_tokens_mask=marked,
                        **self.variables,
                        **asked,
                    )
        except OutOfTime:  # the run's end, not the row's: the next one would take as long
            what = f"the chat template does not come to an end within {MAX_SECONDS:g} s"
            raise ModelError(what, fix=_OTHER_TEMPLATE) from None
        except _FAULTS as fault:
            raise TemplateRefusal("the chat template refuses the conversation", str(fault)) from fault
        return [_bounded(texts[0])], marks

    def _direct(self, messages: list[Json], header: bool, thinking: bool | None) -> str:
        """What `render_jinja_template` makes of messages that are plain texts, without its copy of every value."""
        key = _frame_key(messages, header, thinking)
        if key not in self._frames:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            blind = may_be_blind(self._compiled.environment.parse(self._program), self._program)
            self._frames[key] = frame(lambda unseen: self._run(unseen, header, thinking), key[0]) if blind else None
        return self._run(messages, header, thinking)

    def _run(self, messages: list[Json], header: bool, thinking: bool | None) -> str:
        program = self._compiled
        if self._globals is None:
            self._globals = dict(program.globals)
        known = {**self._globals, **self.variables, **_ABSENT, "messages": messages, "add_generation_prompt": header}
        if thinking is not None:
            known["enable_thinking"] = thinking
        # As `program.render` does it, without gathering the globals anew for every conversation.
        return "".join(program.root_render_func(program.new_context(known, shared=True)))

    @property
    def _compiled(self) -> jinja2.Template:
        return _compile_jinja_template(self._program)


def _frame_key(messages: list[Json], header: bool, thinking: bool | None) -> tuple[tuple[str, ...], bool, bool | None]:
    return tuple([message["role"] for message in messages]), header, thinking


def _bounded(text: str) -> str:
    if len(text) > MAX_RENDERED_CHARS:
        raise TemplateRefusal("the rendered conversation is too long", f"{len(text)} characters")
    return text


def quoted(text: str) -> str:
    """`text` as a jinja string literal, whose escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)


def _raises_powers(source: str) -> bool:
    """Whether a template has `a ** b`; `f(**options)` is another thing."""
    before = ""
    try:
        for _, kind, text in jinja2.Environment().lex(source):
            if kind == "operator" and text == "**" and before not in "(,":
                return True
            before = before if kind == "whitespace" else text
    except jinja2.TemplateSyntaxError:
        pass  # rendering says so
    return False


def _frozen_days(source: str) -> str:
    """A macro that shadows `strftime_now`; "" for templates that do not ask for the date."""
    formats = dict.fromkeys(_STRFTIME.findall(source))
    if not formats:
        return ""
    cases = "".join(
        f"{{% if format == {quoted(f)} %}}{{{{ {quoted(_DAY.strftime(f))} }}}}{{% endif %}}" for f in formats
    )
    return f"{{% macro strftime_now(format) %}}{cases}{{% endmacro %}}\n"
