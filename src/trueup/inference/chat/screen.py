"""Answers on the screen as they come: under each other, or in columns where there is room."""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trueup.inference.thoughts import OPEN, Split
from trueup.rollout.engines import Generation

COLUMN = 30  # characters that an answer needs to stand beside another
TICK = 0.1  # seconds between looks at what has come
#: what must not reach a terminal from a model: it could move the cursor, or worse.
_CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


@dataclass
class Coming:
    """An answer under way. `error`: why there is none, in words."""

    name: str
    generation: Generation | None
    opened: bool = False
    error: str = ""
    text: str = ""
    finish: str | None = None
    tokens: int = 0
    split: Split = field(init=False)

    def __post_init__(self) -> None:
        self.split = Split(self.opened)
        if self.generation is None:
            self.finish = "error"

    @property
    def whole(self) -> str:
        """What was written, with the beginning of a thought that the prompt had opened."""
        return f"{OPEN}\n{self.text}" if self.opened and self.text and not self.text.startswith(OPEN) else self.text

    def take(self, seconds: float) -> bool:
        """Wait at most so long for more; whether something came."""
        if self.finish or self.generation is None:
            return False
        try:
            piece = self.generation.next_piece(seconds)
        except TimeoutError:
            return False
        except Exception as error:  # the engine's, or an endpoint's: the conversation goes on without this answer
            self.finish, self.error = "error", str(error) or type(error).__name__
            self.split.finish()
            return True
        self.text += piece.text
        self.tokens += len(piece.ids)
        self.split.push(piece.text)
        if piece.finish_reason:
            self.finish = piece.finish_reason
            self.split.finish()
        return True

    def stop(self) -> None:
        """End it where it is."""
        if self.generation is None or self.finish:
            return
        self.generation.cancel()
        self.generation.wait(5.0)
        with contextlib.suppress(EOFError, queue.Empty):
            while not self.finish and self.take(TICK):
                pass
        self.finish = self.finish or "cancelled"
        self.split.finish()


class Screen:
    """Where a conversation is shown.

    Attributes:
        unfolded: thoughts are shown whole.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.unfolded = False

    def answers(self, coming: Sequence[Coming]) -> bool:
        """Show answers until they end; whether Ctrl-C ended them."""
        begun = time.monotonic()
        try:
            if len(coming) > 1 and self.console.is_terminal and self.console.width >= COLUMN * len(coming):
                self._beside(coming)
            else:
                for one in coming:
                    self._below(one)
        except KeyboardInterrupt:
            for one in coming:
                one.stop()
            if self.console.is_terminal:
                self.console.print()
            return True
        if self.console.is_terminal:
            self._speed(coming, time.monotonic() - begun)
        return False

    def say(self, text: str) -> None:
        """A remark of the program's."""
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def note(self, text: str) -> None:
        """A remark that is no part of what a pipe carries on."""
        if self.console.is_terminal:
            self.say(text)
        else:
            print(text, file=sys.stderr)

    def show(self, thing: RenderableType) -> None:
        self.console.print(thing, markup=False, highlight=False)

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Aligned columns, the last of which is folded."""
        if not self.console.is_terminal:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
            for row in rows:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
                self.show("  ".join([*cells, row[-1]]).rstrip())
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            grid.add_row(*map(Text, row))
        self.console.print(grid)

    # --- parts ----------------------------------------------------------------------------------

    def _below(self, one: Coming) -> None:
        self.console.print(Text(f"{one.name}: ", style="bold"), end="")
        shown = _Shown(self, one)
        while not one.finish:
            one.take(TICK)
            shown.update()
        shown.update()
        self.console.print(Text(one.error and f"({one.error})", style="dim"))

    def write(self, text: str) -> None:
        """Some of an answer, as it is; on a terminal, without what could steer it."""
        self.console.file.write(text.translate(_CONTROLS) if self.console.is_terminal else text)
        self.console.file.flush()

    def _beside(self, coming: Sequence[Coming]) -> None:
        with Live(
            self._columns(coming, cut=True), console=self.console, transient=True, auto_refresh=False,
            vertical_overflow="crop",
        ) as live:  # fmt: skip
            for _ in _until_all_end(coming):
                live.update(self._columns(coming, cut=True), refresh=True)
        self.console.print(self._columns(coming))

    def _columns(self, coming: Sequence[Coming], cut: bool = False) -> Table:
        """The answers; `cut`: their last lines, as many as the screen has."""
        table = Table(expand=True)
        for number, one in enumerate(coming, 1):
            table.add_column(f"{number} {one.name}", ratio=1, overflow="fold")
        width = max((self.console.width - 1) // len(coming) - 3, 1)
        table.add_row(*(self._cell(one, width, self.console.height - 6 if cut else None) for one in coming))
        return table

    def _cell(self, one: Coming, width: int, most: int | None) -> RenderableType:
        parts = []
        if thought := one.split.thought:
            text = thought.strip() if self.unfolded else folded(thought, one.split.thinking)
            parts.append(Text(text.translate(_CONTROLS), style="dim"))
        parts.append(Text(one.split.said.translate(_CONTROLS)))
        if one.error:
            parts.append(Text(f"({one.error})", style="dim"))
        if most is None:
            return Group(*parts)
        lines = [line for part in parts for line in part.wrap(self.console, width, overflow="fold")]
        return Text("\n").join(lines[-max(most, 3) :])

    def _speed(self, coming: Sequence[Coming], seconds: float) -> None:
        if tokens := sum(one.tokens for one in coming):
            self.say(f"({tokens} tokens, {tokens / max(seconds, 1e-3):.0f} a second)")


class _Shown:
    """How much of an answer stands on the screen."""

    def __init__(self, screen: Screen, one: Coming) -> None:
        self.screen, self.one = screen, one
        self._thought = self._said = 0
        self._closed = False

    def update(self) -> None:
        """Write what is new."""
        split = self.one.split
        if split.thought and not self._closed:
            self._think(split)
        if new := split.said[self._said :]:
            self.screen.write(new)
            self._said = len(split.said)

    def _think(self, split: Split) -> None:
        """A thought has lines of its own: one, or all of them."""
        console = self.screen.console
        if not self._thought:
            console.file.write("\n")
        if self.screen.unfolded:
            console.print(Text(split.thought[self._thought :].translate(_CONTROLS), style="dim"), end="")
        elif console.is_terminal:  # one line, written over as it grows
            console.file.write("\r\033[2K")
            console.print(Text(folded(split.thought, split.thinking), style="dim"), end="")
        elif not split.thinking:
            console.print(folded(split.thought, False), end="")
        console.file.flush()
        self._thought = len(split.thought)
        if not split.thinking:
            self._closed = True
            console.file.write("\n")


def folded(thought: str, thinking: bool) -> str:
    """A thought in one line."""
    size = f"{len(thought.strip()):,} characters"
    return f"(thinking: {size} …)" if thinking else f"(thought: {size}; /thoughts shows it)"


def _until_all_end(coming: Sequence[Coming]) -> Iterator[None]:
    """Again and again while something comes; what has come is taken."""
    while not all(one.finish for one in coming):
        for one in coming:
            if one.take(TICK / len(coming)):
                while one.take(0.0):
                    pass
        yield
