"""What a reply has to be: `response_format`, and calls of tools that `tool_choice` asks for, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trueup.data.examples import Json
from trueup.inference.server.asking import AskChat
from trueup.inference.server.failures import refuse
from trueup.inference.server.tool_calls import Family
from trueup.rollout.grammar import Form, json_grammar

ANY_OBJECT: Json = {"type": "object"}
#: around the arguments of a call, as templates of the family write it; `{}` is the tool's name, in JSON.
_CALLS: dict[Family, tuple[str, str]] = {
    "tagged": ('<tool_call>\n{{"name": {}, "arguments": ', "}\n</tool_call>"),
    "bare": ('{{"name": {}, "parameters": ', "}"),
}


def structure_of(ask: AskChat, tools: Sequence[Json], family: Family | None) -> tuple[str, str]:
    """(grammar, the field that asks for it); two empty texts where a reply may be anything. Raises ApiError."""
    schema, forced = _schema(ask.response_format), _forced(ask.tool_choice, tools)
    if schema is None and forced is None:
        return "", ""
    calls = [_call(tool["function"], family) for tool in (tools if forced is None else forced) if family]
    if forced is not None:
        return json_grammar(calls), "tool_choice"
    return json_grammar([Form(ANY_OBJECT if schema is None else schema), *calls]), "response_format"


def _schema(given: Json) -> Json | None:
    """What `response_format` asks for; None: any text."""
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    described = given.get("json_schema")
    if kind != "json_schema" or not isinstance(described, dict):
        raise refuse("response_format", 'expected {"type": "text" | "json_object" | "json_schema", …}')
    schema = described.get("schema", ANY_OBJECT)
    if not isinstance(schema, dict):
        raise refuse("response_format.json_schema.schema", "expected a JSON schema")
    return schema


def _forced(choice: Any, tools: Sequence[Json]) -> list[Json] | None:
    """Tools of which one has to be called; None: the model decides."""
    if choice in ("auto", "none"):
        return None
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if choice != "required" and not isinstance(named, dict):
        raise refuse("tool_choice", 'expected "auto", "none", "required" or {"type": "function", "function": {…}}')
    chosen = [tool for tool in tools if named is None or tool["function"]["name"] == named.get("name")]
    if not chosen:
        raise refuse("tool_choice", "names no tool of the request" if tools else "needs tools")
    return chosen


def _call(function: Json, family: Family) -> Form:
    before, after = _CALLS[family]
    name = json.dumps(function["name"], ensure_ascii=False)
    return Form(function.get("parameters") or ANY_OBJECT, before.format(name), after)
