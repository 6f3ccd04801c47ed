"""Rows in other formats: what can be said is kept to the letter, the rest is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trueup.data.convert import TARGETS, convert
from trueup.data.examples import Chat, Example, Feedback, Message, Pair, Prompt, Ranking
from trueup.data.formats import RowProblem
from trueup.data.load import load_examples
from trueup.data.rowset import read_set
from trueup.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}, "id": "call_1"}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": " c "}]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ],
    "pair": [
        {"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"},
        {"system": None, "prompt": "你好", "chosen": "b 🎉", "rejected": "\tc"},
    ],
    "ranking": [{"prompt": "a", "responses": ["x", "y", "z"], "scores": [1.0, 3.0, 2.0]}],
    "feedback": [{"prompt": "a", "completion": "b", "label": 0}, {"prompt": "a", "completion": "c", "label": "yes"}],
    "text": [{"text": "one"}, {"text": " two\n"}],
}
TOOLS = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "I add.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def content(example: Example) -> tuple:
    """An example without its row id."""
    return tuple(getattr(example, name) for name in example.__slots__ if name != "row")


def again(file: Path, entry: dict[str, Any]) -> list[Example]:
    """The examples of a converted file, read by its entry."""
    (file.parent / "dataset_info.json").write_text(json.dumps({"new": {"file_name": file.name, **entry}}))
    found = [example for _, _, example in read_set("new", file.parent)]
    assert not any(isinstance(example, RowProblem) for example in found)
    return found


def usable(source: str) -> dict[int, Example]:
    return {index: found for index, _, found in read_set(source) if not isinstance(found, RowProblem)}


@pytest.mark.parametrize("to", ["alpaca", "sharegpt", "openai", "trl"])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_kind_survives_every_format(tmp_path, kind: str, to: str, suffix: str):
    source = write(tmp_path / "rows.jsonl", ROWS[kind])
    target = tmp_path / f"new{suffix}"
    outcome = convert(source, to, target)
    assert (outcome.read, outcome.kept, outcome.dropped) == (len(ROWS[kind]), len(ROWS[kind]), [])
    before = [content(example) for example in usable(source).values()]
    assert [content(example) for example in again(target, outcome.entries[str(target)])] == before


@pytest.mark.parametrize("to", ["sharegpt", "openai", "trl"])
def test_tool_calls_survive(tmp_path, to: str):
    source = write(tmp_path / "rows.jsonl", [TOOLS])
    target = tmp_path / "new.jsonl"
    outcome = convert(source, to, target)
    assert outcome.kept == 1
    (example,) = again(target, outcome.entries[str(target)])
    assert isinstance(example, Chat) and example.tools == (TOOL,)
    (call,) = example.messages[1].tool_calls
    assert call["function"] == CALL["function"] and example.messages[1].content == "I add."
    lost = any("ids of their tool calls" in note for note in outcome.notes)
    assert lost == ("id" not in call)


def test_what_a_format_cannot_say_is_dropped_counted_and_named(tmp_path):
    source = write(tmp_path / "rows.jsonl", [*ROWS["chat"], TOOLS])
    outcome = convert(source, "alpaca", tmp_path / "new.jsonl")
    assert (outcome.read, outcome.kept) == (3, 2)
    ((row, reason, _),) = outcome.dropped
    assert (row, reason) == ("rows:2", "alpaca has no tool calls")


def test_a_text_that_would_be_read_as_something_else_is_not_written(tmp_path):
    talk = "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye"  # alpaca's reader takes this for a transcript
    rows = [{"messages": [{"role": "user", "content": talk}, {"role": "assistant", "content": "b"}]}, ROWS["chat"][0]]
    outcome = convert(write(tmp_path / "rows.jsonl", rows), "alpaca", tmp_path / "new.jsonl")
    ((row, reason, _),) = outcome.dropped
    assert (row, reason) == ("rows:0", "alpaca would change it")


def test_pairs_become_two_labelled_answers(tmp_path):
    outcome = convert("dpo_en_demo", "kto", tmp_path / "kto.jsonl")
    pairs = load_examples(["dpo_en_demo"], kind="pair").train
    answers = again(tmp_path / "kto.jsonl", outcome.entries[str(tmp_path / "kto.jsonl")])
    assert outcome.read == outcome.kept == len(pairs) and len(answers) == 2 * len(pairs)
    for pair, good, bad in zip(pairs, answers[::2], answers[1::2], strict=True):
        assert isinstance(pair, Pair) and isinstance(good, Feedback) and isinstance(bad, Feedback)
        assert (good.prompt, good.answer, good.desirable) == (pair.prompt, pair.chosen, True)
        assert (bad.prompt, bad.answer, bad.desirable) == (pair.prompt, pair.rejected, False)


def test_rankings_become_pairs_and_pairs_rankings(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS["ranking"])
    (pair,) = again(tmp_path / "p.jsonl", convert(source, "pairs", tmp_path / "p.jsonl").entries[f"{tmp_path}/p.jsonl"])
    assert isinstance(pair, Pair) and (pair.chosen[0].content, pair.rejected[0].content) == ("y", "x")
    target = tmp_path / "r.jsonl"
    (ranking,) = again(target, convert(str(tmp_path / "p.jsonl"), "ranking", target).entries[str(target)])
    assert isinstance(ranking, Ranking) and len(ranking.answers) == 2


def test_chats_make_no_pairs(tmp_path):
    with pytest.raises(DataError, match="of which no kto can be made"):
        convert("alpaca_en_demo", "kto", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_other_columns_go_along_unless_their_names_mean_something(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "id": 7, "margin": 2.0, "label": "x"}]
    outcome = convert(write(tmp_path / "rows.jsonl", rows), "openai", tmp_path / "new.jsonl")
    (row,) = map(json.loads, (tmp_path / "new.jsonl").read_text().splitlines())
    assert (row["id"], row["margin"]) == (7, 2.0) and "label" not in row
    assert any("label" in note for note in outcome.notes)


def test_prompts_alone_survive(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    target = tmp_path / "new.jsonl"
    found = again(target, convert(source, "openai", target).entries[str(target)])
    assert all(isinstance(example, Prompt) for example in found)


def test_plain_texts_stay_plain_and_only_trl_holds_them(tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    (tmp_path / "dataset_info.json").write_text('{"plain": {"file_name": "rows.jsonl", "formatting": "trl"}}')
    target = tmp_path / "new.jsonl"
    outcome = convert("plain", "trl", target, tmp_path)
    assert outcome.entries[str(target)]["formatting"] == "trl"
    (pair,) = again(target, outcome.entries[str(target)])
    assert pair.plain
    (tmp_path / "dataset_info.json").write_text('{"plain": {"file_name": "rows.jsonl", "formatting": "trl"}}')
    with pytest.raises(DataError, match="0 of 1 rows"):
        convert("plain", "alpaca", tmp_path / "x.jsonl", tmp_path)


def test_trl_conversations_get_the_chat_template(tmp_path):
    turns = [[{"role": role, "content": role}] for role in ("user", "assistant")]
    rows = [{"prompt": turns[0], "chosen": turns[1], "rejected": [{"role": "assistant", "content": "x"}]}]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "dataset_info.json").write_text('{"t": {"file_name": "rows.jsonl", "formatting": "trl"}}')
    (pair,) = load_examples(["t"], kind="pair", dataset_dir=tmp_path).train
    assert not pair.plain and pair.chosen == (Message("assistant", "assistant"),)


TEXT = st.text(max_size=12) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "Human: x", "{{", "<tool_call>", ""])
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.fixed_dictionaries({"messages": st.lists(TURN, min_size=1, max_size=5)}), min_size=1, max_size=4),
    to=st.sampled_from(list(TARGETS)),
)
def test_no_row_is_lost_or_changed_whatever_it_says(tmp_path, rows, to):
    source = write(tmp_path / "rows.jsonl", rows)
    target = tmp_path / "new.jsonl"
    target.unlink(missing_ok=True)
    try:
        outcome = convert(source, to, target)
    except DataError:
        assert not target.exists()
        return
    assert outcome.read == outcome.kept + len(outcome.dropped) == len(rows)
    assert len({row for row, _, _ in outcome.dropped}) == len(outcome.dropped)
    gone = {int(row.rpartition(":")[2]) for row, _, _ in outcome.dropped}
    before = [content(e) for index, e in usable(source).items() if index not in gone]
    assert [content(example) for example in again(target, outcome.entries[str(target)])] == before
