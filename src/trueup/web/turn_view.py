"""A turn of a conversation on the page: the question, answers side by side, what each is worth, token by token.

What a model wrote is a label's text: it is shown, and never read as HTML or Markdown. Code between fences stands in a
box of its own; what a model thought is folded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui

from trueup.inference.thoughts import OPEN, split
from trueup.web.frame import button, copy_block
from trueup.web.talks import Answer, Turn, segments
from trueup.web.view import View

_STEPS = (0.1, 0.4, 1.0, 2.0, 4.0)  # nats a token, from faint to strong
_MOST_CHIPS = 1200
_LETTERS = "ABCDEFGH"


@dataclass
class Worth:
    """What an answer is worth: the reward, and tokens as (text, log π, log π_ref)."""

    reward: float
    tokens: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass
class Acts:
    """What can be done with the newest turn. None: not with this one."""

    prefer: Callable[[int | str], Any] | None = None
    again: Callable[[], Any] | None = None
    tokens: Callable[[], Any] | None = None


class AnswerView:
    """One answer, which may still be coming."""

    def __init__(self, view: View, answer: Answer, title: str, colour: int) -> None:
        self.view, self.answer = view, answer
        with ui.element("article").classes("answer") as self.box:
            self.box.props["aria-label"] = title
            with ui.element("header").classes("answer-head"):
                ui.element("span").classes(f"answer-dot answer-dot-{colour % 8 + 1}")
                ui.label(title).classes("answer-name")
                self.note = ui.label("").classes("muted small number")
            self.body = ui.element("div").classes("answer-body")
            self.foot = ui.element("div").classes("toolbar answer-foot")
        self._shown: list[tuple[str, str]] = []
        self._labels: list[ui.label] = []
        self.refresh()

    def refresh(self) -> None:
        """The text as far as it has come: labels that are there are changed, others made."""
        thought, said = split(self.answer.text) if OPEN in self.answer.text[:64] else ("", self.answer.text)
        parts = ([("thought", thought)] if thought else []) + segments(said)
        if [kind for kind, _ in parts] != [kind for kind, _ in self._shown]:
            self.body.clear()
            with self.body:
                self._labels = [self._part(kind, text) for kind, text in parts]
        else:
            for label, (_, text), (_, before) in zip(self._labels, parts, self._shown, strict=True):
                if text != before:
                    label.set_text(text)
        self._shown = parts
        self.note.set_text(self._about())
        self._end()

    def _part(self, kind: str, text: str) -> ui.label:
        if kind == "code":
            box = copy_block(self.view, text)
            return next(one for one in box.descendants() if isinstance(one, ui.label))
        if kind == "thought":
            with ui.expansion(self.view.t("chat.thought")).props("dense").classes("answer-thought"):
                return ui.label(text).classes("answer-text muted")
        return ui.label(text).classes("answer-text")

    def _about(self) -> str:
        """How long it is, how fast it came, how it ended."""
        t, answer = self.view.t, self.answer
        if not answer.finish:
            return t("chat.coming")
        parts = []
        if answer.tokens:
            parts.append(t("chat.tokens", count=answer.tokens))
            parts += [f"{answer.tokens / answer.seconds:.0f}/s"] if answer.seconds > 0 else []
        if answer.finish in ("length", "aborted"):
            parts.append(t(f"chat.finish_{answer.finish}"))
        return " · ".join(parts)

    def _end(self) -> None:
        if self.answer.finish == "failed" and not self.foot.default_slot.children:
            with self.foot, ui.element("div").classes("problem").props("role=alert"):
                ui.label(self.view.said_lines(self.answer.reason))
        if self.answer.finish == "stop" and not self.answer.text and not self._labels:
            with self.body:
                self._labels = []
                ui.label(self.view.t("chat.nothing")).classes("muted")


class TurnView:
    """A question and its answers. `draw` again whenever something else is to be shown."""

    def __init__(self, view: View, turn: Turn, colours: Callable[[str], int]) -> None:
        self.view, self.turn, self.colours = view, turn, colours
        self.heat = False
        self.worth: dict[int, Worth] = {}
        self.answers: list[AnswerView] = []
        self.box = ui.element("section").classes("exchange")

    def draw(self, acts: Acts | None = None, legend: str = "") -> None:
        """Everything of this turn, as it stands."""
        turn, acts = self.turn, acts or Acts()
        self.box.clear()
        hidden = turn.blind and turn.chosen is None and len(turn.answers) > 1
        with self.box:
            with ui.element("div").classes("question"):
                ui.label(turn.question).classes("answer-text")
            with ui.element("div").classes("answers"):
                made: dict[int, AnswerView] = {}
                for place, number in enumerate(_order(turn)):
                    made[number] = self._answer(number, place, hidden, acts)
                self.answers = [made[number] for number in range(len(turn.answers))]
            if self.heat and self.worth:
                self._legend(legend)
            self._below(acts, hidden)

    def _answer(self, number: int, place: int, hidden: bool, acts: Acts) -> AnswerView:
        answer = self.turn.answers[number]
        title = self.view.t("chat.answer", letter=_LETTERS[place % len(_LETTERS)]) if hidden else answer.name
        shown = AnswerView(self.view, answer, title, place if hidden else self.colours(answer.voice))
        if self.turn.chosen == number:
            shown.box.classes("answer-chosen")
        if number in self.worth and not hidden:
            self._worth(shown, self.worth[number])
        with shown.foot:
            if acts.prefer and answer.counts:
                word = self.view.t("chat.better")
                better = button(word, lambda: acts.prefer and acts.prefer(number), icon="thumb_up")
                better.props["aria-label"] = f"{word}: {title}"
            if self.turn.chosen == number:
                with ui.element("span").classes("badge badge-finished"):
                    ui.icon("thumb_up").props("aria-hidden=true")
                    ui.label(self.view.t("chat.chosen"))
        return shown

    def _worth(self, shown: AnswerView, worth: Worth) -> None:
        with shown.foot, ui.element("span").classes("reward"):
            ui.label(self.view.t("chat.reward")).classes("muted small")
            ui.label(f"{worth.reward:+.3f}".replace("-", "−")).classes("number reward-value")
        if self.heat and worth.tokens:
            shown.body.clear()
            with shown.body, ui.element("div").classes("heat"):
                for text, own, reference in worth.tokens[:_MOST_CHIPS]:
                    chip = ui.label(text).classes(f"heat-token {heat_class(own - reference)}")
                    chip.props["title"] = f"{text!r}  {own:.2f} − ({reference:.2f}) = {own - reference:+.2f}"
                if len(worth.tokens) > _MOST_CHIPS:
                    ui.label("…").classes("muted")

    def _legend(self, legend: str) -> None:
        with ui.element("div").classes("heat-legend"):
            ui.label(self.view.t("chat.less_likely")).classes("small muted")
            for step in (-4.1, -2.1, -1.1, -0.5, -0.2, 0, 0.2, 0.5, 1.1, 2.1, 4.1):
                ui.element("span").classes(f"heat-swatch {heat_class(step)}")
            ui.label(self.view.t("chat.more_likely")).classes("small muted")
            ui.label(legend).classes("small muted")

    def _below(self, acts: Acts, hidden: bool) -> None:
        t = self.view.t
        with ui.element("div").classes("toolbar exchange-foot"):
            if acts.prefer and sum(answer.counts for answer in self.turn.answers) > 1:
                button(t("chat.tie"), lambda: acts.prefer and acts.prefer("tie"), icon="drag_handle", kind="quiet")
            if self.turn.chosen == "tie":
                ui.label(t("chat.tied")).classes("muted small")
            if acts.again:
                button(t("chat.again"), acts.again, icon="refresh", kind="quiet")
            if acts.tokens and not hidden:
                word = t("chat.text" if self.heat else "chat.by_token")
                button(word, acts.tokens, icon="notes" if self.heat else "gradient", kind="quiet")
            seeds = {answer.seed for answer in self.turn.answers if answer.seed is not None}
            if seeds:
                ui.label(t("chat.seed_was", seed=", ".join(map(str, sorted(seeds))))).classes("muted small number")


def _order(turn: Turn) -> Sequence[int]:
    """Of the answers on the page; new ones follow."""
    count = len(turn.answers)
    first = [number for number in turn.order if number < count]
    return [*first, *(number for number in range(count) if number not in first)]


def heat_class(difference: float) -> str:
    """The class of a token that is so many nats likelier than by the reference."""
    step = sum(abs(difference) >= edge for edge in _STEPS)
    return f"heat-{'m' if difference < 0 else 'p'}{step}" if step else "heat-0"


def whole_letters(tokens: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Tokens as texts with their log-probabilities; those that make up one letter are taken together."""
    found: list[tuple[str, float, float]] = []
    held, own, reference = b"", 0.0, 0.0
    for token in tokens:
        if not token["trained"]:
            continue
        held += bytes(token["bytes"])
        own, reference = own + token["logprob"], reference + token["reference_logprob"]
        try:
            text = held.decode()
        except UnicodeDecodeError:
            continue
        found.append((text, own, reference))
        held, own, reference = b"", 0.0, 0.0
    return found + ([(held.decode("utf-8", "replace"), own, reference)] if held else [])
