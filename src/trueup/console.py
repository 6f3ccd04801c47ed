"""How the command line speaks: notices, results and errors.

One screen, any terminal, JSON on request, and never a traceback that nobody asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from trueup.errors import EXIT_BUG, EXIT_OK, EXIT_SIGINT, Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console

MOST_LINES = 20  # of problems: what fits one screen below the notices


def console(stream: TextIO | None = None) -> Console:
    """A rich console on `stream` (stdout). Off a terminal, lines are never folded."""
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for `Session`; rich would end the process with 1

    terminal = Ours(file=stream)
    return terminal if terminal.is_terminal else Ours(file=stream, width=10_000, soft_wrap=True)


class Notices(logging.Handler):
    """Prints what the package has to say on stderr, each sentence once; keeps it for `--json`."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[dict[str, str]] = []
        self.silent = False
        self._held: list[dict[str, str]] | None = None
        self.logger = logging.getLogger("trueup")

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning" if record.levelno >= logging.WARNING else "note"
        notice = {"level": level, "text": record.getMessage()}
        if notice in self.said:
            return
        self.said.append(notice)
        if self._held is not None:
            self._held.append(notice)
        else:
            self._say(notice)

    def _say(self, notice: dict[str, str]) -> None:
        if not self.silent and _rank() == 0:
            say(notice["level"], notice["text"])

    @contextlib.contextmanager
    def held(self) -> Iterator[list[dict[str, str]]]:
        """Print what is said only at the end of the block, unless it was taken out of the list."""
        held = self._held = []
        try:
            yield held
        finally:
            self._held = None
            for notice in held:
                self._say(notice)

    def __enter__(self) -> Notices:
        self._level = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        # Warns, wherever it is installed, of a faster kernel that it would fetch from a hub.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return self

    def __exit__(self, *exception: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self._level)


#: raised with the help as its message by click from 8.2 on; before, click prints it.
_ASKED_NOTHING: tuple[type[click.ClickException], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)
_STYLES = {"note": "dim", "warning": "yellow", "error": "bold red", "stopped": "bold yellow"}


def say(level: str, text: str) -> None:
    """`warning: text` on stderr, the first word in colour where there is colour."""
    from rich.text import Text

    line = Text.assemble((f"{level}:", _STYLES[level]), " ", text)
    console(sys.stderr).print(line, soft_wrap=True)  # a command in it is pasted in one piece


