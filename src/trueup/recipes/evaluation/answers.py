"""Models answer the prompts of the data, and their answers are looked at, scored, and matched against each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trueup.data.examples import Chat, Example, Feedback, Messages, Pair, Prompt, Ranking, Text
from trueup.errors import ConfigError
from trueup.models.policy import Policy
from trueup.recipes.candidates import Candidate, EndpointSource, LocalSource, Losses, Question
from trueup.recipes.evaluation.fluency import distinct, refuses, repetition
from trueup.recipes.evaluation.intervals import Bootstrap, Estimate
from trueup.recipes.evaluation.likelihood import wins
from trueup.recipes.evaluation.subjects import Subject
from trueup.recipes.journal import Journal
from trueup.recipes.rankers import Contest, Ranked, Ranker, ScoreRanker
from trueup.rollout.similarity import NAMES, Similarity, require

log = logging.getLogger("trueup")

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """A prompt of the data, with the data's own (better) answer where it has one."""

    question: Question
    label: str | None


def prompts_of(examples: Sequence[Example], most: int, system: str | None) -> list[Asked]:
    """At most so many prompts, evenly spread over the rows; raw texts have none."""
    found = [asked for example in examples if (asked := _asked(example, system)) is not None]
    if len(found) > most:
        log.info("%s of %s prompts are answered; eval_prompts: %d asks for all", f"{most:,}", f"{len(found):,}",
                 len(found))  # fmt: skip
        found = [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]
    return found


def _asked(example: Example, system: str | None) -> Asked | None:
    match example:
        case Text():
            return None
        case _ if example.plain:
            return None
        case Chat(messages=messages):
            return _with(example, messages[:-1], messages[-1:], system)
        case Pair(prompt=prompt, chosen=chosen):
            return _with(example, prompt, chosen, system)
        case Ranking(prompt=prompt, answers=answers):
            return _with(example, prompt, answers[0], system)
        case Feedback(prompt=prompt, answer=answer, desirable=desirable):
            return _with(example, prompt, answer if desirable else (), system)
        case Prompt(messages=messages):
            return _with(example, messages, (), system)


def _with(example: Any, prompt: Messages, answer: Messages, system: str | None) -> Asked | None:
    if not prompt:
        return None
    question = Question.of(Prompt(prompt, example.row, example.tools), system)
    return Asked(question, answer[0].content if answer else None)


def answers_of(
    subject: Subject, asked: Sequence[Asked], journal: Journal, policy: Policy | None
) -> list[Candidate | None]:
    """A model's answer to each prompt, drawn or out of the journal; None where there is none, which is said."""
    cfg = subject.cfg.replace(num_generations=1)
    if subject.is_endpoint:
        source: Any = EndpointSource(cfg, str(cfg.model.model_name_or_path), journal)
    else:
        source = LocalSource(cfg, journal, policy)
    questions = {a.question.key: a.question for a in asked}
    lost = Losses.none()
    source.draw(list(questions.values()), lost)
    reasons = lost.dropped | lost.waiting
    if reasons:
        first, why = next(iter(reasons.items()))
        log.warning("%s gave no answer to %d prompts (row %s: %s)", subject.name, len(reasons), questions[first].row,
                    why)  # fmt: skip
    found = {key: next(iter(source.candidates(question)), None) for key, question in questions.items()}
    return [None if a.question.key in reasons else found[a.question.key] for a in asked]


def look_at(
    boot: Bootstrap, asked: Sequence[Asked], answers: Sequence[Candidate | None], compare: bool
) -> tuple[dict[str, Estimate], Rows]:
    """What answers are like, and with `compare` how like the data's own they are."""
    present = [answer for answer in answers if answer is not None]
    texts = [answer.text for answer in present]
    lengths = [answer.tokens or len(answer.text) for answer in present]
    rows: Rows = {
        "answers/tokens": np.array(lengths, dtype=float),
        "answers/cut_off": np.array([not answer.ended for answer in present], dtype=float),
        "answers/repetition": np.array([repetition(text) for text in texts], dtype=float),
        "answers/refusals": np.array([refuses(text) for text in texts], dtype=float),
    }
    if compare:
        rows |= _likeness(asked, answers)
    shares = ("answers/cut_off", "answers/refusals")
    found = {name: (boot.share if name in shares else boot.mean)(values) for name, values in rows.items()}
    for n in (1, 2):
        found[f"answers/distinct_{n}"] = Estimate(distinct(texts, n), None, None, len(texts))
    whole = len(present) == len(answers)
    return found, rows if whole else {}  # rows of some prompts cannot be laid beside those of others


