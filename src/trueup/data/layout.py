"""Which column plays which role, decided once per dataset: registry, usual names, and what the rows
look like.

Everything here is about columns; rows are `formats.py`'s. The question is always "can these columns
give the kind of example the stage wants?", and a no tells which of two things is wrong: a column
that has another name (D5, with the mapping to write), or a dataset of another kind (D21, with the
stages it fits).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from trueup.data.examples import Kind
from trueup.data.registry import DatasetSpec
from trueup.data.turns import Tags, is_transcript
from trueup.errors import DataError, Problem

log = logging.getLogger("trueup")

PEEKED = 1000  # rows that decide how a dataset is read, where not all are at hand

#: Usual names of the column of each role, best first.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input",),
    "response": ("output", "response", "completion"),
    "history": ("history",),
    "messages": ("conversations", "messages", "conversation"),
    "system": ("system",),
    "tools": ("tools",),
    "chosen": ("chosen", "chosen_messages"),
    "rejected": ("rejected", "rejected_messages"),
    "kto_tag": ("kto_tag", "label"),
    "text": ("text",),
    "answers": ("responses", "answers", "completions"),
    "score": ("score",),
    "scores": ("scores",),
    "ranks": ("rank", "ranks"),
    "margin": ("margin",),
}

#: Names that suggest a role without being taken for it: material for "did you mean".
_HINTS: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "context", "user", "task", "problem"),
    "response": ("answer", "target", "reply", "solution", "assistant", "response", "label"),
    "messages": ("dialog", "dialogue", "chat", "turns", "conversation", "messages"),
    "chosen": ("good", "better", "best", "preferred", "win", "winner", "accepted", "positive"),
    "rejected": ("bad", "worse", "worst", "dispreferred", "lose", "loser", "negative"),
    "text": ("content", "document", "body", "passage", "article"),
    "kto_tag": ("desirable", "feedback", "thumbs", "good", "is_good", "rating"),
}

#: kind wanted → kinds of rows that can give it.
_SERVES: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("chat",),
    "pair": ("pair", "ranking"),
    "ranking": ("ranking", "pair"),
    "answers": ("ranking", "pair", "feedback", "chat"),
    "feedback": ("feedback",),
    "prompt": ("prompt", "chat", "pair", "ranking", "feedback"),
}
_NEEDED: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("prompt", "response"),
    "pair": ("chosen", "rejected"),
    "ranking": ("chosen", "rejected"),
    "answers": ("prompt", "response"),
    "feedback": ("prompt", "response", "kto_tag"),
    "prompt": ("prompt",),
}
#: What rows of a kind are, in words.
NOUNS: dict[str, str] = {
    "text": "plain text (pre-training)",
    "chat": "prompts with one answer (SFT)",
    "pair": "preference pairs",
    "ranking": "ranked answers",
    "answers": "prompts with answers",
    "feedback": "single answers with a label (KTO)",
    "prompt": "prompts without answers",
}
_STAGES = {
    "text": "stage: pt",
    "chat": "stage: sft (or ppo, which uses the prompts)",
    "pair": "stage: dpo or rm",
    "ranking": "stage: rm or dpo",
    "feedback": "stage: kto",
    "prompt": "stage: ppo",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """A dataset's columns by role, and how to read them.

    `gives` is the kind of rows, one of those that serve `want`. `conversational`: the prompt is in
    `columns["messages"]` rather than in prompt / query / history. `transcript`: chosen and rejected
    are whole dialogues in one text. `plain`: texts are not chat turns.
    """

    want: Kind
    gives: str
    columns: Mapping[str, str]
    tags: Tags
    conversational: bool = False
    transcript: bool = False
    plain: bool = False


def choose_layout(spec: DatasetSpec, rows: Sequence[Mapping[str, Any]], want: Kind) -> Layout:
    """How to read `rows` as examples of kind `want`. Raises DataError (D5, D21)."""
    found = _columns_of(rows)
    columns = _assign(spec, found)
    sample = _Sample(rows[:200], columns)
    conversational = _is_conversational(spec, columns, want)
    offers = _offers(columns, sample, conversational)
    if spec.formatting in ("sharegpt", "openai") and not conversational:
        offers &= {"pair", "ranking"}  # their conversations may be in chosen and rejected
    gives = next((kind for kind in _SERVES[want] if kind in offers), None)
    declared = spec.kind or ("pair" if spec.ranking else None)
    if declared and not _compatible(declared, want):
        raise DataError([_wrong_kind(spec, want, declared)])
    if gives is None:
        other = next((k for k in ("pair", "ranking", "feedback", "chat", "text") if k in offers), None)
        if other and not declared and not _mentions(spec, want):
            raise DataError([_wrong_kind(spec, want, other)])
        raise DataError([_missing_columns(spec, found, columns, want)])
    _say_what_was_guessed(spec, columns, conversational)
    return Layout(
        want=want,
        gives=gives,
        columns=columns,
        tags=Tags.from_registry(spec.tags),
        conversational=conversational,
        transcript=gives == "pair" and is_transcript(sample.first("chosen")),
        plain=spec.formatting == "trl" and not conversational and not sample.has_turns(),
    )


def kind_of(spec: DatasetSpec, rows: Sequence[Mapping[str, Any]]) -> Kind:
    """The kind of example that rows hold, for verbs that want none in particular. Raises DataError."""
    for want in ("pair", "ranking", "feedback", "chat", "text"):
        try:
            layout = choose_layout(spec, rows, want)
        except DataError:
            continue
        asks = layout.gives == "chat" and layout.conversational and _only_asks(layout, rows)
        return "prompt" if asks else cast(Kind, layout.gives)
    choose_layout(spec, rows, "prompt")
    return "prompt"


def _only_asks(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no conversation ends with an answer."""
    talks = [row.get(layout.columns["messages"]) for row in rows[:200]]
    ends = [talk[-1] for talk in talks if isinstance(talk, list) and talk and isinstance(talk[-1], dict)]
    tags = layout.tags
    names = [end.get(tags.role or ("from" if "from" in end else "role")) for end in ends]
    return bool(names) and all(tags.roles.get(name) == "user" for name in names if isinstance(name, str))


