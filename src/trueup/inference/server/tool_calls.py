"""Calls of tools in what a model writes, for the families of templates that write them in a known way."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Json, Message
from trueup.data.rendering import TemplateRefusal

Family = Literal["tagged", "bare"]

_TAG = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_PROBE = Message(
    "assistant", "", ({"type": "function", "function": {"name": "probe_tool", "arguments": {"x": 1}}},)
)  # fmt: skip
_BARE = re.compile(r'(?:<\|python_tag\|>)?\s*\{\s*"name":\s*"probe_tool"')


def family_of(template: ChatTemplate) -> Family | None:
    """How this template writes calls, by what it makes of one: `tagged` (Qwen, Hermes: JSON in <tool_call>), `bare`
    (Llama 3: the whole answer is JSON); None: in no way that is read here, or none at all.
    """
    if not template.supports_tools:
        return None
    try:
        written = template.render([Message("user", "x"), _PROBE])
    except TemplateRefusal:
        return None
    if _TAG in written and "probe_tool" in written.partition(_TAG)[2]:
        return "tagged"
    return "bare" if _BARE.search(written) else None


@dataclass(frozen=True)
class Spoken:
    """What an answer says, and the calls in it as OpenAI writes them; `content` is None where only calls are made."""

    content: str | None
    calls: list[Json]


class CallReader:
    """Text as it comes; out goes what is certainly no call.

    Args:
        most: calls that count; further ones are left out.
        only_calls: nothing else is written; one that was cut off is no text.
    """

    def __init__(self, family: Family, most: int | None = None, only_calls: bool = False) -> None:
        self.family, self.most, self.only_calls = family, most, only_calls
        self._held = ""
        self._said = False
        self._calling = False

    def push(self, text: str) -> str:
        """What can be said already."""
        self._held += text
        if self._calling:
            return ""
        if self.family == "bare":
            begun = self._held.lstrip()
            self._calling = begun.startswith(("{", "<|python_tag|>")) and not self._said
            return "" if self._calling or not begun else self._say(len(self._held))
        at = self._held.find(_TAG)
        if at >= 0:
            self._calling = True
            return self._say(len(self._held[:at].rstrip()))
        keep = next((n for n in range(len(_TAG) - 1, 0, -1) if self._held.endswith(_TAG[:n])), 0)
        certain = self._held[: len(self._held) - keep]
        return self._say(len(certain.rstrip()))  # white space before a call is the template's

    def finish(self) -> Spoken:
        """What is left when nothing follows. Calls that cannot be read are text."""
        held, self._held = self._held, ""
        calls = self._parse(held) if self._calling else None
        return Spoken(None if calls or self.only_calls else held, calls or [])

    def _say(self, count: int) -> str:
        said, self._held = self._held[:count], self._held[count:]
        self._said = self._said or bool(said)
        return said

    def _parse(self, text: str) -> list[Json] | None:
        texts = _TAGGED.findall(text) if self.family == "tagged" else [text.strip().removeprefix("<|python_tag|>")]
        try:
            calls = [_call(json.loads(one)) for one in texts]
        except (ValueError, RecursionError):
            return None
        return calls[: self.most]


def _call(found: Any) -> Json:
    """Raises ValueError."""
    arguments = found.get("arguments", found.get("parameters", {})) if isinstance(found, dict) else None
    if not isinstance(arguments, dict) or not isinstance(found.get("name"), str):
        raise ValueError("no call")
    text = json.dumps(arguments, ensure_ascii=False)
    number = f"call_{secrets.token_hex(12)}"
    return {"id": number, "type": "function", "function": {"name": found["name"], "arguments": text}}
