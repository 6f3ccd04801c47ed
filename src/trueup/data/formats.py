"""Rows in, examples out: alpaca, sharegpt, OpenAI, TRL, rankings, transcripts, text and labels.

A fault of a row is one of two things. A ShapeProblem: a column does not hold what its role needs (a
number where text belongs, null, a turn without a role); such data are refused, nothing is ever
coerced. A RowProblem: the row reads well but teaches nothing (an empty side, equal answers, roles
out of order); it is dropped, counted and shown, or refused with `on_bad_rows: error`.

Choices worth knowing
- Texts are chat turns and get the chat template, also in TRL's prompt/chosen/rejected. `formatting:
  trl` keeps them plain, as TRL does.
- Without a prompt column, whole conversations share their prompt: the common prefix of turns.
  Transcripts (`\\n\\nHuman: …`) are parsed into turns first. Other texts become one plain pair
  whose common prefix of tokens is the prompt; never one of characters.
- Where pairs are wanted, a ranking of N ≥ 2 answers gives its best and its worst.
- Where answers are wanted, pairs and rankings give theirs, feedback its one with the label as 1 or
  0, and a chat its last one with what its column `score` says.
- Labels: true/false, 1/0, "true"/"false", "yes"/"no", "desirable"/"undesirable", "1"/"0", any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trueup.data.examples import (
    Chat,
    Example,
    Feedback,
    Kind,
    Message,
    Messages,
    Pair,
    Prompt,
    Ranking,
    Text,
    Tools,
)
from trueup.data.layout import Layout, choose_layout
from trueup.data.registry import DatasetSpec
from trueup.data.turns import (
    RowProblem,
    ShapeProblem,
    check_roles,
    describe,
    is_transcript,
    parse_tools,
    parse_transcript,
    parse_turns,
    split_shared,
)

__all__ = [
    "Chat",
    "Example",
    "Feedback",
    "Kind",
    "Message",
    "Messages",
    "Pair",
    "Prompt",
    "Ranking",
    "RowProblem",
    "ShapeProblem",
    "Text",
    "Tools",
    "parse_row",
    "parse_with",
]

Row = Mapping[str, Any]

_LABELS = {
    "true": True,
    "yes": True,
    "1": True,
    "desirable": True,
    "false": False,
    "no": False,
    "0": False,
    "undesirable": False,
}


def parse_row(spec: DatasetSpec, index: int, row: Row, want: Kind) -> Example:
    """One row of a dataset as an example of kind `want`, its layout guessed from this row alone.

    To read a dataset, choose the layout once and use `parse_with`. Raises RowProblem, ShapeProblem,
    DataError.
    """
    return parse_with(choose_layout(spec, [row], want), f"{spec.name}:{index}", row)


def parse_with(layout: Layout, row_id: str, row: Row) -> Example:
    """A row as an example of kind `layout.want`. Raises RowProblem or ShapeProblem."""
    return _PARSERS[layout.want](_Reader(layout, row), row_id)


class _Reader:
    """One row seen through its dataset's layout."""

    __slots__ = ("layout", "row")

    def __init__(self, layout: Layout, row: Row) -> None:
        self.layout = layout
        self.row = row

    def value(self, role: str) -> Any:
        column = self.layout.columns.get(role)
        return None if column is None else self.row.get(column)

    def required(self, role: str) -> Any:
        """The value of a role that a row must have; a missing or null one is refused."""
        column = self.layout.columns[role]
        if column not in self.row:
            raise ShapeProblem(column, "nothing (the key is missing)", "a value")
        value = self.row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ShapeProblem(column, describe(value), "text")
        return value

    def text(self, role: str) -> str:
        value = self.required(role)
        if not isinstance(value, str):
            raise ShapeProblem(self.layout.columns[role], describe(value), "text")
        return _readable(value)

    def optional_text(self, role: str) -> str:
        """The text of a role that may be absent, null or NaN (a table's way of saying absent)."""
        value = self.value(role)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return self.text(role)

    def turns(self, role: str, value: Any) -> Messages:
        messages = parse_turns(value, self.layout.columns[role], self.layout.tags)
        for message in messages:
            _readable(message.content)
            _readable_within(message.tool_calls)
        return messages

    @property
    def tools(self) -> Tools | None:
        return _readable_within(parse_tools(self.value("tools"), self.layout.columns.get("tools", "tools")))