# ---- columns -------------------------------------------------------------------------------------


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    # A dict keeps the order of first appearance; rows of a JSON file need not have the same keys.
    found: dict[str, None] = {}
    for row in rows:
        if row.keys() - found.keys():
            found.update(dict.fromkeys(row))
    return list(found)


def _assign(spec: DatasetSpec, found: Sequence[str]) -> dict[str, str]:
    """role → column that is there: as registered, else by its usual name unless that column is
    taken.
    """
    columns = {role: name for role, name in spec.columns.items() if name and name in found}
    taken = set(columns.values())
    for role, names in USUAL_NAMES.items():
        # A registered name that is not there is not replaced by a guess, unless it is a mere
        # default.
        if role in spec.columns and spec.columns[role] not in names:
            continue
        usual = next((name for name in names if name in found and name not in taken), None)
        if role not in columns and usual and (role not in spec.columns or spec.columns[role]):
            columns[role] = usual
            taken.add(usual)
    if "text" not in columns and "prompt" in spec.columns and "response" not in columns:
        # LLaMA-Factory registers documents as {"prompt": "text"}.
        columns |= {"text": columns["prompt"]} if "prompt" in columns else {}
    return columns


@dataclass(frozen=True, slots=True)
class _Sample:
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]

    def first(self, role: str) -> Any:
        """The first value of a role that is not empty."""
        column = self.columns.get(role)
        return next((row[column] for row in self.rows if row.get(column)), None) if column else None

    def has_turns(self) -> bool:
        """Whether prompts or answers are lists of turns, as in TRL's conversational sets."""
        return any(isinstance(self.first(role), list) for role in ("prompt", "chosen", "response"))


def _is_conversational(spec: DatasetSpec, columns: Mapping[str, str], want: Kind) -> bool:
    if "messages" not in columns:
        return False
    if spec.formatting in ("sharegpt", "openai") or spec.columns.get("messages"):
        return True
    if spec.formatting == "alpaca":
        return False
    if "prompt" not in columns:
        return True
    return want in ("chat", "feedback", "answers") and "response" not in columns


def _offers(columns: Mapping[str, str], sample: _Sample, conversational: bool) -> set[str]:
    """Every kind of row that these columns can be read as."""
    offers: set[str] = set()
    response = sample.first("response")
    prompt = conversational or "prompt" in columns or "query" in columns
    if "text" in columns:
        offers.add("text")
    if {"chosen", "rejected"} <= columns.keys():
        offers.add("pair")
    if prompt and (_is_answer_list(response) or "answers" in columns):
        offers.add("ranking")
    elif conversational:
        if _ends_with_answer(sample.first("messages"), "pair" in offers):
            offers.add("chat")
    elif prompt and "response" in columns:
        offers.add("chat")
    if "chat" in offers and "kto_tag" in columns:
        offers.add("feedback")
    if prompt and "text" not in columns:
        offers.add("prompt")
    return offers


def _is_answer_list(value: Any) -> bool:
    """Whether a response is several answers rather than the turns of one."""
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    return isinstance(first, str) or (isinstance(first, dict) and not {"role", "from"} & first.keys())


def _ends_with_answer(messages: Any, beside_pairs: bool) -> bool:
    # A conversation beside chosen and rejected is their prompt, unless it ends with an answer
    # itself.
    if not beside_pairs or not isinstance(messages, list) or not messages:
        return not beside_pairs
    last = messages[-1]
    return isinstance(last, dict) and (last.get("role") or last.get("from")) in ("assistant", "gpt")


