"""What a chat template does, found by letting it render a question and an answer.

Knowing no family's markup by heart, a tokenizer's own template works as well as one of ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trueup.data.examples import Json
from trueup.data.rendering import Renderer, TemplateRefusal, quoted
from trueup.data.spans import any_of
from trueup.errors import ModelError

log = logging.getLogger("trueup")

QUESTION: Json = {"role": "user", "content": "questionprobe"}
ANSWER: Json = {"role": "assistant", "content": "answerprobe"}
SYSTEM: Json = {"role": "system", "content": "systemprobe"}
TOOL: Json = {
    "type": "function",
    "function": {"name": "toolprobe", "description": "", "parameters": {"type": "object"}},
}
_NAMED_ONE = "set template: to a named one"
_MERGE_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + "
    "messages[1]['content']}] + messages[2:] %}{% endif %}\n"
)


@dataclass(frozen=True, slots=True)
class Ends:
    """Where a template's answers begin and end.

    after: the text that follows an answer's content in a conversation.
    end: its part up to the token that ends the turn; "" if the template writes none.
    final: then, the token to put after the last answer.
    stops: tokens besides these at which the model stops, EOS last.
    opened: what the generation header says beyond an answer's own header ("<think>\\n").
    adds_empty_thought: an answer without reasoning gets an empty <think> block of its own.
    unknown_stops: end markers that are not tokens of this tokenizer.
    """

    after: str
    end: str
    final: str
    stops: tuple[str, ...]
    opened: str
    adds_empty_thought: bool
    unknown_stops: tuple[str, ...]


def adapt(renderer: Renderer, name: str, thinking: bool | None) -> Renderer:
    """Write into a template what it lacks: a place for the system message, a generation header.

    Raises ModelError if it cannot render a question and an answer.
    """
    try:
        prompt = renderer.text([QUESTION], header=True, thinking=thinking)
        closed = renderer.text([QUESTION], thinking=thinking)
        full = renderer.text([QUESTION, ANSWER], thinking=thinking)
    except TemplateRefusal as refusal:
        what = f"chat template {name!r} cannot render a question and an answer: {refusal.detail}"
        raise ModelError(what, fix=_NAMED_ONE) from refusal
    if not _shows(renderer, SYSTEM["content"], [SYSTEM, QUESTION], None, thinking):
        log.info("This chat template has no system message: one is put before the first question.")
        renderer = renderer.wrapped(before=_MERGE_SYSTEM)
    before = full.partition(ANSWER["content"])[0]
    if prompt == closed and before.startswith(prompt):
        # The template ignores `add_generation_prompt`. A bare space there belongs to the answer.
        header = before.removeprefix(prompt).rstrip(" ")
        if header:
            asked = "{% if add_generation_prompt %}{{ " + quoted(header) + " }}{% endif %}"
            renderer = renderer.wrapped(after=asked)
    return renderer


def control_tokens(renderer: Renderer, tokenizer: Any, thinking: bool | None) -> set[str]:
    """Tokens only the template may write: special ones, and added ones its headers consist of.

    Tags such as <think> and <tool_call> are part of what models write: they stay tokens in answers.
    """
    header = renderer.text([QUESTION], header=True, thinking=thinking)
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1
        and (token.special or (token.content in header and not re.fullmatch(r"</?\w+>", token.content)))
    }


def find_ends(
    renderer: Renderer,
    tokenizer: Any,
    name: str,
    thinking: bool | None,
    stop: Sequence[str] | None,
) -> Ends:
    """Where answers begin and end. `stop` lists further stop tokens; None means they are not known.

    Raises ModelError for templates whose answers do not follow their own generation header.
    """
    prompt = renderer.text([QUESTION], header=True, thinking=thinking)
    full = renderer.text([QUESTION, ANSWER], thinking=thinking)
    before, found, after = full.partition(ANSWER["content"])
    if not found or not (before.startswith(prompt) or prompt.startswith(before)):
        what = f"in chat template {name!r}, answers do not begin where the generation header ends"
        raise ModelError(what, fix=_NAMED_ONE)
    opened = prompt[len(before) :] if prompt.startswith(before) else ""
    control = any_of(control_tokens(renderer, tokenizer, thinking))
    closing = control.search(after)
    known = [token for token in stop or () if _knows(tokenizer, token)]
    if stop is None and not after and (token := _next_header(renderer, control, thinking)):
        known = [token]
    eos = tokenizer.eos_token or ""
    final = "" if closing else (known or [eos])[0]
    if not closing and not final:
        what = "neither the chat template nor the tokenizer has a token that ends an answer"
        raise ModelError(what, fix="give the tokenizer an eos_token")
    stops = dict.fromkeys([closing[0] if closing else final, *known, eos])
    return Ends(
        after=after,
        end=after[: closing.end()] if closing else "",
        final=final,
        stops=tuple(token for token in stops if _knows(tokenizer, token)),
        opened=opened,
        adds_empty_thought=bool(opened) or "<think>" in before.removeprefix(prompt),
        unknown_stops=() if closing else _markers(after),
    )


def shows_tools(renderer: Renderer, thinking: bool | None) -> bool:
    """Whether the template tells the model which tools there are."""
    return _shows(renderer, TOOL["function"]["name"], [QUESTION], [TOOL], thinking)


def first_difference(renderer: Renderer, other: Renderer, thinking: bool | None) -> str:
    """Where two templates first differ on a probe, in words; "" if they do not (C7)."""
    probe = [QUESTION, ANSWER, QUESTION]
    ours = renderer.text(probe, header=True, thinking=thinking)
    try:
        theirs = other.text(probe, header=True, thinking=thinking)
    except TemplateRefusal:
        return ""
    if ours == theirs:
        return ""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    near = slice(max(0, at - 12), at + 30)
    return f"first difference: {ours[near]!r} here, {theirs[near]!r} there"


def _shows(
    renderer: Renderer,
    what: str,
    messages: list[Json],
    tools: list[Json] | None,
    thinking: bool | None,
) -> bool:
    try:
        text = renderer.text(messages, tools, header=True, thinking=thinking)
    except TemplateRefusal:
        return False
    return what in text and QUESTION["content"] in text


def _next_header(renderer: Renderer, control: re.Pattern[str], thinking: bool | None) -> str:
    """The token after an answer that nothing closes: it opens the next turn (GLM's <|user|>)."""
    try:
        full = renderer.text([QUESTION, ANSWER, QUESTION], thinking=thinking)
    except TemplateRefusal:
        return ""
    following = control.match(full.partition(ANSWER["content"])[2])
    return following[0] if following else ""


def _knows(tokenizer: Any, token: str) -> bool:
    """Whether `token` is in the vocabulary, which is not listed for it: that takes a tenth of a second."""
    number = tokenizer.convert_tokens_to_ids(token)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == token


def _markers(text: str) -> tuple[str, ...]:
    """Things in `text` that look like control tokens: <|im_end|>, </s>, [/INST], <end_of_turn>."""
    return tuple(re.findall(r"<[|｜/]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]", text))
