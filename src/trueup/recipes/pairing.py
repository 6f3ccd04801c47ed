"""From ranked answers to rows of a dataset: which two become a pair, which do not, and why. Pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trueup.config.sections.build import BuildSection
from trueup.recipes.candidates import Candidate, Question

Row = dict[str, Any]

#: format → what an entry of dataset_info.json says of its rows.
ENTRIES: dict[str, dict[str, Any]] = {
    "pairs": {
        "type": "dpo", "ranking": True,
        "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    },
    "rankings": {
        "type": "rm", "ranking": True, "columns": {"prompt": "prompt", "answers": "answers", "scores": "scores"},
    },
    "feedback": {
        "type": "kto", "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    },
}  # fmt: skip
ENTRIES["all_pairs"] = ENTRIES["pairs"]


@dataclass(frozen=True)
class Scored:
    """An answer and what it is worth."""

    answer: Candidate
    score: float


@dataclass(frozen=True)
class Chosen:
    """The rows a prompt gives, or why it gives none."""

    rows: list[Row]
    reason: str | None = None


def differing(answers: Sequence[Candidate]) -> list[Candidate]:
    """Answers that are not empty, each text once: the first that gave it stands."""
    return list({answer.text: answer for answer in reversed(answers) if answer.text}.values())[::-1]


def choose(question: Question, ranked: Sequence[Scored], build: BuildSection, ranker: Mapping[str, Any]) -> Chosen:
    """The rows that a prompt with at least two scored answers gives, as `build_format` and the filters say."""
    ordered = sorted(ranked, key=lambda scored: -scored.score)  # stable: equals stay in the order of their sources
    best, worst = ordered[0], ordered[-1]
    reason = why_not(best, worst, build)
    if build.build_format == "all_pairs":
        couples = [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :] if why_not(a, b, build) is None]
        return Chosen([_pair(question, a, b, ranker) for a, b in couples], None if couples else reason)
    if reason:
        return Chosen([], reason)
    if build.build_format == "rankings":
        return Chosen([_ranking(question, ordered, ranker)])
    if build.build_format == "feedback":
        return Chosen([_feedback(question, s, label, ranker) for s, label in ((best, True), (worst, False))])
    return Chosen([_pair(question, best, worst, ranker)])


def why_not(better: Scored, worse: Scored, build: BuildSection) -> str | None:
    """Why two answers are no pair; None if they are."""
    margin = better.score - worse.score
    if margin <= 0:
        return "tie"
    if margin < build.min_margin:
        return "margin"
    lengths = sorted((len(better.answer.text), len(worse.answer.text)))
    if build.max_length_ratio is not None and lengths[1] > build.max_length_ratio * lengths[0]:
        return "length ratio"
    if build.max_similarity is not None and alike(better.answer.text, worse.answer.text, build.max_similarity):
        return "too alike"
    return None


def alike(one: str, other: str, most: float) -> bool:
    """Whether two texts are more alike than `most`: twice the characters they share over all (difflib's ratio)."""
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    bounds: tuple[Callable[[], float], ...] = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() > most for bound in bounds)  # the cheap bounds first


def _pair(question: Question, better: Scored, worse: Scored, ranker: Mapping[str, Any]) -> Row:
    sides = {"chosen": better, "rejected": worse}
    return {
        **_asked(question),
        **{side: _said(scored) for side, scored in sides.items()},
        **{f"score_{side}": scored.score for side, scored in sides.items()},
        **{f"chars_{side}": len(scored.answer.text) for side, scored in sides.items()},
        **{f"tokens_{side}": scored.answer.tokens for side, scored in sides.items()},
        "provenance": _provenance(question, ranker, **{side: s.answer.source for side, s in sides.items()}),
    }


def _ranking(question: Question, ordered: Sequence[Scored], ranker: Mapping[str, Any]) -> Row:
    return {
        **_asked(question),
        "answers": [_said(scored) for scored in ordered],
        "scores": [scored.score for scored in ordered],
        "chars": [len(scored.answer.text) for scored in ordered],
        "tokens": [scored.answer.tokens for scored in ordered],
        "provenance": _provenance(question, ranker, answers=[scored.answer.source for scored in ordered]),
    }


def _feedback(question: Question, scored: Scored, label: bool, ranker: Mapping[str, Any]) -> Row:
    return {
        **_asked(question),
        "completion": _said(scored),
        "label": label,
        "score": scored.score,
        "chars": len(scored.answer.text),
        "tokens": scored.answer.tokens,
        "provenance": _provenance(question, ranker, answer=scored.answer.source),
    }


def _asked(question: Question) -> Row:
    return {"prompt": question.to_dicts(), **({"tools": list(question.tools)} if question.tools else {})}


def _said(scored: Scored) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": scored.answer.text}]


def _provenance(question: Question, ranker: Mapping[str, Any], **sources: Any) -> Row:
    return {"row": question.row, **sources, "ranked_by": dict(ranker)}


def lengths_of(rows: Sequence[Row]) -> dict[str, float]:
    """Mean characters of both sides of pairs, or of good and bad answers: one side much longer teaches length."""
    sides: dict[str, list[int]] = {}
    for name, count in _counted(rows):
        sides.setdefault(name, []).append(count)
    return {name: sum(counts) / len(counts) for name, counts in sides.items()}


def _counted(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    for row in rows:
        if "chars_chosen" in row:
            yield "chosen", row["chars_chosen"]
            yield "rejected", row["chars_rejected"]
        elif "label" in row:
            yield ("chosen" if row["label"] else "rejected"), row["chars"]
        else:
            yield "chosen", row["chars"][0]
            yield "rejected", row["chars"][-1]
