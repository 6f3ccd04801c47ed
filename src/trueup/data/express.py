"""Examples → rows: every kind in every format, and the registry entry by which such rows are read again.

What a format cannot say is refused here (a RowProblem), never bent; `convert.py` reads every row
back and compares, so that nothing changes unnoticed either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from trueup.data.examples import Chat, Example, Feedback, Json, Kind, Message, Messages, Pair, Prompt, Ranking, Text
from trueup.data.turns import RowProblem

Format = Literal["alpaca", "sharegpt", "openai", "trl"]
Row = dict[str, Any]

#: kind of rows → what `type:` of an entry says.
TYPE_OF: dict[str, str] = {"text": "pretrain", "chat": "sft", "pair": "dpo", "ranking": "rm", "feedback": "kto"}
_FROM = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def express(example: Example, form: Format) -> Row:
    """An example as a row. Raises RowProblem if the format has no way of saying it."""
    if isinstance(example, Text):
        return {"text": example.text}
    if example.plain:
        return _plain(example, form)
    row = {"alpaca": _alpaca, "sharegpt": _sharegpt, "openai": _openai, "trl": _trl}[form](example)
    if example.tools:
        as_text = form in ("alpaca", "sharegpt")
        row["tools"] = json.dumps(list(example.tools), ensure_ascii=False) if as_text else list(example.tools)
    if isinstance(example, Ranking) and example.scores:
        row["scores"] = list(example.scores)
    if isinstance(example, Ranking) and example.margin is not None:
        row["margin"] = example.margin
    return row


def entry_for(kind: Kind, form: Format, columns: Sequence[str], plain: bool = False) -> Row:
    """The registry entry, without its file, of rows with these columns. Columns it does not name are left out."""
    entry: Row = {"type": TYPE_OF[kind]} if kind in TYPE_OF else {}
    if kind == "pair":
        entry["ranking"] = True
    if plain:
        entry["formatting"] = "trl"
    elif form in ("sharegpt", "openai") and kind != "text":
        entry["formatting"] = form
    roles = {role: name for role, name in _COLUMNS[form].items() if name in columns}
    if kind == "ranking":
        roles = {"answers" if role == "response" else role: name for role, name in roles.items()}
    return {**entry, "columns": roles}


_SHARED = {
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
    "text": "text",
    "answers": "responses",
    "scores": "scores",
    "margin": "margin",
}
_COLUMNS: dict[Format, dict[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **_SHARED},
    "sharegpt": {"messages": "conversations", **_SHARED},
    "openai": {"messages": "messages", **_SHARED},
    "trl": {"messages": "messages", "prompt": "prompt", "response": "completion", **_SHARED},
}


# ---- alpaca --------------------------------------------------------------------------------------


def _alpaca(example: Example) -> Row:
    match example:
        case Chat(messages):
            return {**_alpaca_prompt(messages[:-1]), "output": _text(messages[-1:], "alpaca")}
        case Pair():
            sides = {"chosen": example.chosen, "rejected": example.rejected}
            return _alpaca_prompt(example.prompt) | {name: _text(side, "alpaca") for name, side in sides.items()}
        case Ranking():
            return {**_alpaca_prompt(example.prompt), "output": [_text(a, "alpaca") for a in example.answers]}
        case Feedback():
            answer = _text(example.answer, "alpaca")
            return {**_alpaca_prompt(example.prompt), "output": answer, "label": example.desirable}
        case Prompt(messages):
            return _alpaca_prompt(messages)
    raise AssertionError(example)


def _alpaca_prompt(messages: Messages) -> Row:
    system = messages[0].content if messages[0].role == "system" else ""
    turns = messages[1:] if system else messages
    if any(turn.role not in ("user", "assistant") or turn.tool_calls for turn in turns):
        raise RowProblem("alpaca has no tool calls", "a turn calls a tool or answers for one")
    if [turn.role for turn in turns[:-1]] != ["user", "assistant"] * (len(turns) // 2):
        raise RowProblem("alpaca has no such order of turns", ", ".join(turn.role for turn in turns))
    row: Row = {"instruction": turns[-1].content, "input": ""}
    if system:
        row["system"] = system
    if len(turns) > 1:
        contents = [turn.content for turn in turns[:-1]]
        row["history"] = [list(pair) for pair in zip(contents[::2], contents[1::2], strict=True)]
    return row


def _text(answer: Messages, form: str) -> str:
    if len(answer) != 1:
        raise RowProblem(f"{form} has no answers of several turns", f"{len(answer)} turns")
    if answer[0].tool_calls:
        raise RowProblem(f"{form} has no tool calls", "the answer calls a tool")
    return answer[0].content


# ---- sharegpt ------------------------------------------------------------------------------------


def _sharegpt(example: Example) -> Row:
    match example:
        case Chat(messages) | Prompt(messages):
            return _shared_turns(messages)
        case Pair():
            sides = {"chosen": example.chosen, "rejected": example.rejected}
            return _shared_turns(example.prompt) | {name: _sharegpt_side(side) for name, side in sides.items()}
        case Ranking():
            return {**_shared_turns(example.prompt), "responses": _answers(example, _shared_turn)}
        case Feedback():
            return {**_shared_turns((*example.prompt, *example.answer)), "label": example.desirable}
    raise AssertionError(example)


def _shared_turns(messages: Messages) -> Row:
    system = messages[0].content if messages[0].role == "system" else ""
    turns = messages[1:] if system else messages
    return {"conversations": [_shared_turn(turn) for turn in turns]} | ({"system": system} if system else {})


def _sharegpt_side(side: Messages) -> Any:
    turns = [_shared_turn(turn) for turn in side]
    return turns[0] if len(turns) == 1 else turns


def _shared_turn(message: Message) -> Json:
    if not message.tool_calls:
        return {"from": _FROM[message.role], "value": message.content}
    calls = [json.dumps(_call(call), ensure_ascii=False) for call in message.tool_calls]
    if not message.content:
        return {"from": "function_call", "value": calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"}
    tagged = "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
    return {"from": "function_call", "value": message.content + tagged}


def _call(call: Json) -> Json:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


# ---- openai and trl ------------------------------------------------------------------------------


def _openai(example: Example) -> Row:
    def turns(messages: Messages) -> list[Json]:
        return [_openai_turn(message) for message in messages]

    match example:
        case Chat(messages) | Prompt(messages):
            return {"messages": turns(messages)}
        case Pair():
            sides = {"chosen": turns(example.chosen), "rejected": turns(example.rejected)}
            return {"messages": turns(example.prompt), **sides}
        case Ranking():
            return {"messages": turns(example.prompt), "responses": _answers(example, _openai_turn)}
        case Feedback():
            return {"messages": turns((*example.prompt, *example.answer)), "label": example.desirable}
    raise AssertionError(example)


def _openai_turn(message: Message) -> Json:
    """A message as the API has it: arguments are JSON text."""
    turn = message.to_dict()
    if message.tool_calls:
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message.tool_calls
        ]
    return turn


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _trl(example: Example) -> Row:
    def turns(messages: Messages) -> list[Json]:
        return [message.to_dict() for message in messages]

    match example:
        case Chat(messages):
            return {"messages": turns(messages)}
        case Prompt(messages):
            return {"prompt": turns(messages)}
        case Pair():
            sides = {"chosen": turns(example.chosen), "rejected": turns(example.rejected)}
            return {"prompt": turns(example.prompt), **sides}
        case Ranking():
            return {"prompt": turns(example.prompt), "responses": _answers(example, Message.to_dict)}
        case Feedback():
            completion = turns(example.answer)
            return {"prompt": turns(example.prompt), "completion": completion, "label": example.desirable}
    raise AssertionError(example)


def _answers(example: Ranking, turn: Any) -> list[Any]:
    """Answers as texts where all are one plain turn, else as lists of turns."""
    if all(len(answer) == 1 and not answer[0].tool_calls for answer in example.answers):
        return [answer[0].content for answer in example.answers]
    return [[turn(message) for message in answer] for answer in example.answers]


def _plain(example: Chat | Pair | Ranking | Feedback | Prompt, form: Format) -> Row:
    """Texts that are no chat turns, which only TRL's format has."""
    if form != "trl":
        raise RowProblem(f"{form} has no plain texts", "a text that gets no chat template; trl holds it")

    def text(messages: Messages) -> str:
        return "".join(message.content for message in messages)

    match example:
        case Chat(messages):
            return {"prompt": text(messages[:-1]), "completion": text(messages[-1:])}
        case Prompt(messages):
            return {"prompt": text(messages)}
        case Pair():
            prompt = {"prompt": text(example.prompt)} if example.prompt else {}
            return {**prompt, "chosen": text(example.chosen), "rejected": text(example.rejected)}
        case Feedback():
            answer = text(example.answer)
            return {"prompt": text(example.prompt), "completion": answer, "label": example.desirable}
        case Ranking():
            return {"prompt": text(example.prompt), "responses": [text(answer) for answer in example.answers]}