def _compatible(declared: str, want: Kind) -> bool:
    return declared in _SERVES[want] or (want == "prompt" and declared != "text")


def _mentions(spec: DatasetSpec, want: Kind) -> bool:
    """Whether the registry names a column that only this kind needs."""
    own = {
        "pair": {"chosen", "rejected"},
        "ranking": {"chosen", "rejected"},
        "feedback": {"kto_tag"},
    }
    return any(spec.columns.get(role) for role in own.get(want, ()))


# ---- what to say ---------------------------------------------------------------------------------


def _say_what_was_guessed(spec: DatasetSpec, columns: Mapping[str, str], conversational: bool) -> None:
    names = ", ".join(dict.fromkeys(columns.values()))
    if conversational and spec.formatting == "auto" and not spec.columns.get("messages"):
        log.info("dataset %s: no `formatting` given; %s look like sharegpt", spec.name, names)
    if "query" in columns and spec.columns and "query" not in spec.columns:
        log.info(
            'dataset %s: column `%s` is joined to the prompt; write "query": null to leave it out',
            spec.name,
            columns["query"],
        )


def _wrong_kind(spec: DatasetSpec, want: Kind, have: str) -> Problem:
    fix = f"use it with {_STAGES[have]}, or choose a dataset of {NOUNS[want]}"
    if want == "feedback" and have in ("pair", "ranking"):
        fix += "; or make two labelled answers of each pair: `trueup data unpair`"
    if want == "text":
        fix += '; to train on one column as text, register `columns: {"text": …}`'
    return Problem(
        f"dataset {spec.name!r} holds {NOUNS[have]}, but this stage learns from {NOUNS[want]}",
        where=spec.origin,
        fix=fix,
    )


def _missing_columns(spec: DatasetSpec, found: Sequence[str], columns: Mapping[str, str], want: Kind) -> Problem:
    needed = _NEEDED[want]
    if spec.formatting in ("sharegpt", "openai") and want in ("chat", "prompt", "feedback", "answers"):
        needed = ("messages", *(role for role in needed if role not in ("prompt", "response")))
    have_prompt = "messages" in columns or "query" in columns
    missing = [r for r in needed if r not in columns and not (r == "prompt" and have_prompt)]
    if "messages" in columns and spec.formatting == "alpaca":
        return Problem(
            f"dataset {spec.name!r}: `formatting` is alpaca, but column `{columns['messages']}` holds turns",
            where=spec.origin,
            fix='write `"formatting": "sharegpt"` (or leave it out)',
        )
    if not missing:
        return Problem(
            f"dataset {spec.name!r}: its columns ({', '.join(found)}) do not hold {NOUNS[want]}",
            where=spec.origin,
            fix=f"say which column is which: `columns: {{…}}` {_place_of_columns(spec)}",
        )
    names = [spec.columns.get(role) or (role if role in found else USUAL_NAMES[role][0]) for role in missing]
    guesses = suggest_columns(missing, [name for name in found if name not in columns.values()])
    if guesses:
        pairs = ", ".join(f"{role}: {name}" for role, name in guesses.items())
        fix = f"did you mean `columns: {{{pairs}}}`? It belongs {_place_of_columns(spec)}"
    else:
        pairs = ", ".join(f"{role}: …" for role in missing)
        fix = f"say which column is which: `columns: {{{pairs}}}` {_place_of_columns(spec)}"
    listed = " and ".join(f"`{name}`" for name in names)
    return Problem(
        f"dataset {spec.name!r}: no column {listed}; found: {', '.join(found) or 'none'}",
        where=spec.origin,
        expected=f"{NOUNS[want]}",
        fix=fix,
    )


def _place_of_columns(spec: DatasetSpec) -> str:
    """Where a user writes `columns`: in the dataset's entry, which a file or hub id given directly has not yet."""
    if spec.registered:
        return f"into its entry, {spec.origin}"
    source = f'"hf_hub_url": "{spec.hub_id}"' if spec.hub_id else f'"file_name": "{spec.source or spec.url}"'
    return f'into an entry of dataset_info.json: "{spec.name}": {{{source}, "columns": {{…}}}}'


def suggest_columns(missing: Sequence[str], free: Sequence[str]) -> dict[str, str]:
    """role → the free column it most likely is: by an equal or contained word, then by spelling."""
    guesses: dict[str, str] = {}
    for role in missing:
        words = (role, *USUAL_NAMES.get(role, ()), *_HINTS.get(role, ()))
        left = [name for name in free if name not in guesses.values()]
        parts = {name: set(name.lower().replace("-", "_").split("_")) for name in left}
        exact = next((n for w in words for n in left if n.lower() == w), None)
        part = next((n for w in words for n in left if w in parts[n]), None)
        near = difflib.get_close_matches(role, left, n=1, cutoff=0.7)
        guess = exact or part or (near[0] if near else None)
        if guess:
            guesses[role] = guess
    return guesses
