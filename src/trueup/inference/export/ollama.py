"""An Ollama Modelfile: where the weights are, how turns are written, where answers stop.

Ollama has a template language of its own. Ours is written in it only where rendering proves that both write the same:
turns that follow one another unchanged, with the system text in front. Otherwise the Modelfile leaves TEMPLATE out,
and Ollama takes what it knows of the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Message
from trueup.data.rendering import TemplateRefusal

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "⟦system⟧", "⟦first⟧", "⟦answer⟧", "⟦second⟧"  # texts no template has


@dataclass(frozen=True)
class Turns:
    """What a template writes around texts.

    Attributes:
        default: in front of everything where there is no system text.
        system: (before, after) the system text.
        user: (before, after) what the user says; the latter ends with the assistant's header.
        end: after an answer.
    """

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    end: str


def modelfile(source: str, template: ChatTemplate, stops: Sequence[str], context: int, system: str | None) -> str:
    """The text of a Modelfile for weights at `source`."""
    lines = [f"FROM {source}"]
    turns = read_turns(template)
    if turns is not None and not any('"""' in part or "{{" in part for part in _parts(turns)):
        lines.append(f'TEMPLATE """{_written(turns)}"""')
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def read_turns(template: ChatTemplate) -> Turns | None:
    """What a template writes around texts, if that is all it does; found by rendering, and proven by it."""
    user, answer, again = Message("user", _ASKED), Message("assistant", _ANSWERED), Message("user", _AGAIN)
    system = Message("system", _SYSTEM)
    try:
        alone = template.render((user,), add_generation_prompt=True)
        closed = template.render((user, answer))
        chat = template.render((user, answer, again), add_generation_prompt=True)
        opened = template.render((system, user), add_generation_prompt=True)
        whole = template.render((system, user, answer, again), add_generation_prompt=True)
    except TemplateRefusal:
        return None
    front, found, header = alone.partition(_ASKED)
    if not found or not closed.startswith(alone + _ANSWERED):
        return None
    end = closed.removeprefix(alone + _ANSWERED)
    before = chat.removeprefix(closed).partition(_AGAIN)[0]
    into, _, rest = opened.partition(_SYSTEM)
    between = rest.partition(_ASKED)[0]
    if not front.endswith(before) or not between.endswith(before):
        return None
    cut = len(before)
    turns = Turns(front[: len(front) - cut], (into, between[: len(between) - cut]), (before, header), end)
    told = turns.system[0] + _SYSTEM + turns.system[1] + _said(turns, _ASKED, _ANSWERED) + before + _AGAIN + header
    said = turns.default + _said(turns, _ASKED, _ANSWERED) + before + _AGAIN + header
    return _without_bos(turns, template) if (chat, whole) == (said, told) else None


def _said(turns: Turns, question: str, answer: str) -> str:
    return turns.user[0] + question + turns.user[1] + answer + turns.end


def _without_bos(turns: Turns, template: ChatTemplate) -> Turns:
    """Ollama puts the token that opens a text itself, where the tokenizer does."""
    tokenizer = template.tokenizer
    bos = tokenizer.bos_token
    if not bos or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return turns
    before, after = turns.system
    return Turns(turns.default.removeprefix(bos), (before.removeprefix(bos), after), turns.user, turns.end)


def _parts(turns: Turns) -> list[str]:
    return [turns.default, *turns.system, *turns.user, turns.end]


def _written(turns: Turns) -> str:
    otherwise = f"{{{{ else }}}}{turns.default}" if turns.default else ""
    system = f"{{{{ if .System }}}}{turns.system[0]}{{{{ .System }}}}{turns.system[1]}{otherwise}{{{{ end }}}}"
    user = f'{{{{ if eq .Role "user" }}}}{turns.user[0]}{{{{ .Content }}}}{turns.user[1]}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{turns.end}{{{{ end }}}}'
    return f"{system}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}"