# ---- prompts and answers -------------------------------------------------------------------------


def _conversation(read: _Reader) -> Messages:
    """Every turn before the answer column: system, history and the question; or the whole
    `messages`.
    """
    system = read.optional_text("system")
    if read.layout.conversational:
        turns = read.turns("messages", _list(read, "messages"))
    elif "prompt" in read.layout.columns and not isinstance(read.required("prompt"), str):
        turns = read.turns("prompt", read.required("prompt"))
    else:
        turns = _history(read) + _question(read)
    return _with_system(system, turns)


def _question(read: _Reader) -> Messages:
    prompt = read.text("prompt") if "prompt" in read.layout.columns else ""
    query = read.optional_text("query")
    if not query and is_transcript(prompt) and not read.layout.plain:
        turns = parse_transcript(prompt)
        # "…\n\nAssistant:" at the end asks for the answer; it is not an empty one.
        return turns[:-1] if turns[-1] == Message("assistant", "") else turns
    joined = "\n".join(part for part in (prompt, query) if part)
    if not joined.strip():
        raise RowProblem("empty prompt", f"`{read.layout.columns.get('prompt', 'input')}` is empty")
    return (Message("user", joined),)


def _history(read: _Reader) -> Messages:
    value = read.value("history")
    if value is None:
        return ()
    column = read.layout.columns["history"]
    turns: list[Message] = []
    for exchange in value if isinstance(value, list) else [value]:
        two_texts = (
            isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)
        )
        if not two_texts:
            raise ShapeProblem(column, describe(value), "a list of [question, answer] texts")
        turns += [Message("user", exchange[0]), Message("assistant", exchange[1])]
    return tuple(turns)


def _with_system(system: str, turns: Messages) -> Messages:
    """The turns, with the system text of a column in front; blank system turns go."""
    if turns and turns[0].role == "system" and not turns[0].content.strip():
        turns = turns[1:]
    if system.strip() and not (turns and turns[0].role == "system"):
        return (Message("system", system), *turns)
    return turns


def _list(read: _Reader, role: str) -> list:
    value = read.required(role)
    if not isinstance(value, list):
        raise ShapeProblem(read.layout.columns[role], describe(value), "a list of turns")
    if not value:
        raise RowProblem("empty prompt", f"`{read.layout.columns[role]}` has no turns")
    return value


def _answer(read: _Reader, role: str, value: Any, side: str) -> Messages:
    """An answer given as text, as one turn, or as a list of turns."""
    column = read.layout.columns[role]
    if isinstance(value, str):
        turns: Messages = (Message("assistant", _readable(value)),)
    elif isinstance(value, dict) and not {"role", "from"} & value.keys():
        # {"content": …}: an answer has no need to say whose it is.
        text = next((value[k] for k in ("content", "value", "text") if k in value), None)
        if not isinstance(text, str):
            raise ShapeProblem(column, describe(text), 'text, or {"content": text}')
        turns = (Message("assistant", _readable(text)),)
    elif isinstance(value, dict | list):
        turns = read.turns(role, value)
    else:
        raise ShapeProblem(column, describe(value), "text, a turn or a list of turns")
    if not turns:
        raise RowProblem(f"empty {side}", f"`{column}` has no turns")
    return turns


def _refuse_empty(turns: Messages, side: str) -> None:
    if any(t.role == "assistant" and not t.content.strip() and not t.tool_calls for t in turns):
        raise RowProblem(f"empty {side}")


def _check(prompt: Messages, sides: Mapping[str, Messages]) -> None:
    """Every rule of a prompt with continuations."""
    check_roles(prompt, ends_with="user")
    for name, side in sides.items():
        check_roles(side, "assistant", first=len(prompt), after=prompt[-1].role)
        _refuse_empty(side, name)


# ---- one parser per kind -------------------------------------------------------------------------


def _text(read: _Reader, row: str) -> Text:
    text = read.text("text")
    if not text.strip():
        raise RowProblem("empty text")
    return Text(text, row)


def _chat(read: _Reader, row: str) -> Chat:
    turns = _conversation(read)
    if not read.layout.conversational:
        turns += _answer(read, "response", read.required("response"), "answer")
    check_roles(turns, ends_with="assistant")
    _refuse_empty(turns, "answer")
    return Chat(turns, row, read.tools, read.layout.plain)


