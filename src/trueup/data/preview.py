"""Rows as the trainer sees them: every token, and whether it is trained, masked or cut off.

The tokens come from the encoder that training uses, with the run's own lengths and policies; a
second encoding without a length limit shows what was cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trueup.data.encoded import Encoded
from trueup.data.encoder import Policy, encode_examples
from trueup.data.examples import Chat, Example, Feedback, Pair, Prompt, Ranking, Text
from trueup.data.page import page
from trueup.data.pieces import Piece, pieces, visible
from trueup.data.report import DataReport
from trueup.data.template_safety import Safety, examine
from trueup.data.templates import ChatTemplate, own_source

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text as RichText

TokenRole = Literal["masked", "trained", "truncated"]
_UNLIMITED = 1 << 30  # tokens
_STYLES: dict[TokenRole, str] = {"masked": "dim", "trained": "green", "truncated": "red strike"}
_MARKS: dict[TokenRole, tuple[str, str]] = {"masked": ("", ""), "trained": ("⟦", "⟧"), "truncated": ("⟪", "⟫")}
_LEGEND: dict[TokenRole, str] = {"trained": "in the loss", "masked": "read, not in the loss", "truncated": "cut off"}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one role."""

    role: TokenRole
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        ids = [token for piece in self.pieces for token in piece.ids]
        return {"role": self.role, "text": "".join(piece.text for piece in self.pieces), "ids": ids}


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt, an answer or a document."""

    name: str
    runs: tuple[Run, ...]

    def count(self, role: TokenRole) -> int:
        return sum(run.tokens for run in self.runs if run.role == role)

    def words(self) -> str:
        """ "chosen: 12 trained, 3 masked, 5 truncated"."""
        counts = [f"{self.count(role)} {role}" for role in _LEGEND if self.count(role)]
        return f"{self.name}: {', '.join(counts) or 'no tokens'}"


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of a dataset: its parts, or why it is left out; `about` says what its data say of the answers."""

    row: str
    kind: str
    parts: tuple[Part, ...]
    about: str = ""
    dropped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        parts = [{"name": part.name, "runs": [run.to_dict() for run in part.runs]} for part in self.parts]
        return {"row": self.row, "kind": self.kind, "about": self.about, "dropped": self.dropped, "parts": parts}


@dataclass(frozen=True, slots=True)
class Preview:
    """Rows of datasets as a run would train on them."""

    rows: list[ShownRow]
    safety: Safety | None  # None where no template acts: documents
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        safety = self.safety.to_dict() if self.safety else None
        return {"settings": self.settings, "template": safety, "rows": [row.to_dict() for row in self.rows]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text as RichText

        coloured = console.color_system is not None and not console.no_color
        for row in self.rows:
            head = f"{row.row}  {row.kind}" + (f", {row.about}" if row.about else "")
            yield RichText(head, style="bold")
            if row.dropped:
                yield RichText(f"left out: {row.dropped}", style="yellow")
            for part in row.parts:
                yield RichText(part.words(), style="cyan")
                yield _painted(part, coloured)
            yield RichText()
        yield _legend(coloured)
        yield RichText(", ".join(f"{key} {value}" for key, value in self.settings.items()), style="dim")
        if self.safety:
            for line, good in self.safety.lines():
                yield RichText(line, style="" if good else "bold yellow")
            for line in self.safety.difference:
                yield RichText("  " + line, style={"+": "green", "-": "red"}.get(line[0], "dim"))

    def page(self) -> str:
        """The same as a page of its own."""
        body = [_html_legend(), *map(_html_row, self.rows)]
        body.append(f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in self.settings.items()))}</p>')
        if self.safety:
            lines = (f'<li class="{"good" if ok else "bad"}">{escape(line)}</li>' for line, ok in self.safety.lines())
            body.append(f"<h2>Chat template</h2><ul>{''.join(lines)}</ul>")
            if self.safety.difference:
                body.append(f"<pre>{escape(chr(10).join(self.safety.difference))}</pre>")
        return page("What the model sees", "\n".join(body))


# ---- from examples to rows -----------------------------------------------------------------------


def preview(
    examples: Sequence[Example], report: DataReport, template: ChatTemplate, policy: Policy, rows: Sequence[str]
) -> Preview:
    """Show `rows`, in this order; `examples` are those of them that could be read, `report` knows of the others."""
    by_row = {example.row: example for example in examples}
    wanted = [by_row[row] for row in rows if row in by_row]
    kept, tally = encode_examples(wanted, template, policy, workers=1)
    whole, _ = encode_examples(wanted, template, replace(policy, cutoff_len=_UNLIMITED), workers=1)
    cut_of, whole_of = _by_row(kept), _by_row(whole)
    reasons = {row: _reason(reason, detail) for row, reason, detail in tally.dropped}
    reasons |= _unread(report)
    shown = [
        _show(by_row.get(row), row, cut_of.get(row, []), whole_of.get(row, []), reasons.get(row), template)
        for row in rows
    ]
    uses_template = any(not isinstance(example, Text) and not example.plain for example in wanted)
    safety = examine(template, own_source(template.tokenizer)) if uses_template else None
    settings = {"template": template.name, "cutoff_len": policy.cutoff_len, "truncation": policy.truncation}
    return Preview(shown, safety, settings)