def _likeness(asked: Sequence[Asked], answers: Sequence[Candidate | None]) -> Rows:
    both = [(b.text, a.label) for a, b in zip(asked, answers, strict=True) if b is not None and a.label is not None]
    if not both:
        return {}
    try:
        require("eval_measures: answers", (label for _, label in both))
    except ConfigError as error:
        log.warning("%s; %s", error.problems[0].what, error.problems[0].fix)
        return {}
    similarity = Similarity()
    found = [similarity(text, label) for text, label in both]
    return {f"answers/{name}": np.array([values[name] for values in found]) for name in NAMES}


# --- who says what they are worth ---------------------------------------------------------------------


def scores_of(
    boot: Bootstrap, ranker: ScoreRanker, asked: Sequence[Asked], answers: Sequence[Candidate | None]
) -> tuple[dict[str, Estimate], Rows]:
    """The mean score of one model's answers, in all and by each reward that gave one."""
    contests = [Contest(a.question, (b,)) for a, b in zip(asked, answers, strict=True) if b is not None]
    ranker.find_out(contests)
    totals = [ranker.ranked(contest).scores[0] for contest in contests]
    found = {"score": boot.mean(np.array([s for s in totals if s is not None], dtype=float))}
    each = [ranker.each(contest)[0] for contest in contests]
    for name in dict.fromkeys(name for parts in each for name in parts):
        values = np.array([parts[name] for parts in each if name in parts])
        bounded = bool(np.all((values == 0) | (values == 1)))
        found[f"score/{name}"] = (boot.share if bounded else boot.mean)(values)
    complete = len(contests) == len(answers) and None not in totals
    return found, {"score": np.array(totals, dtype=float)} if complete else {}


def duel(
    boot: Bootstrap,
    ranker: Ranker,
    asked: Sequence[Asked],
    first: Sequence[Candidate | None],
    other: Sequence[Candidate | None],
) -> dict[str, Any]:
    """How often the other model's answer beats the first's; a tie is half a win, the same text a tie.

    A judge sees each pair in both orders (`recipes/rankers.py`). What it did not decide is counted, and no win.
    """
    matches = [(a.question, x, y) for a, x, y in zip(asked, first, other, strict=True) if x and y]
    contests = {i: Contest(q, (x, y)) for i, (q, x, y) in enumerate(matches) if x.text != y.text}
    ranker.find_out(list(contests.values()))
    won: list[float] = []
    longer: list[float] = []
    reasons: list[str] = []
    for i, (_, x, y) in enumerate(matches):
        found = ranker.ranked(contests[i]) if i in contests else Ranked((0.0, 0.0))
        scores = found.scores
        if len(scores) < 2 or scores[0] is None or scores[1] is None:
            reasons.append(found.why or "no score")
            continue
        won.append(float(wins(np.array([scores[1] - scores[0]]))[0]))
        longer.append(float(len(y.text) - len(x.text)))
    if reasons:
        log.warning("%d of %d matches are not decided (%s); the same command tries them again", len(reasons),
                    len(matches), reasons[0])  # fmt: skip
    hits = np.array(won)
    return {
        "win_rate": boot.share(hits),
        "win_rate_equal_length": boot.length_controlled(hits, np.array(longer)),
        "wins": int((hits == 1).sum()), "ties": int((hits == 0.5).sum()), "losses": int((hits == 0).sum()),
        "undecided": len(reasons) + len(asked) - len(matches),
    }  # fmt: skip
