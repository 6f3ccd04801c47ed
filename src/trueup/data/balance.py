"""What a preference set may teach by accident: length, or one label. Counted here, and put into words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

_LONGER = 1.5  # mean lengths of the two sides differ by this much: a model may learn length instead
_MOSTLY = 0.75  # or one side is the longer one in this share of the pairs
_BALANCED = (1.0, 4 / 3)  # wanted to unwanted, as KTO's paper recommends (arXiv 2402.01306, §4.1)


@dataclass(slots=True)
class Sides:
    """Lengths of the two sides of pairs against each other, in whatever unit they are counted."""

    pairs: int = 0
    chosen_longer: int = 0
    equally_long: int = 0
    chosen: int = 0  # length of all chosen answers
    rejected: int = 0

    def add(self, chosen: int, rejected: int) -> None:
        """One more pair."""
        self.pairs += 1
        self.chosen_longer += chosen > rejected
        self.equally_long += chosen == rejected
        self.chosen += chosen
        self.rejected += rejected

    def include(self, other: Sides) -> None:
        """The pairs of another count."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def mean_ratio(self) -> float:
        """How many times as long chosen answers are on average."""
        return self.chosen / max(self.rejected, 1)

    def share(self, count: int) -> float:
        return count / max(self.pairs, 1)

    def to_dict(self) -> dict[str, float]:
        """The imbalance: shares of the pairs, and the ratio of the means."""
        return {
            "pairs": self.pairs,
            "chosen_longer": self.share(self.chosen_longer),
            "equally_long": self.share(self.equally_long),
            "mean_ratio": self.mean_ratio,
        }

    def in_words(self) -> str:
        return (
            f"chosen is longer in {self.share(self.chosen_longer):.0%} of the pairs (equal in "
            f"{self.share(self.equally_long):.0%}), {self.mean_ratio:.2f} times as long on average"
        )

    def findings(self) -> Iterator[str]:
        """What a user should know of it before training, if there is anything."""
        if not self.pairs:
            return
        remedy = "a model may learn length alone; a length-normalised loss (stage: simpo) or a filter on lengths helps"
        ratio = self.mean_ratio
        if not 1 / _LONGER <= ratio <= _LONGER:
            longer, times = ("chosen", ratio) if ratio > 1 else ("rejected", 1 / max(ratio, 1e-9))
            share = f"chosen is the longer one in {self.share(self.chosen_longer):.0%} of the pairs"
            yield f"{longer} answers are {times:.1f} times as long on average ({share}): {remedy}"
            return
        rejected_longer = self.pairs - self.chosen_longer - self.equally_long
        for side, count in (("chosen", self.chosen_longer), ("rejected", rejected_longer)):
            if self.share(count) >= _MOSTLY and self.pairs > 1:
                mean = f"chosen {ratio:.2f} times as long on average"
                yield f"the {side} answer is the longer one in {self.share(count):.0%} of the pairs ({mean}): {remedy}"


def label_findings(labels: Mapping[str, int]) -> Iterator[str]:
    """What to do about the balance of "desirable" and "undesirable" answers, if there is anything to do."""
    wanted, unwanted = labels.get("desirable", 0), labels.get("undesirable", 0)
    if not wanted or not unwanted:
        yield f"all answers are {'desirable' if wanted else 'undesirable'}: KTO needs both labels"
        return
    low, high = (bound * unwanted / wanted for bound in _BALANCED)
    if not low - 0.01 <= 1 <= high + 0.01:
        counts = f"{wanted:,} desirable to {unwanted:,} undesirable answers".replace(",", " ")
        yield (
            f"{counts}: for KTO set kto_chosen_weight between {low:.2f} and {high:.2f}, "
            f"or kto_rejected_weight between {1 / high:.2f} and {1 / low:.2f}"
        )
