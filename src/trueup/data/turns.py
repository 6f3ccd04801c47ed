"""Turns of a conversation: from the many ways of writing them down to messages with four roles.

sharegpt (`from`/`value`, human/gpt), OpenAI (`role`/`content`, tool calls), transcripts of the HH
kind (`\\n\\nHuman: … \\n\\nAssistant: …`), and the rules a conversation must obey.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trueup.data.examples import Json, Message, Messages, Role, Tools

# Roles by every name they go by. A tag that the registry sets replaces the names of that role.
_NAMES = {
    "user_tag": ("user", ("human", "user")),
    "assistant_tag": ("assistant", ("gpt", "assistant", "model", "bot")),
    "function_tag": ("assistant", ("function_call",)),
    "observation_tag": ("tool", ("observation", "tool", "function", "function_response")),
    "system_tag": ("system", ("system", "developer")),
}
_CALL = "function_call"
_CALL_TAGS = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\s*(?:Human|Assistant):").match


class RowProblem(Exception):
    """A row that reads well but cannot be learnt from: it is dropped, counted and shown.

    `reason` groups rows in the report ("empty chosen"); `detail` says what is the matter with this
    one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class ShapeProblem(Exception):
    """A column that does not hold what its role needs: always an error, never coerced (D6)."""

    def __init__(self, column: str, found: str, expected: str) -> None:
        super().__init__(f"column `{column}` holds {found}, expected {expected}")
        self.column = column
        self.found = found
        self.expected = expected


@dataclass(frozen=True, slots=True)
class Tags:
    """How a dataset writes a turn: the keys of role and content (None: either pair), and names of
    roles.
    """

    role: str | None = None
    content: str | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()  # role names whose content is a tool call

    @staticmethod
    def from_registry(tags: Mapping[str, str]) -> Tags:
        """Tags as registered; whatever is not given goes by any of its usual names."""
        roles: dict[str, Role] = {}
        for tag, (role, names) in _NAMES.items():
            for name in (tags[tag],) if tag in tags else names:
                roles.setdefault(name, role)
        return Tags(
            tags.get("role_tag"),
            tags.get("content_tag"),
            roles,
            frozenset({tags.get("function_tag", _CALL)}),
        )