def _by_row(encoded: Sequence[Encoded]) -> dict[str, list[Encoded]]:
    found: dict[str, list[Encoded]] = defaultdict(list)
    for example in encoded:
        found[example.row].append(example)
    return found


def _unread(report: DataReport) -> dict[str, str]:
    """Rows that reading left out, with the reason."""
    return {
        row: _reason(reason, rows.excerpt)
        for dataset in report.datasets.values()
        for reason, rows in dataset.dropped.items()
        for row in rows.ids
    }


def _reason(reason: str, detail: str) -> str:
    return f"{reason} ({detail})" if detail else reason


def _show(
    example: Example | None,
    row: str,
    kept: list[Encoded],
    whole: list[Encoded],
    dropped: str | None,
    template: ChatTemplate,
) -> ShownRow:
    if example is None:
        return ShownRow(row, "row", (), dropped=dropped or "not among the rows read")
    if isinstance(example, Text) and not dropped:
        whole = kept  # a document is cut into pieces, and nothing of it is lost
    parts: list[Part] = []
    for number, full in enumerate(whole):
        cut = kept[number] if number < len(kept) and not dropped else None
        label = f" {number + 1} of {len(whole)}" if len(whole) > 1 else ""
        parts += _parts(example, full, cut, label, template.tokenizer)
    return ShownRow(row, type(example).__name__.lower(), tuple(parts), _about(example), dropped)


def _about(example: Example) -> str:
    if isinstance(example, Feedback):
        return "desirable" if example.desirable else "undesirable"
    if isinstance(example, Ranking) and example.scores:
        return "scores " + ", ".join(f"{score:g}" for score in example.scores)
    return ""


def _parts(example: Example, full: Encoded, cut: Encoded | None, label: str, tokenizer: Any) -> Iterator[Part]:
    if len(full.prompt):
        role: TokenRole = "masked" if cut else "truncated"
        yield Part(f"prompt{label}", (Run(role, tuple(pieces(tokenizer, full.prompt))),))
    for number, answer in enumerate(full.answers):
        kept = None if cut is None else cut.answers[number]
        mask = answer.mask.copy()
        if not len(full.prompt):
            mask[:1] = False  # nothing stands before a text's first token to predict it from
        roles = np.where(mask, 1, 0)
        roles[_cut(answer.ids, kept.ids) if kept else slice(None)] = 2
        yield Part(_name(example, number) + label, tuple(_runs(tokenizer, answer.ids, roles)))


def _cut(whole: np.ndarray, kept: np.ndarray) -> slice:
    """Which of `whole` is not in `kept`: its end, its beginning, or something between."""
    head = int(np.append(whole[: len(kept)] != kept, True).argmax())
    return slice(head, len(whole) - (len(kept) - head))


def _runs(tokenizer: Any, ids: np.ndarray, roles: np.ndarray) -> Iterator[Run]:
    names: tuple[TokenRole, ...] = ("masked", "trained", "truncated")
    borders = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(ids)]
    for start, stop in zip(borders, borders[1:], strict=False):
        if stop > start:
            yield Run(names[roles[start]], tuple(pieces(tokenizer, ids[start:stop])))


def _name(example: Example, number: int) -> str:
    match example:
        case Text():
            return "text"
        case Pair():
            return ("chosen", "rejected")[number]
        case Ranking():
            return f"answer {number + 1}"
        case Chat() | Feedback() | Prompt():
            return "answer"


# ---- showing -------------------------------------------------------------------------------------


def _painted(part: Part, coloured: bool) -> RichText:
    from rich.text import Text as RichText

    text = RichText()
    for run in part.runs:
        opening, closing = ("", "") if coloured else _MARKS[run.role]
        content = visible("".join(piece.text for piece in run.pieces))
        text.append(f"{opening}{content}{closing}", style=_STYLES[run.role])
    return text


def _legend(coloured: bool) -> RichText:
    from rich.text import Text as RichText

    text = RichText()
    for role, meaning in _LEGEND.items():
        opening, closing = ("", "") if coloured else _MARKS[role]
        text.append(f"{opening}{role}{closing}", style=_STYLES[role]).append(f": {meaning}   ")
    return text


def _html_row(row: ShownRow) -> str:
    head = f"<h2>{escape(row.row)} <small>{escape(row.kind)} {escape(row.about)}</small></h2>"
    left_out = f'<p class="bad">left out: {escape(row.dropped)}</p>' if row.dropped else ""
    return head + left_out + "".join(map(_html_part, row.parts))


def _html_part(part: Part) -> str:
    tokens = "".join(
        f'<span class="{run.role}" title="{" ".join(map(str, piece.ids))}">{escape(visible(piece.text))}</span>'
        for run in part.runs
        for piece in run.pieces
    )
    return f'<h3>{escape(part.words())}</h3><div class="tokens">{tokens}</div>'


def _html_legend() -> str:
    items = (f'<span class="{role}">{role}</span>: {meaning}' for role, meaning in _LEGEND.items())
    return f"<p>{' · '.join(items)}. Point at a token to see its id.</p>"
