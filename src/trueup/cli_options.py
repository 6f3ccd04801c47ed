"""What every verb of the command line takes: global options, config words, mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from trueup.console import Session
from trueup.errors import ConfigError

if TYPE_CHECKING:
    from trueup.config.schema import RunConfig

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


class Verbs(click.Group):
    """A group of verbs, in the order they were added; a mistyped one is told the near one."""

    #: Other names of verbs.
    aliases: Mapping[str, str] = {}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            raise click.UsageError(f"there is no verb {word!r}{self.nearest(word, ctx.command_path)}", ctx)
        return super().resolve_command(ctx, args)

    def nearest(self, word: str, path: str) -> str:
        """What may have been meant with `word` after `path`, as the end of a sentence."""
        near = difflib.get_close_matches(word, [*self.commands, *self.aliases], n=1)
        return f"; did you mean `{path} {near[0]}`?" if near else ""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class ConfigCommand(click.Command):
    """A verb that takes a config file and overrides: words it does not know are the config's."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), *complete_word(ctx, None, incomplete)]


def complete_word(ctx: click.Context, param: click.Parameter | None, incomplete: str) -> list[CompletionItem]:
    """Values of a key, config keys as `--key` or `key=`, and files while no `=` is typed."""
    from trueup.config.schema import FIELDS

    if values := _complete_value(ctx.params.get("words") or ctx.args, incomplete):
        return values
    dashes = "--" if incomplete.startswith("--") else ""
    start = incomplete.removeprefix(dashes)
    items = [
        CompletionItem(f"{dashes}{key}" if dashes else f"{key}=", help=FIELDS[key].description)
        for key in FIELDS
        if start and key.startswith(start)
    ]
    return items if items or dashes else [CompletionItem(incomplete, type="file")]


def _complete_value(before: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """What `key=…` or `--key …` may go on with. bash cuts words at `=`: there the key is a word or two back."""
    from trueup.config.explain import choices
    from trueup.config.schema import FIELDS, is_flag

    key, equals, start = incomplete.removeprefix("--").partition("=")
    if not equals:
        words = [word for word in before if word != "="]
        key, start = (words[-1].removeprefix("--") if words else ""), incomplete
    if key not in FIELDS:
        return []
    values = ["true", "false"] if is_flag(key) else choices(key)
    written = incomplete.removesuffix(start) if equals else ""
    return [CompletionItem(written + value) for value in values if value.startswith(start)]


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
PASS_ON = {**CONTEXT, "ignore_unknown_options": True}


def _option(name: str, text: str, act: Callable[[Session], None]) -> Callable[[Callable], Callable]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            act(ctx.ensure_object(Session))

    return click.option(f"--{name}", is_flag=True, expose_value=False, is_eager=True, help=text, callback=callback)


debug_option = _option("debug", "Show tracebacks.", lambda session: setattr(session, "debug", True))
json_option = _option("json", "Print one JSON object instead of text.", Session.speak_json)
config_words = click.argument(
    "words",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[CONFIG] [KEY=VALUE | --KEY VALUE]...",
    shell_complete=complete_word,
)


def read_config(words: Sequence[str], **how: Any) -> RunConfig:
    """The config that a verb's words name: perhaps a file, then overrides."""
    from trueup.config.load import load_config

    source, overrides = split_source(words)
    return load_config(source, overrides, **how)


def read_given(words: Sequence[str]) -> dict[str, Any]:
    """What they set, by canonical key, as far as it can be read; nothing is checked."""
    from trueup.config.load import given

    return given(*split_source(words))


def split_source(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """`(file or None, overrides)`. The file is the first word, or the one after `--config`."""
    first, rest = (words[0] if words else ""), list(words)
    if first.lower().endswith(CONFIG_SUFFIXES) and "=" not in first and not first.startswith("--"):
        return first, rest[1:]
    for position, word in enumerate(rest):
        option, equals, name = word.partition("=")
        if option in ("--config", "config") and equals:
            return name, rest[:position] + rest[position + 1 :]
        if word == "--config" and position + 1 < len(rest):
            return rest[position + 1], rest[:position] + rest[position + 2 :]
    if first and "=" not in first and not first.startswith("--") and Path(first).exists():
        raise ConfigError(f"{first} is no config file", expected=_config_in(Path(first)))
    return None, rest


def leading_directories(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`(directories, the other words)`: directories come first."""
    count = 0
    while count < len(words) and not words[count].startswith("--") and Path(words[count]).is_dir():
        count += 1
    return list(words[:count]), list(words[count:])


def _config_in(path: Path) -> str:
    """What may have been meant by a word that is some other file, or a directory."""
    kept = path / "run.yaml"
    if kept.is_file():
        return f"a file: {kept} is the config of the run in that directory"
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.suffix in CONFIG_SUFFIXES)
        return f"a file: {', '.join(found[:3])}" if found else "a .yaml or .json file, not a directory"
    return f"a name that ends in .yaml or .json; `--config {path}` reads it anyway"


def only_text(session: Session, verb: str) -> None:
    """Refuse `--json` for a verb whose output is text."""
    if session.json:
        raise click.UsageError(f"`{verb}` has no --json: what it prints is text")
