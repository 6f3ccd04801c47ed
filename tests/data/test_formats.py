"""Every documented layout becomes the same examples."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trueup.data.examples import Chat, Message, Pair, Prompt, Ranking, Text
from trueup.data.formats import RowProblem, ShapeProblem, parse_row
from trueup.data.layout import choose_layout
from trueup.data.load import load_examples
from trueup.data.registry import DatasetSpec, resolve_datasets
from trueup.data.turns import parse_transcript, split_shared
from trueup.errors import DataError


def parse(row, want="pair", **spec):
    return parse_row(DatasetSpec("mine", "test", **spec), 0, row, want)


def user(text) -> Message:
    return Message("user", text)


def bot(text) -> Message:
    return Message("assistant", text)


def oai(*turns) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns) -> list[dict]:
    return [{"from": role, "value": text} for role, text in turns]


PAIR = Pair((user("q"),), (bot("good"),), (bot("bad"),), "mine:0")
FULL_GOOD, FULL_BAD = (
    oai(("user", "q"), ("assistant", "good")),
    oai(("user", "q"), ("assistant", "bad")),
)

PAIR_ROWS = {
    "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "trl strings": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "trl messages": {
        "prompt": oai(("user", "q")),
        "chosen": oai(("assistant", "good")),
        "rejected": oai(("assistant", "bad")),
    },
    "trl implicit prompt": {"chosen": FULL_GOOD, "rejected": FULL_BAD},
    "ultrafeedback": {
        "prompt": "q",
        "prompt_id": "0",
        "chosen": FULL_GOOD,
        "rejected": FULL_BAD,
        "messages": FULL_GOOD,
        "score_chosen": 9.0,
    },
    "sharegpt": {
        "conversations": sharegpt(("human", "q")),
        "chosen": sharegpt(("gpt", "good"))[0],
        "rejected": sharegpt(("gpt", "bad"))[0],
    },
    "sharegpt with strings": {
        "conversations": sharegpt(("human", "q")),
        "chosen": "good",
        "rejected": "bad",
    },
    "sharegpt with lists": {
        "conversations": sharegpt(("human", "q")),
        "chosen": sharegpt(("gpt", "good")),
        "rejected": sharegpt(("gpt", "bad")),
    },
    "openai": {
        "messages": oai(("user", "q")),
        "chosen": oai(("assistant", "good"))[0],
        "rejected": oai(("assistant", "bad"))[0],
    },
    "content only": {"prompt": "q", "chosen": {"content": "good"}, "rejected": {"content": "bad"}},
    "ranking of contents": {
        "instruction": "q",
        "output": [{"content": "good"}, {"content": "so so"}, {"content": "bad"}],
    },
    "ranking of texts": {"instruction": "q", "input": "", "output": ["good", "so so", "bad"]},
    "scores": {"prompt": "q", "responses": ["bad", "good", "so so"], "scores": [1, 9, 5]},
    "ranks": {"prompt": "q", "responses": ["bad", "good", "so so"], "rank": [3, 1, 2]},
    "scores inside": {
        "instruction": "q",
        "output": [{"content": "bad", "score": 0.1}, {"content": "good", "score": 0.7}],
    },
    "transcripts": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "transcript prompt": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "good",
        "rejected": "bad",
    },
    "content parts": {
        "chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "good"}]},
        ],
        "rejected_messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "bad"}]},
        ],
    },
    "null columns of a table": {
        "prompt": "q",
        "system": None,
        "history": None,
        "tools": None,
        "chosen": "good",
        "rejected": "bad",
    },
}


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_every_layout_of_a_pair_gives_the_same_pair(name):
    assert parse(PAIR_ROWS[name]) == PAIR


CHAT = Chat((user("q"), bot("a")), "mine:0")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "", "input": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "response": "a"},
        {"prompt": oai(("user", "q")), "completion": oai(("assistant", "a"))},
        {"conversations": sharegpt(("human", "q"), ("gpt", "a"))},
        {"messages": oai(("user", "q"), ("assistant", "a"))},
        {"messages": oai(("user", "q"), ("assistant", "a")), "label": 3, "text": "q a"},
        {"messages": sharegpt(("system", " "), ("human", "q"), ("gpt", "a"))},
    ],
)
def test_every_layout_of_a_chat_gives_the_same_chat(row):
    assert parse(row, "chat") == CHAT


def test_system_history_and_query_of_alpaca():
    row = {
        "instruction": "sum up",
        "input": "this text",
        "output": "done",
        "system": "be brief",
        "history": [["hi", "hello"], ["you?", "fine"]],
    }
    assert parse(row, "chat").messages == (
        Message("system", "be brief"),
        user("hi"),
        bot("hello"),
        user("you?"),
        bot("fine"),
        user("sum up\nthis text"),
        bot("done"),
    )


def test_a_system_column_joins_a_conversation_once():
    row = {"conversations": sharegpt(("human", "q"), ("gpt", "a")), "system": "be kind"}
    assert parse(row, "chat").messages[0] == Message("system", "be kind")
    row["conversations"].insert(0, {"from": "system", "value": "own"})
    assert parse(row, "chat").messages[0] == Message("system", "own")


# ---- registry columns and tags ----


def test_partial_columns_fall_back_to_the_defaults():
    row = {"question": "q", "output": "a"}
    assert parse(row, "chat", columns={"prompt": "question"}) == CHAT
    row = {"dialog": sharegpt(("human", "q"), ("gpt", "a"))}
    assert parse(row, "chat", columns={"messages": "dialog"}, formatting="sharegpt") == CHAT


def test_partial_tags_fall_back_to_the_defaults():
    row = {"conversations": [{"from": "me", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert parse(row, "chat", tags={"user_tag": "me"}) == CHAT
    row = {"conversations": [{"who": "human", "value": "q"}, {"who": "gpt", "value": "a"}]}
    assert parse(row, "chat", tags={"role_tag": "who"}) == CHAT


def test_a_tag_replaces_the_usual_names_of_its_role():
    with pytest.raises(RowProblem, match="turn 0 is by 'human'"):
        parse(
            {"conversations": sharegpt(("human", "q"), ("gpt", "a"))},
            "chat",
            tags={"user_tag": "me"},
        )


def test_null_leaves_a_column_out(caplog):
    row = {"instruction": "q", "input": "more", "output": "a"}
    assert parse(row, "chat", columns={"query": None}) == CHAT
    with caplog.at_level(logging.INFO, "trueup"):
        parse(row, "chat", columns={"prompt": "instruction"})
    assert '"query": null' in caplog.text


def test_a_guessed_layout_is_said(caplog):
    with caplog.at_level(logging.INFO, "trueup"):
        parse({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, "chat")
    assert "look like sharegpt" in caplog.text


@pytest.mark.parametrize(
    ("row", "formatting", "words"),
    [
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, "alpaca", "sharegpt"),
        ({"instruction": "q", "output": "a"}, "sharegpt", "no column `conversations`"),
    ],
)
def test_an_explicit_formatting_that_does_not_fit_is_refused(row, formatting, words):
    with pytest.raises(DataError, match=words):
        parse(row, "chat", formatting=formatting)


def test_type_settles_what_columns_leave_open():
    row = {"instruction": "q", "output": "a", "chosen": "good", "rejected": "bad", "extra": 1}
    assert isinstance(parse(row, "chat", kind="chat"), Chat)
    assert isinstance(parse(row, "pair", kind="pair"), Pair)
    with pytest.raises(DataError, match="holds preference pairs"):
        parse(row, "chat", ranking=True)
    with pytest.raises(DataError, match="holds prompts with one answer"):
        parse(row, "pair", kind="chat")


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        ({"text": "a document"}, {}),
        ({"text": "a document"}, {"kind": "text", "columns": {"text": "text"}}),
        ({"text": "a document"}, {"columns": {"prompt": "text"}}),
        ({"body": "a document"}, {"columns": {"text": "body"}}),
        ({"instruction": "q", "output": "a", "text": "a document"}, {}),
    ],
)
def test_text(row, spec):
    assert parse(row, "text", **spec) == Text("a document", "mine:0")


# ---- pairs ----


def test_conversations_share_a_prompt_at_a_turn_boundary():
    start = [("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {
        "chosen": oai(*start, ("assistant", "The same beginning, good")),
        "rejected": oai(*start, ("assistant", "The same beginning, bad")),
    }
    pair = parse(row)
    assert [m.content for m in pair.prompt] == ["a", "b", "c"]
    assert pair.chosen == (bot("The same beginning, good"),)


def test_conversations_that_part_early_keep_every_turn():
    row = {
        "chosen": oai(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        "rejected": oai(("user", "a"), ("assistant", "x"), ("user", "y"), ("assistant", "z")),
    }
    pair = parse(row)
    assert pair.prompt == (user("a"),)
    assert [len(pair.chosen), len(pair.rejected)] == [3, 3]


def test_conversations_that_part_at_a_question_go_back_to_the_one_before():
    one = (user("a"), bot("b"), user("c"), bot("d"))
    other = (user("a"), bot("b"), user("x"), bot("d"))
    assert split_shared(one, other) == ((user("a"),), one[1:], other[1:])


def test_a_conversation_that_ends_before_the_other_keeps_an_answer():
    short = (user("a"), bot("b"))
    long = (user("a"), bot("b"), user("c"), bot("d"))
    assert split_shared(short, long) == ((user("a"),), short[1:], long[1:])


def test_conversations_without_a_common_question_are_no_pair():
    with pytest.raises(RowProblem, match="no common prompt"):
        parse({"chosen": FULL_GOOD, "rejected": oai(("user", "other"), ("assistant", "bad"))})


def test_transcripts_are_parsed_into_turns():
    text = "\n\nHuman: a\n\nwith a paragraph\n\nAssistant: b\n\nAssistant: c"
    text += "\n\nHuman: d\n\nAssistant: "
    assert parse_transcript(text) == (
        user("a\n\nwith a paragraph"),
        bot("b\n\nc"),
        user("d"),
        bot(""),
    )


def test_a_row_that_is_no_transcript_among_transcripts_is_a_problem():
    spec = DatasetSpec("mine", "test")
    rows = [
        PAIR_ROWS["transcripts"],
        {"chosen": "just text", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ]
    from trueup.data.formats import parse_with

    layout = choose_layout(spec, rows, "pair")
    with pytest.raises(RowProblem, match="does not begin with"):
        parse_with(layout, "mine:1", rows[1])


def test_other_whole_texts_stay_plain_and_whole():
    pair = parse({"chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"})
    assert pair.plain and pair.prompt == ()
    assert pair.chosen == (bot("Q: 1+1? A: 2"),)


def test_trl_keeps_texts_plain_when_asked_to():
    pair = parse(PAIR_ROWS["trl strings"], formatting="trl")
    assert pair.plain and pair.prompt == (user("q"),)
    assert not parse(PAIR_ROWS["trl messages"]).plain


def test_a_prompt_may_end_with_tool_results():
    turns = sharegpt(
        ("human", "weather?"),
        ("function_call", '{"name": "get", "arguments": {"city": "Oslo"}}'),
        ("observation", '{"temp": 3}'),
    )
    tools = json.dumps([{"name": "get", "parameters": {"type": "object"}}])
    pair = parse({"conversations": turns, "chosen": "3 °C", "rejected": "hot", "tools": tools})
    assert [m.role for m in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.prompt[1].tool_calls == (
        {"type": "function", "function": {"name": "get", "arguments": {"city": "Oslo"}}},
    )
    assert pair.tools == ({"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}},)


# ---- tools ----


def test_several_calls_in_a_turn_and_several_results():
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": None}}],
    }
    chat = parse(row, "chat")
    assert len(chat.messages[1].tool_calls) == 2
    assert chat.messages[1].to_dict()["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("value", "thought", "names"),
    [
        ('{"name": "f", "arguments": {}}', "", ["f"]),
        ('[{"name": "f", "arguments": {}}, {"name": "g"}]', "", ["f", "g"]),
        ('I look it up. {"name": "f", "arguments": "{}"}', "I look it up.", ["f"]),
        (
            '<tool_call>\n{"name": "f"}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            "",
            ["f", "g"],
        ),
    ],
)
def test_function_calls_of_sharegpt(value, thought, names):
    row = {"conversations": sharegpt(("human", "q"), ("function_call", value), ("observation", "1"), ("gpt", "a"))}
    message = parse(row, "chat").messages[1]
    assert message.content == thought
    assert [call["function"]["name"] for call in message.tool_calls] == names


@pytest.mark.parametrize("value", ["no json", "{", '{"arguments": {}}', '{"name": "f", "arguments": [1]}'])
def test_a_call_that_is_none_is_a_problem_of_its_row(value):
    with pytest.raises(RowProblem, match="bad tool call"):
        parse({"conversations": sharegpt(("human", "q"), ("function_call", value))}, "chat")


# ---- rankings, feedback, prompts ----


def test_a_ranking_is_sorted_by_score_best_first():
    ranking = parse(PAIR_ROWS["scores"], "ranking")
    assert [a[0].content for a in ranking.answers] == ["good", "so so", "bad"]
    assert ranking.scores == (9.0, 5.0, 1.0)
    assert parse(PAIR_ROWS["ranking of texts"], "ranking").scores is None


def test_a_pair_is_a_ranking_of_two():
    ranking = parse(PAIR_ROWS["trl strings"], "ranking")
    assert ranking == Ranking((user("q"),), ((bot("good"),), (bot("bad"),)), "mine:0")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": oai(("user", "q"), ("assistant", "a")), "label": True},
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": oai(("user", "q")), "completion": oai(("assistant", "a")), "label": True},
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
    ],
)
def test_every_layout_of_feedback(row):
    feedback = parse(row, "feedback")
    assert (feedback.prompt, feedback.answer, feedback.desirable) == (
        (user("q"),),
        (bot("a"),),
        True,
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"instruction": "q", "output": "a"},
        {"messages": oai(("user", "q"), ("assistant", "a"))},
        {"messages": oai(("user", "q"))},
        *PAIR_ROWS.values(),
    ],
)
def test_prompts_come_from_rows_of_any_kind(row):
    assert parse(row, "prompt") == Prompt((user("q"),), "mine:0")


# ---- nothing crashes, nothing is lost ----

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("Human: a"))
turn = st.dictionaries(
    st.sampled_from(["from", "value", "role", "content", "tool_calls"]),
    st.one_of(st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool"]), scalars),
    max_size=4,
)
values = st.recursive(
    st.one_of(scalars, turn, st.lists(turn, max_size=4)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    ["prompt", "instruction", "input", "output", "chosen", "rejected", "messages", "conversations"]
    + ["label", "text", "system", "history", "tools", "responses", "scores", "rank", "good", "bad"]
)
rows_strategy = st.lists(st.dictionaries(columns, values, max_size=6), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows_strategy, st.sampled_from(["text", "chat", "pair", "ranking", "feedback", "prompt"]))
def test_any_row_is_an_example_or_a_named_problem(rows, want):
    from trueup.data.formats import parse_with

    spec = DatasetSpec("mine", "test")
    try:
        layout = choose_layout(spec, rows, want)
    except DataError:
        return
    for index, row in enumerate(rows):
        try:
            example = parse_with(layout, f"mine:{index}", row)
        except (RowProblem, ShapeProblem):
            continue
        assert example.row == f"mine:{index}"


good_pairs = st.fixed_dictionaries(
    {k: st.sampled_from(["", " ", "a", "b", "c\0", "a "]) for k in ("prompt", "chosen", "rejected")}
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(good_pairs, min_size=1, max_size=12))
def test_read_equals_kept_plus_dropped(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        data = load_examples([str(path)], kind="pair")
    except DataError as error:
        assert "0 of" in str(error)
        return
    report = data.report.to_dict()["datasets"]["rows"]
    assert report["read"] == len(rows)
    assert report["read"] == report["kept"] + sum(d["count"] for d in report["dropped"].values())
    assert report["kept"] == len(data.train)


# ---- real data ----

REAL = {
    "dpo_en_demo": ("pair", 300),
    "hh_harmless": ("pair", 1496),
    "kto_en_demo": ("feedback", 300),
    "alpaca_zh_demo": ("chat", 300),
    "identity": ("chat", 91),
    "c4_demo": ("text", 150),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_load_as_they_are_registered(real_data, name):
    kind, kept = REAL[name]
    assert resolve_datasets([name], real_data)[0].source.parent == real_data
    data = load_examples([name], kind=kind, dataset_dir=real_data)
    assert len(data.train) == kept


@pytest.mark.parametrize("name", REAL)
def test_real_sets_load_without_a_registry(real_data, name):
    [path] = real_data.glob(f"{name}.json*")
    kind, kept = REAL[name]
    assert len(load_examples([str(path)], kind=kind).train) == kept


def test_placeholders_nobody_filled_in_are_said(real_data, caplog):
    load_examples(["identity"], kind="chat", dataset_dir=real_data)
    assert "85 rows hold a placeholder such as {{name}}" in caplog.text


def test_the_four_empty_sides_of_hh_are_dropped_counted_and_shown(real_data):
    data = load_examples(["hh_harmless"], kind="pair", dataset_dir=real_data)
    dropped = data.report.datasets["hh_harmless"].dropped
    assert {reason: rows.ids for reason, rows in dropped.items()} == {
        "empty chosen": [f"hh_harmless:{i}" for i in (86, 516, 925, 1103)]
    }
    assert "86, 516, 925, 1103" in data.report.render()
    assert all(e.prompt[-1].role == "user" and len(e.chosen) == 1 for e in data.train)
    with pytest.raises(DataError, match="empty chosen in 4 of 1 500 rows"):
        load_examples(["hh_harmless"], kind="pair", dataset_dir=real_data, on_bad_rows="error")


# --- answers with what the data says of them ------------------------------------------------------

QUESTION = (user("q"),)


@pytest.mark.parametrize(
    ("row", "answers", "scores"),
    [
        ({"instruction": "q", "output": "a", "score": 3}, ["a"], (3.0,)),
        ({"instruction": "q", "output": "a"}, ["a"], None),
        ({"messages": FULL_GOOD, "score": 0.5}, ["good"], (0.5,)),
        ({"instruction": "q", "output": "a", "kto_tag": True}, ["a"], (1.0,)),
        ({"instruction": "q", "output": [{"content": "a", "score": 2}]}, ["a"], (2.0,)),
        ({"instruction": "q", "output": ["a", "b"], "scores": [1, 4]}, ["b", "a"], (4.0, 1.0)),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, ["a", "b"], None),
    ],
)
def test_answers_come_from_rows_of_many_kinds(row: dict, answers: list[str], scores: tuple | None):
    assert parse(row, "answers") == Ranking(QUESTION, tuple((bot(text),) for text in answers), "mine:0", scores)


@pytest.mark.parametrize("want", ["ranking", "answers"])
def test_a_pair_may_bring_a_margin(want: str):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}
    assert parse(row, want).margin == 0.5
    assert parse({**row, "margin": None}, want).margin is None
    with pytest.raises(ShapeProblem):
        parse({**row, "margin": "much"}, want)


def test_a_ranking_of_one_is_dropped_where_rankings_are_wanted():
    with pytest.raises(RowProblem, match="fewer than two"):
        parse({"instruction": "q", "output": ["a"]}, "ranking")


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [{"name": "f", "parameters": {"\ud800": False}}]},
        {"tools": '[{"name": "f", "description": "\\u0000"}]'},
        {"calls": [{"name": "f", "arguments": {"x": ["a\ud800"]}}]},
    ],
)
def test_what_no_tokenizer_could_read_is_found_inside_tools_and_calls_too(row):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    if "calls" in row:
        turns[1]["tool_calls"] = row.pop("calls")
    with pytest.raises(RowProblem, match="unreadable character"):
        parse({"messages": turns, **row}, "chat")