def _pair(read: _Reader, row: str) -> Pair:
    if read.layout.gives == "ranking":
        ranking = _ranking(read, row)
        if ranking.scores and ranking.scores[0] == ranking.scores[-1]:
            raise RowProblem("all answers tie", f"{len(ranking.answers)} equal scores")
        best, worst = ranking.answers[0], ranking.answers[-1]
        _refuse_equal(best, worst)
        return Pair(ranking.prompt, best, worst, row, ranking.tools, ranking.plain)
    prompt, chosen, rejected, plain = _sides(read)
    if not plain or prompt:
        _check(prompt, {"chosen": chosen, "rejected": rejected})
    _refuse_equal(chosen, rejected)
    return Pair(prompt, chosen, rejected, row, read.tools, plain)


def _sides(read: _Reader) -> tuple[Messages, Messages, Messages, bool]:
    """(prompt, chosen, rejected, plain) of a row with two sides."""
    good, bad = read.required("chosen"), read.required("rejected")
    has_prompt = read.layout.conversational or bool({"prompt", "query"} & read.layout.columns.keys())
    if not has_prompt and isinstance(good, str) and isinstance(bad, str):
        return _two_texts(read, good, bad)
    chosen = _answer(read, "chosen", good, "chosen")
    rejected = _answer(read, "rejected", bad, "rejected")
    system = read.optional_text("system")
    if chosen[0].role != "assistant" and rejected[0].role != "assistant":
        # Whole conversations: what they share is the prompt, whatever other column repeats it.
        chosen, rejected = _with_system(system, chosen), _with_system(system, rejected)
        _refuse_equal(chosen, rejected)
        return *split_shared(chosen, rejected), False
    if not has_prompt:
        raise RowProblem("no common prompt", "neither a prompt column nor whole conversations")
    return _conversation(read), chosen, rejected, read.layout.plain


def _two_texts(read: _Reader, good: str, bad: str) -> tuple[Messages, Messages, Messages, bool]:
    """Whole dialogues as one text each: transcripts are parsed, anything else stays plain."""
    for side, text in (("chosen", good), ("rejected", bad)):
        if not _readable(text).strip():
            raise RowProblem(f"empty {side}")
    if read.layout.transcript:
        chosen, rejected = parse_transcript(good), parse_transcript(bad)
        _refuse_empty(chosen[-1:], "chosen")
        _refuse_empty(rejected[-1:], "rejected")
        _refuse_equal(chosen, rejected)
        return *split_shared(chosen, rejected), False
    return (), (Message("assistant", good),), (Message("assistant", bad),), True


def _refuse_equal(chosen: Messages, rejected: Messages) -> None:
    def stripped(turns: Messages) -> list:
        return [(turn.role, turn.content.strip(), turn.tool_calls) for turn in turns]

    if stripped(chosen) == stripped(rejected):
        raise RowProblem("equal pair", "chosen and rejected are the same")


def _ranking(read: _Reader, row: str) -> Ranking:
    if read.layout.gives == "pair":
        pair = _pair(read, row)
        answers = pair.chosen, pair.rejected
        return Ranking(pair.prompt, answers, row, tools=pair.tools, plain=pair.plain, margin=_number(read, "margin"))
    role = "answers" if "answers" in read.layout.columns else "response"
    column, values = read.layout.columns[role], read.required(role)
    if not isinstance(values, list):
        raise ShapeProblem(column, describe(values), "a list of answers")
    if len(values) < 2 and (read.layout.want != "answers" or not values):
        raise RowProblem("fewer than two answers", f"`{column}` has {len(values)}")
    scores = _scores(read, values, column)
    answers = [_answer(read, role, value, "answer") for value in values]
    prompt = _conversation(read)
    for answer in answers:
        _check(prompt, {"answer": answer})
    if scores:
        # Stable: answers of equal score stay in the order given.
        order = sorted(range(len(answers)), key=lambda i: -scores[i])
        answers, scores = [answers[i] for i in order], sorted(scores, reverse=True)
    return Ranking(
        prompt,
        tuple(answers),
        row,
        tuple(scores) if scores else None,
        read.tools,
        read.layout.plain,
    )


