"""The kinds of example a stage can learn from. A row of any layout becomes one of these; tokens
come later.

Every example carries `row`, "dataset:17" with the row's 0-based index in its file, so that whatever
happens to it later can be traced back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["text", "chat", "pair", "ranking", "answers", "feedback", "prompt"]

#: What a function specification or call looks like everywhere in trueup: the shape transformers'
#: chat templates take, {"type": "function", "function": {"name": …, "arguments" | "parameters":
#: {…}}}.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` are the calls an assistant makes in it, `arguments` already parsed to
    a dict. `trained`: whether SFT learns it, if it is an assistant's; data may say not, by a weight of 0.
    """

    role: Role
    content: str
    tool_calls: tuple[Json, ...] | None = None
    trained: bool = True

    def to_dict(self) -> Json:
        """The message as transformers' chat templates take it."""
        message: Json = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


Messages = tuple[Message, ...]
Tools = tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A document to continue: no roles, no template, every token trained."""

    text: str
    row: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an assistant turn.

    `plain` (here and below): the contents are raw text, to be concatenated without a chat template,
    as TRL does with plain strings. It is only set when a dataset says `formatting: trl`, and on
    pairs of full texts whose prompt nobody marked.
    """

    messages: Messages
    row: str
    tools: Tools | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (ends with a user or tool turn) with a better and a worse continuation.

    A continuation starts with an assistant turn and usually is one; it holds more turns where two
    conversations part before the last answer. With `plain` and an empty `prompt`, `chosen` and
    `rejected` are whole texts: the prompt is their common prefix of tokens, which only the encoder
    can see.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    row: str
    tools: Tools | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """Continuations of a prompt, best first; `scores` (descending) if the data gave any.

    Where rankings are wanted there are two or more, where answers are wanted there may be one.
    `margin`: by how much the data wants the better of two to win.
    """

    prompt: Messages
    answers: tuple[Messages, ...]
    row: str
    scores: tuple[float, ...] | None = None
    tools: Tools | None = None
    plain: bool = False
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """One continuation and whether people want it (Kahneman–Tversky)."""

    prompt: Messages
    answer: Messages
    desirable: bool
    row: str
    tools: Tools | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer (online methods, prediction)."""

    messages: Messages
    row: str
    tools: Tools | None = None
    plain: bool = False


Example = Text | Chat | Pair | Ranking | Feedback | Prompt


def texts_of(example: Example) -> Iterator[str]:
    """Every text of an example: documents, and what is said in its turns."""
    match example:
        case Text(text):
            yield text
            return
        case Chat(messages) | Prompt(messages):
            turns = [messages]
        case Pair(prompt, chosen, rejected):
            turns = [prompt, chosen, rejected]
        case Ranking(prompt, answers):
            turns = [prompt, *answers]
        case Feedback(prompt, answer):
            turns = [prompt, answer]
    yield from (message.content for messages in turns for message in messages)
