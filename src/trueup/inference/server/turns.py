"""Messages and tools of a request as templates take them. No URL is ever followed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trueup.data.examples import Json, Message, Role
from trueup.inference.server.failures import refuse

_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")


def conversation(messages: Sequence[Json], where: str = "messages") -> tuple[Message, ...]:
    """Raises ApiError, naming the field."""
    return tuple(_message(message, f"{where}[{index}]") for index, message in enumerate(messages))


def tools_of(tools: Sequence[Json]) -> list[Json] | None:
    """Function specifications; None without any. Raises ApiError."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        where = f"tools[{index}]"
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise refuse(where, 'expected {"type": "function", "function": {…}}')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise refuse(f"{where}.function.name", "expected a name")
        if not isinstance(function.get("parameters", {}), dict):
            raise refuse(f"{where}.function.parameters", "expected a JSON schema")
        if not isinstance(function.get("description", ""), str):
            raise refuse(f"{where}.function.description", "expected a text")
    return [{"type": "function", "function": tool["function"]} for tool in tools] or None


def _message(message: Json, where: str) -> Message:
    name = message.get("role")
    if not isinstance(name, str) or name not in _ROLES:
        raise refuse(f"{where}.role", f"expected one of {', '.join(_ROLES)}")
    role = _ROLES[name]
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise refuse(f"{where}.tool_calls", "only an assistant calls tools")
    if message.get("function_call"):
        raise refuse(f"{where}.function_call", "use tool_calls")
    content = message.get("content")
    if content is None and not calls:
        raise refuse(f"{where}.content", "expected a text")
    text = _text("" if content is None else content, f"{where}.content")
    return Message(role, text, _calls(calls, f"{where}.tool_calls") if calls else None)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refuse(where, "expected a text, or a list of parts of type text")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise refuse(f"{where}[{index}]", "only parts of type text: models here read nothing else")
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, where: str) -> tuple[Json, ...]:
    if not isinstance(calls, list):
        raise refuse(where, "expected a list of calls")
    return tuple(_call(call, f"{where}[{index}]") for index, call in enumerate(calls))


def _call(call: Any, where: str) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refuse(f"{where}.function", 'expected {"name": …, "arguments": …}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            raise refuse(f"{where}.function.arguments", "expected JSON") from None
    if not isinstance(arguments, dict):
        raise refuse(f"{where}.function.arguments", "expected a JSON object")
    clean: Json = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return clean | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})
