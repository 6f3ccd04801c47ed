"""How far labels can be relied on: people with themselves, with each other, with the data; which side they prefer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from trueup.web.labels import SKIP, TIE, Label, Project


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many."""

    same: int = 0
    of: int = 0

    @property
    def value(self) -> float | None:
        return self.same / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class Person:
    """What one annotator has done. `left`: how often the answer on the left won, of choices between two."""

    name: str
    done: int
    asked: int
    ties: int
    skips: int
    seconds: float
    left: Share


@dataclass(frozen=True, slots=True)
class Agreement:
    """A project in figures.

    Attributes:
        repeats: questions that a person answered twice, and the same way.
        between: pairs of people on the same question, and of one mind; `alpha` is that beyond chance.
        data: choices on items that came with a better answer, and the same one.
        sources: who answered → how many of their answers won, of those judged.
    """

    labels: int
    ties: int
    skips: int
    people: list[Person] = field(default_factory=list)
    repeats: Share = Share()
    between: Share = Share()
    alpha: float | None = None
    data: Share = Share()
    sources: dict[str, Share] = field(default_factory=dict)


def agreement(project: Project) -> Agreement:
    """All figures of a project."""
    labels = list(project.labels.values())
    judged = [label for label in labels if label.choice != SKIP]
    units: dict[str, dict[str, Hashable]] = defaultdict(dict)  # item → person → first choice
    for label in judged:
        if label.round == 0:
            units[label.item][label.annotator] = label.choice
    opinions = [list(found.values()) for found in units.values()]
    return Agreement(
        labels=len(judged),
        ties=sum(label.choice == TIE for label in judged),
        skips=len(labels) - len(judged),
        people=[_person(project, name) for name in sorted({label.annotator for label in labels})],
        repeats=_share(
            units[label.item][label.annotator] == label.choice
            for label in judged
            if label.round == 1 and label.annotator in units[label.item]
        ),
        between=_share(one == other for found in opinions for i, one in enumerate(found) for other in found[:i]),
        alpha=krippendorff(opinions),
        data=_share(
            project.items[label.item].provenance["chosen"] == label.choice
            for label in judged
            if label.choice != TIE and "chosen" in project.items[label.item].provenance
        ),
        sources=_sources(project, judged),
    )


def krippendorff(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's α for names: 1 − observed / expected disagreement; None where nothing can be compared.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), with δ = 0 for the same and 1 for others. Sides
    of an item have no meaning of their own: which answer is number 0 is a matter of chance.
    """
    kept = [Counter(unit) for unit in units if len(unit) > 1]
    total = sum(counts.total() for counts in kept)
    together = sum(kept, Counter())
    expected = total * total - sum(count * count for count in together.values())
    if not expected:
        return None
    observed = sum(
        (counts.total() ** 2 - sum(count * count for count in counts.values())) / (counts.total() - 1)
        for counts in kept
    )
    return 1 - (total - 1) * observed / expected


def _person(project: Project, name: str) -> Person:
    mine = [label for label in project.labels.values() if label.annotator == name]
    sides = [label for label in mine if isinstance(label.choice, int) and len(label.order) == 2]
    done, asked = project.progress(name)
    return Person(
        name, done, asked,
        ties=sum(label.choice == TIE for label in mine), skips=sum(label.choice == SKIP for label in mine),
        seconds=median(label.seconds for label in mine), left=_share(label.choice == label.order[0] for label in sides),
    )  # fmt: skip


def _sources(project: Project, judged: Iterable[Label]) -> dict[str, Share]:
    """By who answered, where the items tell; ties are half a win each."""
    won: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for label in judged:
        answers = project.items[label.item].provenance.get("answers")
        if not isinstance(answers, list) or label.choice == TIE:
            continue
        for number, answer in enumerate(answers):
            name = str(answer.get("name") or answer.get("model") or "") if isinstance(answer, dict) else str(answer)
            seen[name] += 1
            won[name] += number == label.choice
    return {name: Share(won[name], count) for name, count in seen.most_common() if name}


def _share(found: Iterable[bool]) -> Share:
    values = list(found)
    return Share(sum(values), len(values))