def describe(value: Any) -> str:
    """The type of a value, in a user's words."""
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {_plural(value[0])}"
    names = {dict: "an object", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def parse_turns(value: Any, column: str, tags: Tags) -> Messages:
    """A list of turns (or a single one) as messages. Raises ShapeProblem or RowProblem."""
    turns = value if isinstance(value, list) else [value]
    return tuple(parse_turn(turn, index, column, tags) for index, turn in enumerate(turns))


def parse_turn(turn: Any, index: int, column: str, tags: Tags) -> Message:
    """One turn."""
    if not isinstance(turn, dict):
        raise ShapeProblem(column, f"a list of {_plural(turn)}", "a list of turns (objects)")
    role_key = tags.role or ("from" if "from" in turn else "role")
    content_key = tags.content or ("value" if "value" in turn else "content")
    name = turn.get(role_key)
    if not isinstance(name, str):
        missing = f"turns without `{role_key}`" if name is None else f"`{role_key}` = {name!r}"
        raise ShapeProblem(column, missing, f"turns with `{role_key}` and `{content_key}`")
    role = tags.roles.get(name)
    if role is None:
        raise RowProblem("wrong roles", f"turn {index} is by {name!r}; known: {', '.join(tags.roles)}")
    calls = _calls_of(turn)
    content, parts = _content(turn.get(content_key), bool(calls), column, content_key)
    calls += parts
    if thought := _thought_of(turn, column):
        content = _reasoned(thought) + content
    trained = _is_trained(turn, role, index)
    if calls:
        return Message(role, content, calls, trained)
    if name in tags.calls:
        return replace(_function_call(content), trained=trained)
    return Message(role, content, None, trained)


def check_roles(messages: Sequence[Message], ends_with: str, first: int = 0, after: str = "start") -> None:
    """Raise RowProblem unless the turns follow [system], user, assistant, user, … up to
    `ends_with`.

    Tool results stand where a user turn stands, several in a row if need be. `ends_with` is
    "assistant" or "user" (which a tool result may replace). `first` is the number shown for the
    first turn, `after` the role before it.
    """
    previous = after
    for index, message in enumerate(messages, first):
        if message.role not in _MAY_FOLLOW[previous]:
            before = "at the start" if previous == "start" else f"after {previous}"
            expected = " or ".join(_MAY_FOLLOW[previous])
            raise RowProblem("wrong roles", f"turn {index} is {message.role} {before}; expected {expected}")
        blank = not message.content.strip() and not message.tool_calls
        if blank and message.role == "user":
            # An assistant's blank is reported by its side's name; a tool may well return nothing.
            raise RowProblem("empty prompt", f"turn {index} (user) is empty")
        previous = message.role
    ends = ("user", "tool") if ends_with == "user" else ("assistant",)
    if previous not in ends:
        raise RowProblem("wrong roles", f"the last turn is {previous}; expected {ends_with}")


_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


# ---- transcripts ---------------------------------------------------------------------------------


def is_transcript(text: Any) -> bool:
    """Whether a text reads `Human: … \\n\\nAssistant: …`, as Anthropic's hh-rlhf does."""
    return isinstance(text, str) and bool(_TRANSCRIPT(text)) and "Assistant:" in text


def parse_transcript(text: str) -> Messages:
    """The turns of a transcript, each without the white space around it.

    hh-rlhf has a few answers in two parts (`Assistant:` twice in a row); they are one turn here,
    joined by a blank line, because no chat template can express the other. Raises RowProblem
    without any speaker.
    """
    parts = _SPEAKER.split(text.lstrip())
    if len(parts) < 3 or parts[0]:
        raise RowProblem("wrong roles", "the transcript does not begin with `Human:`")
    messages: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role: Role = "user" if speaker == "Human" else "assistant"
        content = content.strip()
        if messages and messages[-1].role == role:
            joined = "\n\n".join(part for part in (messages[-1].content, content) if part)
            messages[-1] = Message(role, joined)
        else:
            messages.append(Message(role, content))
    return tuple(messages)


def split_shared(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of two whole conversations that begin alike.

    The prompt is their common prefix of turns, cut back to the last turn that asks for an answer,
    so that both continuations begin with an assistant turn. Raises RowProblem if nothing is shared.
    """
    shared = 0
    for mine, other in zip(chosen, rejected, strict=False):
        if mine != other:
            break
        shared += 1
    # A conversation that is a prefix of the other still needs a continuation of its own.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    if shared <= 0:
        raise RowProblem("no common prompt", "chosen and rejected begin with different turns")
    return chosen[:shared], chosen[shared:], rejected[shared:]


# ---- tools ---------------------------------------------------------------------------------------


def parse_tools(value: Any, column: str) -> Tools | None:
    """Function specifications, given as a list or as its JSON text, flat or wrapped; None if there
    are none.
    """
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowProblem("bad tools", f"column `{column}` is not JSON: {error.msg}") from None
    specs = value if isinstance(value, list) else [value]
    if not all(isinstance(spec, dict) for spec in specs):
        raise ShapeProblem(column, describe(value), "a list of function specifications")
    return tuple(_wrapped(_without_nulls(spec)) for spec in specs) or None


def _wrapped(spec: Json) -> Json:
    return spec if "function" in spec else {"type": "function", "function": spec}


def _without_nulls(value: Any) -> Any:
    # Parquet and Arrow give every row every key that any row has, as null.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_trained(turn: Json, role: Role, index: int) -> bool:
    """Whether an answer's weight is 1, as OpenAI (`weight`) and LLaMA-Factory's V1 (`loss_weight`) write it; or none
    is given.
    """
    weight = turn.get("weight", turn.get("loss_weight"))
    if role != "assistant":
        if weight:
            raise RowProblem(
                "weighted turn", f"turn {index} is a {role} turn of weight {weight!r}; answers are trained"
            )
        return True
    if weight is not None and weight not in (0, 1):
        raise RowProblem("weighted turn", f"turn {index} has weight {weight!r}; known are 0 and 1")
    return weight is None or bool(weight)


def _calls_of(turn: Json) -> tuple[Json, ...]:
    """The calls an OpenAI turn makes: `tool_calls`, or the single `function_call` of its first years."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    return _calls(calls) if calls else ()


def _calls(value: Any) -> tuple[Json, ...]:
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> Json:
    """{"type": "function", "function": {"name", "arguments": dict}} of a call in any shape."""
    if not isinstance(call, dict):
        raise RowProblem("bad tool call", f"{describe(call)} instead of name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad tool call", "no name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise RowProblem("bad tool call", f"arguments are not JSON: {error.msg}") from None
    if arguments is not None and not isinstance(arguments, dict):
        raise RowProblem("bad tool call", f"arguments are {describe(arguments)}, not an object")
    clean: Json = {"name": function["name"], "arguments": arguments or {}}
    result: Json = {"type": "function", "function": clean}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def _function_call(content: str) -> Message:
    """sharegpt's `function_call`: JSON of one call or several, after a thought or inside
    <tool_call> tags.
    """
    tagged = _CALL_TAGS.findall(content)
    if tagged:
        thought, texts = _CALL_TAGS.sub("", content).strip(), tagged
    else:
        start = min((i for i in (content.find("{"), content.find("[")) if i >= 0), default=0)
        thought, texts = content[:start].strip(), [content[start:]]
    calls: list[Json] = []
    for text in texts:
        try:
            calls += _calls(json.loads(text))
        except json.JSONDecodeError as error:
            raise RowProblem("bad tool call", f"not JSON: {error.msg}") from None
    return Message("assistant", thought, tuple(calls))


# ---- contents ------------------------------------------------------------------------------------


def _content(value: Any, has_calls: bool, column: str, key: str) -> tuple[str, tuple[Json, ...]]:
    """The text of a turn, and the calls that are among its parts."""
    if isinstance(value, str):
        return value, ()
    if value is None and has_calls:
        return "", ()
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ShapeProblem(f"{column}[].{key}", describe(value), "text")
    texts: list[str] = []
    calls: list[Json] = []
    for part in value:
        text = _part(part, column, key)
        match part.get("type") or "text":
            case "tool_call":
                calls += _function_call(text).tool_calls or ()
            case "reasoning":
                texts.append(_reasoned(text))
            case _:
                texts.append(text)
    return "".join(texts), tuple(calls)


def _part(part: Json, column: str, key: str) -> str:
    """The text of one part of a content given in parts: what is said, thought, or called."""
    text = next((part[name] for name in ("text", "value") if part.get(name) is not None), None)
    if part.get("type") not in (None, "text", "reasoning", "tool_call") or not isinstance(text, str):
        raise ShapeProblem(f"{column}[].{key}", f"a part of type {part.get('type')!r}", "parts of type 'text'")
    return text


def _thought_of(turn: Json, column: str) -> str:
    """What a turn keeps apart from its content as the thought before it; "" if there is none."""
    for key in ("reasoning_content", "reasoning", "thinking"):
        thought = turn.get(key)
        if thought is not None and not isinstance(thought, str):
            raise ShapeProblem(f"{column}[].{key}", describe(thought), "text")
        if thought:
            return thought
    return ""


def _reasoned(thought: str) -> str:
    """A thought as models that think write it, in front of the answer."""
    return f"<think>\n{thought.strip()}\n</think>\n\n"


def _plural(value: Any) -> str:
    names = {dict: "objects", str: "texts", list: "lists", bool: "true/false", type(None): "nulls"}
    return names.get(type(value), "numbers")