def _scores(read: _Reader, answers: list, column: str) -> list[float] | None:
    """A score per answer, higher is better; from `scores`, from `ranks` (1 is best) or inside the
    answers.
    """
    scores, score_column = read.value("scores"), read.layout.columns.get("scores", column)
    ranks = read.value("ranks")
    if scores is None and ranks is None and all(isinstance(a, dict) for a in answers):
        inside = [a.get("score") for a in answers]
        scores = inside if any(score is not None for score in inside) else None
    if scores is not None:
        _check_numbers(scores, len(answers), score_column, "one number per answer")
        return [float(score) for score in scores]
    if ranks is None:
        return None
    column = read.layout.columns["ranks"]
    expected = "a permutation of 1 … N (or 0 … N-1), 1 best"
    _check_numbers(ranks, len(answers), column, expected)
    if sorted(ranks) not in (list(range(1, len(ranks) + 1)), list(range(len(ranks)))):
        raise ShapeProblem(column, f"ranks {ranks}", expected)
    return [-float(rank) for rank in ranks]


def _check_numbers(values: Any, count: int, column: str, expected: str) -> None:
    if not isinstance(values, list):
        raise ShapeProblem(column, describe(values), expected)
    if len(values) != count:
        raise ShapeProblem(column, f"{len(values)} numbers for {count} answers", expected)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ShapeProblem(column, f"a list with {describe(value)}", expected)
        if not math.isfinite(value):
            raise ShapeProblem(column, f"a list with {value}", expected)


def _number(read: _Reader, role: str) -> float | None:
    """The number of a role that may be absent or null."""
    value = read.value(role)
    if value is None:
        return None
    _check_numbers([value], 1, read.layout.columns[role], "a number")
    return float(value)


def _answers(read: _Reader, row: str) -> Ranking:
    """The answers of a row of any kind that has some, with what the data says of them."""
    match read.layout.gives:
        case "ranking" | "pair":
            return _ranking(read, row)
        case "feedback":
            feedback = _feedback(read, row)
            prompt, answer, score = feedback.prompt, feedback.answer, float(feedback.desirable)
        case _:
            *before, last = _chat(read, row).messages
            prompt, answer, score = tuple(before), (last,), _number(read, "score")
            _check(prompt, {"answer": answer})
    scores = None if score is None else (score,)
    return Ranking(prompt, (answer,), row, scores, read.tools, read.layout.plain)


def _feedback(read: _Reader, row: str) -> Feedback:
    desirable = _label(read)
    turns = _conversation(read)
    if read.layout.conversational:
        check_roles(turns, ends_with="assistant")
        prompt, answer = turns[:-1], turns[-1:]
    else:
        prompt, answer = turns, _answer(read, "response", read.required("response"), "answer")
    _check(prompt, {"answer": answer})
    return Feedback(prompt, answer, desirable, row, read.tools, read.layout.plain)


def _label(read: _Reader) -> bool:
    value = read.required("kto_tag")
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    known = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        raise ShapeProblem(
            read.layout.columns["kto_tag"],
            f"the label {value!r}" if isinstance(value, str | int | float) else describe(value),
            "true/false, 1/0, yes/no or desirable/undesirable",
        )
    return known


def _prompt(read: _Reader, row: str) -> Prompt:
    """The question of a row of any kind; answers that are there are left out."""
    if read.layout.gives == "pair":
        prompt, _, _, plain = _sides(read)
        if plain and not prompt:
            raise RowProblem("no prompt", "chosen and rejected are whole texts")
        check_roles(prompt, ends_with="user")
        return Prompt(prompt, row, read.tools, plain)
    turns = _conversation(read)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    check_roles(turns, ends_with="user")
    return Prompt(turns, row, read.tools, read.layout.plain)


_PARSERS = {
    "text": _text,
    "chat": _chat,
    "pair": _pair,
    "ranking": _ranking,
    "answers": _answers,
    "feedback": _feedback,
    "prompt": _prompt,
}


def _readable(text: str) -> str:
    """The text itself, unless no tokenizer could take it: NUL, lone surrogates."""
    position = text.find("\0")
    if position < 0 and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            position = error.start
    if position >= 0:
        raise RowProblem("unreadable character", f"U+{ord(text[position]):04X} at {position}")
    return text


def _readable_within(value: Any) -> Any:
    """The value itself, unless a text anywhere in it is unreadable; JSON can hide that in an escape."""
    match value:
        case str():
            _readable(value)
        case Mapping():
            for key, item in value.items():
                _readable(key)
                _readable_within(item)
        case list() | tuple():
            for item in value:
                _readable_within(item)
    return value
