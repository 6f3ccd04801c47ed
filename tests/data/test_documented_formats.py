"""Every layout that LLaMA-Factory (0.9 and V1), TRL and OpenAI document, each with its registry entry."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trueup.data.examples import Chat, Example, Feedback, Kind, Message, Pair, Prompt, Ranking, Text
from trueup.data.load import load_examples


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str, *calls: dict) -> Message:
    return Message("assistant", text, calls or None)


def system(text: str) -> Message:
    return Message("system", text)


def tool(text: str) -> Message:
    return Message("tool", text)


def call(name: str, **arguments: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def spec(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def sharegpt(role: str, text: str) -> dict:
    return {"from": role, "value": text}


def v1(role: str, *parts: tuple[str, str]) -> dict:
    content = [{"type": kind, "value": value} for kind, value in parts]
    return {"role": role, "content": content, "loss_weight": float(role == "assistant")}


ROW = "mine:0"
TOOLS = json.dumps([{"name": "f", "parameters": {"type": "object"}}])
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
CALLS = (call("f", x=1), call("f", x=2))
CALLED = (user("q"), bot("", *CALLS), tool("1"), bot("a"))


@dataclass
class Case:
    """A row, what it must become, and its entry in dataset_info.json beyond the file's name; {} for none at all."""

    kind: Kind
    row: dict
    example: Example
    entries: list[dict] = field(default_factory=lambda: [{}])


