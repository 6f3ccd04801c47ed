"""`trueup chat`: talk to a model, or to a base and its adapter side by side; terminal or pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trueup.config.schema import RunConfig, default
from trueup.console import console as make_console
from trueup.data.examples import Message
from trueup.data.templates import ChatTemplate, load_template
from trueup.errors import ConfigError, Problem
from trueup.models.load import load_for_inference, load_tokenizer
from trueup.rollout.engines import BASE, Engine, Sampling

HELP = """\
/clear          forget the conversation       (also: clear)
/system TEXT    set the system message, and start anew; without TEXT, remove it
/exit           leave                         (also: exit, Ctrl-D)
/help           this list
Ctrl-C stops an answer."""
_NO_EFFECT = {
    "length_penalty": "it belongs to beam search, and chat draws token by token",
    "skip_special_tokens": "chat never shows special tokens",
}
_NARROWEST = 60  # columns; below this, two answers go under each other


@dataclass
class Side:
    """One voice of the conversation, with what it has said so far."""

    name: str
    engine: Engine
    template: ChatTemplate
    voice: str | None = None  # the engine's: None, as it was loaded
    messages: list[Message] = field(default_factory=list)

    def answer(self, sampling: Sampling) -> Iterator[str]:
        """Stream the answer to `messages`; what was said when it ends or is closed is kept."""
        prompt = self.template.encode_prompt(self.messages)
        room = self.engine.context - len(prompt)
        if room <= 0:
            yield f"({len(prompt)} tokens are more than this model takes: /clear starts anew)"
            return
        said = ""
        try:
            with contextlib.closing(self.engine.stream(prompt, sampling.limited(room), self.voice)) as pieces:
                for piece in pieces:
                    said += piece
                    yield piece
        finally:
            self.messages.append(Message("assistant", said))


def chat(cfg: RunConfig, compare: bool = False) -> None:
    """Read questions from stdin until it ends, and stream answers to stdout.

    Args:
        compare: show the base model's answer beside the adapter's; both see their own conversation.

    Raises:
        ConfigError: `compare` without an adapter, or generation keys that chat cannot honour.
    """
    _refuse_what_has_no_effect(cfg)
    sides = load_sides(cfg, compare)
    terminal = make_console()
    model = cfg.model
    spoken = " + ".join([str(model.model_name_or_path), *model.adapter_name_or_path])
    hello = f"{spoken} on {sides[0].engine.policy.device}; /help lists the commands"
    make_console(sys.stderr).print(Text(hello, style="dim"))
    start = [Message("system", cfg.data.default_system)] if cfg.data.default_system else []
    converse(sides, sampling_of(cfg), start, terminal)


def load_sides(cfg: RunConfig, compare: bool) -> list[Side]:
    """The model once; with `compare` it speaks twice, first with its adapter switched off."""
    tokenizer = load_tokenizer(cfg.model)
    data = cfg.data
    template = load_template(
        tokenizer,
        data.template,
        enable_thinking=data.enable_thinking,
        preserve_thinking=data.preserve_thinking,
        tool_format=data.tool_format,
    )
    policy = load_for_inference(cfg.model, cfg.train)
    if compare and not isinstance(policy.model, PeftModel):
        raise ConfigError(
            "there is no adapter to compare with",
            where="--compare",
            fix="add --adapter_name_or_path DIR",
        )
    engine = Engine(policy, tokenizer, template.stop_ids)
    names = ("base", "adapter") if compare else ("assistant",)
    return [Side(name, engine, template, BASE if name == "base" else None) for name in names]


def sampling_of(cfg: RunConfig) -> Sampling:
    """The config's generation keys, as the engine takes them."""
    keys = cfg.generate
    return Sampling(
        temperature=keys.temperature if keys.do_sample else 0.0,
        top_p=keys.top_p,
        top_k=keys.top_k,
        repetition_penalty=keys.repetition_penalty,
        max_new_tokens=keys.max_new_tokens,
    )


def converse(sides: Sequence[Side], sampling: Sampling, start: Sequence[Message], terminal: Console) -> None:
    """The loop: a line is a command or a question."""
    start = list(start)
    _begin(sides, start)
    for line in questions():
        word, _, rest = line.partition(" ")
        match word:
            case "/exit" | "/quit":
                return
            case "exit" | "clear" if rest:
                answer(sides, line, sampling, terminal)
            case "exit":
                return
            case "/help":
                terminal.print(HELP, markup=False, highlight=False)
            case "/clear" | "clear":
                _begin(sides, start)
                terminal.print(Text("(forgotten)", style="dim"))
            case "/system":
                start = [Message("system", rest.strip())] if rest.strip() else []
                _begin(sides, start)
                terminal.print(Text("(a new conversation)", style="dim"))
            case _ if word.startswith("/") and word[1:].isalpha():
                terminal.print(f"there is no command {word}; /help lists them", markup=False, highlight=False)
            case _:
                answer(sides, line, sampling, terminal)


def questions() -> Iterator[str]:
    """Lines that say something, from a prompt on a terminal or from a pipe, until they end."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):  # line editing and history, where Python was built with them
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def answer(sides: Sequence[Side], question: str, sampling: Sampling, terminal: Console) -> None:
    """Ask every side, and show answers as they come. Ctrl-C ends them, not the conversation."""
    for side in sides:
        side.messages.append(Message("user", question))
    with contextlib.suppress(KeyboardInterrupt):
        if len(sides) > 1 and terminal.is_terminal and terminal.width >= _NARROWEST:
            _show_beside(sides, sampling, terminal)
        else:
            _show_below(sides, sampling, terminal)
    for side in sides:  # those that were not reached before Ctrl-C
        if side.messages[-1].role == "user":
            side.messages.append(Message("assistant", ""))


def _show_below(sides: Sequence[Side], sampling: Sampling, terminal: Console) -> None:
    for side in sides:
        terminal.print(Text(f"{side.name}: ", style="bold"), end="")
        with contextlib.closing(side.answer(sampling)) as pieces:
            for piece in pieces:
                terminal.file.write(piece)
                terminal.file.flush()
        terminal.print()


def _show_beside(sides: Sequence[Side], sampling: Sampling, terminal: Console) -> None:
    said = {side.name: "" for side in sides}

    def columns() -> Table:
        table = Table(expand=True)
        for name in said:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, said.values()))
        return table

    with Live(columns(), console=terminal, vertical_overflow="visible") as live:
        for side in sides:
            with contextlib.closing(side.answer(sampling)) as pieces:
                for piece in pieces:
                    said[side.name] += piece
                    live.update(columns())


def _begin(sides: Sequence[Side], start: Sequence[Message]) -> None:
    for side in sides:
        side.messages = list(start)


def _refuse_what_has_no_effect(cfg: RunConfig) -> None:
    problems = [
        Problem(f"{key} has no effect in chat: {why}", where=key, fix=f"leave {key} out")
        for key, why in _NO_EFFECT.items()
        if key in cfg.explicit and cfg[key] != default(key)
    ]
    if problems:
        raise ConfigError(problems)