@dataclass
class Session:
    """One call of the program: its global options, and what it said."""

    debug: bool = False
    json: bool = False
    notices: Notices = field(default_factory=Notices)
    output_dir: Path | None = None  # of the run this call started, for its error log

    def speak_json(self) -> None:
        """From now on stdout carries one JSON object, and notices are part of it."""
        self.json = self.notices.silent = True

    def run(self, work: Callable[[], Any]) -> int:
        """Do the work; turn whatever happens into a message and an exit code."""
        _make_streams_safe()
        try:
            with self.notices, warnings.catch_warnings():
                if not sys.warnoptions:  # what libraries tell developers is no news for users
                    warnings.simplefilter("ignore", FutureWarning)
                code = self._attempt(work)
            sys.stdout.flush()
        except BrokenPipeError:  # `trueup … | head`: the reader has seen enough
            _discard_stdout()
            return EXIT_OK
        return code

    def _attempt(self, work: Callable[[], Any]) -> int:
        try:
            work()
        except click.exceptions.Exit as leave:
            return leave.exit_code
        except BrokenPipeError:
            raise
        except _ASKED_NOTHING as error:
            if not self.json:
                click.echo(error.format_message(), err=True)
                return error.exit_code
            return self._report(error, [Problem("no verb is named")], error.exit_code)
        except click.ClickException as error:
            problem = Problem(error.format_message(), fix=_usage_hint(error))
            return self._report(error, [problem], error.exit_code)
        except UserError as error:
            return self._report(error, error.problems, error.exit_code)
        except KeyboardInterrupt as error:
            return self._report(error, [Problem("interrupted")], EXIT_SIGINT)
        except Exception as error:  # ours: whatever a user can cause is a UserError
            return self._report(error, [self._describe_bug(error)], EXIT_BUG)
        return EXIT_OK

    @contextlib.contextmanager
    def result(self) -> Iterator[Result]:
        """Collect a verb's result. With `--json` it has stdout for itself."""
        outcome = Result()
        with contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext():
            yield outcome
        if self.json:
            self._print_json(ok=True, exit_code=EXIT_OK, result=outcome.data)
        elif outcome.text is not None:
            whole = isinstance(outcome.text, str)  # commands to paste; the terminal folds them
            console().print(outcome.text, markup=False, highlight=False, soft_wrap=whole)

    def _report(self, error: BaseException, problems: list[Problem], exit_code: int) -> int:
        if isinstance(error, Exception):
            self._write_log(error)
        if self.debug and not isinstance(error, click.ClickException):
            traceback.print_exception(error, file=sys.stderr)
        if self.json:
            self._print_json(ok=False, exit_code=exit_code, problems=[asdict(p) for p in problems])
        elif _rank() == 0:
            show_problems(problems, "stopped" if exit_code > 128 else "error")
        else:
            say("error", f"[rank {_rank()}] {problems[0].what}")
        return exit_code

    def _print_json(self, **content: Any) -> None:
        content["notices"] = self.notices.said
        sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2, default=_plain) + "\n")

    def _describe_bug(self, error: Exception) -> Problem:
        log = self._error_log() or Path(tempfile.gettempdir()) / "trueup-error.txt"
        kept = f"the traceback is in {log}" if _append(log, error) else "--debug shows the traceback"
        return Problem(
            f"this is a bug in trueup: {type(error).__name__}: {error}",
            fix=f"please report it with the traceback and the output of `trueup doctor`; {kept}",
        )

    def _write_log(self, error: Exception) -> None:
        log = self._error_log()
        if log is not None and isinstance(error, UserError):
            _append(log, error)

    def _error_log(self) -> Path | None:
        """logs/error.txt of the run that this process started; other runs are left alone."""
        if self.output_dir is None:
            return None
        try:
            status = json.loads((self.output_dir / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return self.output_dir / "logs" / "error.txt" if status.get("pid") == os.getpid() else None


@dataclass
class Result:
    """What a verb found: `data` for machines, `text` (anything rich prints) for people."""

    data: Any = None
    text: Any = None


def show_problems(problems: list[Problem], level: str = "error") -> None:
    """Print problems on stderr, at most a screenful."""
    if len(problems) == 1:
        return say(level, str(problems[0]))
    say(level, f"{len(problems)} problems")
    terminal = console(sys.stderr)
    shown = _screenful(problems)
    for problem in shown:
        terminal.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > len(shown):
        terminal.print(f"  … and {len(problems) - len(shown)} more; --json lists all", highlight=False)


def _screenful(problems: list[Problem]) -> list[Problem]:
    """The first problems that fit one screen, at least one."""
    lines = 0
    for count, problem in enumerate(problems):
        lines += len(str(problem).splitlines())
        if count and lines > MOST_LINES:
            return problems[:count]
    return problems


def _plain(value: Any) -> Any:
    """JSON for what json does not know: dataclasses by field, anything else as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _usage_hint(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)  # only usage errors know where they happened
    return f"`{context.command_path} -h` tells what it takes" if context else None


def _append(log: Path, error: Exception) -> bool:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n")
            file.writelines(traceback.format_exception(error))
            file.write("\n")
    except OSError:
        return False
    return True


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _make_streams_safe() -> None:
    """A terminal that cannot show a character gets a `?` instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced streams, as under a test runner
            stream.reconfigure(errors="replace")


def _discard_stdout() -> None:
    """Let Python's own flush at exit succeed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