CASES: dict[str, Case] = {
    # ---- LLaMA-Factory, alpaca ----
    "alpaca sft": Case(
        "chat",
        {
            "instruction": "q",
            "input": "more",
            "output": "a",
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
        },
        Chat((system("s"), user("q1"), bot("a1"), user("q2"), bot("a2"), user("q\nmore"), bot("a")), ROW),
        [
            {
                "columns": {
                    "prompt": "instruction",
                    "query": "input",
                    "response": "output",
                    "system": "system",
                    "history": "history",
                }
            },
            {"columns": {"prompt": "instruction"}},
            {},
        ],
    ),
    "alpaca documents": Case(
        "text",
        {"text": "a document"},
        Text("a document", ROW),
        [{"columns": {"prompt": "text"}}, {"columns": {"text": "text"}, "type": "pretrain"}, {}],
    ),
    "alpaca pairs": Case(
        "pair",
        {"instruction": "q", "input": "more", "chosen": "good", "rejected": "bad"},
        Pair((user("q\nmore"),), (bot("good"),), (bot("bad"),), ROW),
        [
            {
                "ranking": True,
                "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
            },
            {"type": "dpo"},
            {},
        ],
    ),
    "alpaca feedback": Case(
        "feedback",
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
        Feedback((user("q"),), (bot("a"),), False, ROW),
        [
            {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"}},
            {"type": "kto"},
            {},
        ],
    ),
    # ---- LLaMA-Factory, sharegpt ----
    "sharegpt sft with tools": Case(
        "chat",
        {
            "conversations": [
                sharegpt("human", "q"),
                sharegpt("function_call", json.dumps([{"name": "f", "arguments": {"x": x}} for x in (1, 2)])),
                sharegpt("observation", "1"),
                sharegpt("gpt", "a"),
            ],
            "system": "s",
            "tools": TOOLS,
        },
        Chat((system("s"), *CALLED), ROW, (spec("f"),)),
        [
            {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system", "tools": "tools"}},
            {"formatting": "sharegpt"},
            {},
        ],
    ),
    "sharegpt pairs, sides as turns": Case(
        "pair",
        {
            "conversations": [sharegpt("human", "q1"), sharegpt("gpt", "a1"), sharegpt("human", "q")],
            "chosen": sharegpt("gpt", "good"),
            "rejected": sharegpt("gpt", "bad"),
        },
        Pair((user("q1"), bot("a1"), user("q")), (bot("good"),), (bot("bad"),), ROW),
        [
            {
                "formatting": "sharegpt",
                "ranking": True,
                "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            },
            {},
        ],
    ),
    "sharegpt pairs, sides as lists, after an observation": Case(
        "pair",
        {
            "conversations": [
                sharegpt("human", "q"),
                sharegpt("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                sharegpt("observation", "1"),
            ],
            "chosen": [sharegpt("gpt", "good")],
            "rejected": [sharegpt("function_call", '{"name": "f", "arguments": {"x": 2}}')],
            "tools": TOOLS,
        },
        Pair((user("q"), bot("", CALLS[0]), tool("1")), (bot("good"),), (bot("", CALLS[1]),), ROW, (spec("f"),)),
        [{"formatting": "sharegpt", "ranking": True}, {}],
    ),
    "sharegpt feedback with a number for a tag": Case(
        "feedback",
        {"conversations": [sharegpt("human", "q"), sharegpt("gpt", "a")], "label": 1},
        Feedback((user("q"),), (bot("a"),), True, ROW),
        [{"formatting": "sharegpt", "columns": {"messages": "conversations", "kto_tag": "label"}}, {}],
    ),
    "openai in sharegpt's clothes": Case(
        "chat",
        {"messages": [said("system", "s"), said("user", "q"), said("assistant", "a")]},
        Chat((system("s"), user("q"), bot("a")), ROW),
        [{"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS}, {}],
    ),
    # ---- OpenAI ----
    "openai with tool calls": Case(
        "chat",
        {
            "messages": [
                said("user", "q"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": f'{{"x": {x}}}'}} for x in (1, 2)
                    ],
                },
                said("tool", "1"),
                said("tool", "2"),
                said("assistant", "a"),
            ],
            "tools": [spec("f")],
        },
        Chat((user("q"), bot("", *CALLS), tool("1"), tool("2"), bot("a")), ROW, (spec("f"),)),
        [{"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}, {}],
    ),
    "openai with the function call of its first years": Case(
        "chat",
        {
            "messages": [
                said("user", "q"),
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                {"role": "function", "name": "f", "content": "1"},
                said("assistant", "a"),
            ]
        },
        Chat((user("q"), bot("", CALLS[0]), tool("1"), bot("a")), ROW),
    ),
    "a thought beside the answer": Case(
        "chat",
        {
            "messages": [
                said("user", "q"),
                {"role": "assistant", "reasoning_content": "hm", "content": "a"},
            ]
        },
        Chat((user("q"), bot("<think>\nhm\n</think>\n\na")), ROW),
        [{"formatting": "openai"}, {}],
    ),
    # ---- LLaMA-Factory's V1 ----
    "v1 sft with reasoning and calls": Case(
        "chat",
        {
            "messages": [
                v1("system", ("text", "s")),
                v1("user", ("text", "q")),
                v1(
                    "assistant",
                    ("reasoning", "hm"),
                    ("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
                    ("tool_call", '{"name": "f", "arguments": {"x": 2}}'),
                ),
                v1("tool", ("text", "1")),
                v1("assistant", ("reasoning", "so"), ("text", "a")),
            ],
            "tools": TOOLS,
        },
        Chat(
            (
                system("s"),
                user("q"),
                bot("<think>\nhm\n</think>\n\n", *CALLS),
                tool("1"),
                bot("<think>\nso\n</think>\n\na"),
            ),
            ROW,
            (spec("f"),),
        ),
    ),
    "v1 pairs": Case(
        "pair",
        {
            "chosen_messages": [
                v1("system", ("text", "s")),
                v1("user", ("text", "q")),
                v1("assistant", ("text", "good")),
            ],
            "rejected_messages": [
                v1("system", ("text", "s")),
                v1("user", ("text", "q")),
                v1("assistant", ("text", "bad")),
            ],
        },
        Pair((system("s"), user("q")), (bot("good"),), (bot("bad"),), ROW),
    ),
    # ---- TRL ----
    "trl language modelling": Case("text", {"text": "The sky is blue."}, Text("The sky is blue.", ROW)),
    "trl language modelling, conversational": Case(
        "chat", {"messages": [said("user", "q"), said("assistant", "a")]}, Chat((user("q"), bot("a")), ROW)
    ),
    "trl prompt only": Case("prompt", {"prompt": "q"}, Prompt((user("q"),), ROW)),
    "trl prompt only, conversational": Case("prompt", {"prompt": [said("user", "q")]}, Prompt((user("q"),), ROW)),
    "trl prompt and completion": Case("chat", {"prompt": "q", "completion": "a"}, Chat((user("q"), bot("a")), ROW)),
    "trl prompt and completion, plain": Case(
        "chat",
        {"prompt": "The sky is", "completion": " blue."},
        Chat((user("The sky is"), bot(" blue.")), ROW, plain=True),
        [{"formatting": "trl"}],
    ),
    "trl prompt and completion, conversational": Case(
        "chat",
        {"prompt": [said("user", "q")], "completion": [said("assistant", "a")]},
        Chat((user("q"), bot("a")), ROW),
        [{}, {"formatting": "trl"}],
    ),
    "trl preference": Case(
        "pair",
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        Pair((user("q"),), (bot("good"),), (bot("bad"),), ROW),
    ),
    "trl preference, conversational": Case(
        "pair",
        {
            "prompt": [said("user", "q")],
            "chosen": [said("assistant", "good")],
            "rejected": [said("assistant", "bad")],
        },
        Pair((user("q"),), (bot("good"),), (bot("bad"),), ROW),
        [{}, {"formatting": "trl"}],
    ),
    "trl preference, implicit prompt": Case(
        "pair",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Pair((), (bot("The sky is blue."),), (bot("The sky is green."),), ROW, plain=True),
    ),
    "trl preference, implicit prompt, conversational": Case(
        "pair",
        {
            "chosen": [said("user", "q"), said("assistant", "good")],
            "rejected": [said("user", "q"), said("assistant", "bad")],
        },
        Pair((user("q"),), (bot("good"),), (bot("bad"),), ROW),
    ),
    "trl unpaired": Case(
        "feedback",
        {"prompt": "q", "completion": "a", "label": True},
        Feedback((user("q"),), (bot("a"),), True, ROW),
    ),
    "trl unpaired, conversational": Case(
        "feedback",
        {"prompt": [said("user", "q")], "completion": [said("assistant", "a")], "label": False},
        Feedback((user("q"),), (bot("a"),), False, ROW),
    ),
    # ---- guides ----
    "answers as a list, best first": Case(
        "ranking",
        {"instruction": "q", "input": "", "output": ["best", "second", "worst"]},
        Ranking((user("q"),), ((bot("best"),), (bot("second"),), (bot("worst"),)), ROW),
        [{"type": "rm"}, {"ranking": True}, {}],
    ),
    "answers as contents, best first": Case(
        "pair",
        {"instruction": "q", "output": [{"content": "good"}, {"content": "bad"}]},
        Pair((user("q"),), (bot("good"),), (bot("bad"),), ROW),
        [{"ranking": True}, {}],
    ),
    "answers with scores": Case(
        "ranking",
        {"prompt": "q", "responses": ["bad", "good"], "scores": [1, 2.5]},
        Ranking((user("q"),), ((bot("good"),), (bot("bad"),)), ROW, (2.5, 1.0)),
    ),
    "answers with ranks": Case(
        "ranking",
        {"prompt": "q", "responses": ["bad", "good"], "rank": [2, 1]},
        Ranking((user("q"),), ((bot("good"),), (bot("bad"),)), ROW, (-1.0, -2.0)),
    ),
    "transcripts": Case(
        "pair",
        {
            "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant: bad",
        },
        Pair((user("q1"), bot("a1"), user("q")), (bot("good"),), (bot("bad"),), ROW),
    ),
    "pairs that part before the last turn": Case(
        "pair",
        {
            "chosen": [said("user", "q"), said("assistant", "good"), said("user", "x"), said("assistant", "y")],
            "rejected": [said("user", "q"), said("assistant", "bad"), said("user", "x"), said("assistant", "z")],
        },
        Pair((user("q"),), (bot("good"), user("x"), bot("y")), (bot("bad"), user("x"), bot("z")), ROW),
    ),
}


@pytest.mark.parametrize(
    ("name", "entry"), [(name, entry) for name, case in CASES.items() for entry in case.entries], ids=str
)
def test_a_documented_row_loads_as_it_stands(tmp_path: Path, name: str, entry: dict):
    case = CASES[name]
    (tmp_path / "mine.jsonl").write_text(json.dumps(case.row) + "\n", encoding="utf-8")
    registry = {"mine": {"file_name": "mine.jsonl", **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    source = "mine" if entry else str(tmp_path / "mine.jsonl")
    data = load_examples([source], kind=case.kind, dataset_dir=tmp_path)
    assert data.train == [case.example]
    report = data.report.datasets["mine"]
    assert (report.read, report.kept, report.num_dropped) == (1, 1, 0)


TAGS = [(True, True), (1, True), (1.0, True), ("1", True), ("true", True), ("Yes", True), ("desirable", True),
        (False, False), (0, False), ("0", False), ("FALSE", False), ("no", False), ("undesirable", False)]  # fmt: skip


def test_tags_that_llama_factory_drops_are_kept(tmp_path: Path):
    """There only real booleans count: other rows became ordinary examples, which KTO then left out."""
    rows = [{"instruction": f"q{i}", "output": "a", "kto_tag": tag} for i, (tag, _) in enumerate(TAGS)]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    data = load_examples([str(tmp_path / "mine.json")], kind="feedback", dataset_dir=tmp_path)
    assert [example.desirable for example in data.train] == [wanted for _, wanted in TAGS]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "value": "x.png"}, {"type": "text"}, {"type": "text", "text": 5}]
)
def test_a_part_that_is_no_text_is_refused(tmp_path: Path, part: dict):
    from trueup.errors import DataError

    row = {"messages": [{"role": "user", "content": [part]}, said("assistant", "a")]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="parts of type 'text'"):
        load_examples([str(tmp_path / "mine.jsonl")], kind="chat", dataset_dir=tmp_path)
