"""What a person types: one line, or several as one; from a terminal with line editing, or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trueup.cache import cache_root

FENCE = '"""'
MOST_HISTORY = 1000  # lines kept for the next time


def questions(commands: Sequence[str] = ()) -> Iterator[str]:
    """What is said, until it ends: Ctrl-D, or the end of the pipe. Ctrl-C drops what is being typed.

    A line that ends in a backslash goes on in the next one; so does everything between two `\"\"\"`.
    """
    if not sys.stdin.isatty():
        pipe = iter(sys.stdin)
        yield from _joined(lambda prompt: next(pipe, None))
        return
    with _line_editing(commands):
        yield from _joined(_typed)


def _typed(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def _joined(read: Callable[[str], str | None]) -> Iterator[str]:
    """Whole questions from single lines; `read` gives None at the end."""
    while True:
        try:
            line = read("> ")
            if line is None:
                return
            said = _whole(line.strip(), read)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D leaves)")
            continue
        if said:
            yield said


def _whole(line: str, read: Callable[[str], str | None]) -> str:
    """A line with those that belong to it."""
    if line.startswith(FENCE):
        return _fenced(line.removeprefix(FENCE), read)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\").rstrip()
        if (more := read("… ")) is None:
            break
        lines.append(more.strip())
    return "\n".join(lines).strip()


def _fenced(line: str, read: Callable[[str], str | None]) -> str:
    lines = []
    more: str | None = line
    while more is not None:
        if more.rstrip().endswith(FENCE):
            lines.append(more.rstrip().removesuffix(FENCE))
            break
        lines.append(more.rstrip("\r\n"))
        more = read("… ")
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _line_editing(commands: Sequence[str]) -> Iterator[None]:
    """Editing, completion of commands, and earlier lines, where Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    history = _history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(MOST_HISTORY)
    readline.set_completer(lambda start, n: [*(c for c in commands if c.startswith(start)), None][n])
    readline.set_completer_delims(" \n")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)  # what people say is theirs alone
            readline.write_history_file(history)


def _history_file() -> Path:
    return cache_root() / "chat_history"
