"""The verbs. Each imports its work when called, so that help and a bad config stay instant."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from trueup import __version__
from trueup.console import Session, console
from trueup.errors import ConfigError

if TYPE_CHECKING:
    from trueup.config.schema import RunConfig

COMPLETE_VARIABLE = "_TRUEUP_COMPLETE"
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
ALIASES = {"env": "doctor", "api": "serve", "webui": "web", "webchat": "web"}

_PLAIN_PEFT = "peft's `merge_and_unload()`: what a run saves is a plain peft adapter"
#: Verbs that users of other tools type and that are still to come: (what it is, what to use now).
LATER = {
    "serve": ("the OpenAI-compatible server", "`vllm serve BASE --enable-lora`, or `trueup chat`"),
    "web": (
        "the studio in a browser",
        "`trueup train`, `trueup runs` and `report_to: tensorboard`",
    ),
    "export": ("merging and exporting models", _PLAIN_PEFT),
    "merge": ("merging adapters", _PLAIN_PEFT),
    "eval": ("evaluation", "`do_train: false, do_eval: true` in a config, or lm-eval"),
    "generate": ("batch inference", "`trueup chat … < questions.txt`"),
    "data": ("the data tools", "`trueup check CONFIG`, which prints the data report"),
}


class Program(click.Group):
    """The group of all verbs; every way it can end goes through one `Session`."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        if instruction := os.environ.get(COMPLETE_VARIABLE):
            sys.exit(shell_complete(self, {}, "trueup", COMPLETE_VARIABLE, instruction))
        session = Session()
        sys.exit(session.run(lambda: self._call(words, session)))

    def _call(self, words: list[str], session: Session) -> None:
        with self.make_context("trueup", words, obj=session) as context:
            self.invoke(context)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            raise click.UsageError(f"there is no verb {word!r}{self._nearest(word)}", ctx)
        return super().resolve_command(ctx, args)

    def _nearest(self, word: str) -> str:
        if word.lower().endswith(CONFIG_SUFFIXES):
            return f"; did you mean `trueup train {word}`?"
        near = difflib.get_close_matches(word, [*self.commands, *ALIASES], n=1)
        return f"; did you mean `trueup {near[0]}`?" if near else ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        now = {name: self.commands[name].get_short_help_str(80) for name in self.commands if name not in LATER}
        for title, verbs in (
            ("Verbs", now),
            ("To come", {name: what for name, (what, _) in LATER.items()}),
        ):
            with formatter.section(title):
                formatter.write_dl(list(verbs.items()))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file


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


@click.group(
    cls=Program,
    context_settings=CONTEXT,
    no_args_is_help=True,
    epilog="`trueup help KEY` explains a config key.",
)
@click.version_option(__version__, "-V", "--version", message="trueup %(version)s")
@debug_option
@json_option
def main() -> None:
    """Align language models with people's preferences."""


def read_config(words: Sequence[str], **how: Any) -> RunConfig:
    """The config that a verb's words name: perhaps a file, then overrides."""
    from trueup.config.load import load_config

    source, overrides = split_source(words)
    return load_config(source, overrides, **how)


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


def _config_in(path: Path) -> str:
    """What may have been meant by a word that is some other file, or a directory."""
    kept = path / "run.yaml"
    if kept.is_file():
        return f"a file: {kept} is the config of the run in that directory"
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.suffix in CONFIG_SUFFIXES)
        return f"a file: {', '.join(found[:3])}" if found else "a .yaml or .json file, not a directory"
    return f"a name that ends in .yaml or .json; `--config {path}` reads it anyway"


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@debug_option
@json_option
@click.pass_obj
def train(session: Session, words: tuple[str, ...]) -> None:
    """Train a model as CONFIG says: pt, sft, dpo …

    \b
    trueup train examples/dpo.yaml
    trueup train examples/dpo.yaml learning_rate=1e-5 --output_dir saves/second
    trueup train --stage dpo --model_name_or_path MODEL --dataset NAME --output_dir saves/third

    Every GPU gets a process; NPROC_PER_NODE=N starts as many as it says (1 keeps to one GPU),
    FORCE_TORCHRUN=1 asks for torch's launcher in any case, NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT span machines.
    """
    from trueup import launch

    with session.notices.held() as held:
        cfg = read_config(words)
        num_gpus = launch.count_gpus(cfg.model.device)
        several = launch.is_requested(num_gpus)
        if several:
            held.clear()  # the processes to come say it themselves
    if several:
        raise click.exceptions.Exit(launch.launch(words, num_gpus))
    session.output_dir = Path(cfg.train.output_dir)
    from trueup.recipes.run import run

    with session.result() as result:
        done = run(cfg, console())
        result.data = {"output_dir": str(done.output_dir), "metrics": done.metrics}
        if cfg.train.do_train and os.environ.get("RANK", "0") == "0":
            result.text = "\n  ".join(["next", *next_commands(cfg, done.output_dir)])


def next_commands(cfg: RunConfig, output_dir: Path) -> list[str]:
    """What people do after training, ready to paste."""
    if cfg.objective.stage == "rm":
        names = ["--dataset", ",".join(cfg.data.eval_dataset or cfg.data.dataset)]
        template = ["--template", cfg.data.template] if cfg.data.template else []
        return [
            shlex.join(["trueup", "score", "--model_name_or_path", str(output_dir), *names, *template]),
            shlex.join(["trueup", "runs", str(output_dir.parent)]),
        ]
    has_adapter = cfg.tuning.finetuning_type not in ("full", "freeze")
    model = cfg.model.model_name_or_path if has_adapter else output_dir
    talk = ["trueup", "chat", "--model_name_or_path", str(model)]
    if has_adapter:
        talk += ["--adapter_name_or_path", str(output_dir), "--compare"]
    if cfg.data.template:
        talk += ["--template", cfg.data.template]
    return [shlex.join(talk), shlex.join(["trueup", "runs", str(output_dir.parent)])]


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@debug_option
@json_option
@click.pass_obj
def check(session: Session, words: tuple[str, ...]) -> None:
    """Say what `train` would do, without loading weights.

    Checks config, data, template and sizes; estimates memory and disk; prints the data report.
    """
    from trueup import launch

    cfg = read_config(words)
    from trueup.recipes.check import check as check_run

    with session.result() as result:
        report = check_run(cfg, launch.num_processes(launch.count_gpus(cfg.model.device)))
        result.data, result.text = report.to_dict(), report.render()


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@click.option("--compare", is_flag=True, help="Show the base model's answer beside the adapter's.")
@debug_option
@click.pass_obj
def chat(session: Session, words: tuple[str, ...], compare: bool) -> None:
    """Talk to a model, with or without an adapter.

    \b
    trueup chat --model_name_or_path MODEL
    trueup chat --model_name_or_path MODEL --adapter_name_or_path DIR --compare --device cpu
    """
    _only_text(session, "chat")
    cfg = read_config(words, verb="infer")
    from trueup.inference.chat import chat as talk

    talk(cfg, compare)


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("scores.jsonl"),
              show_default=True, help="Where the JSON lines go; - prints them.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@debug_option
@json_option
@click.pass_obj
def score(session: Session, words: tuple[str, ...], output: Path, force: bool) -> None:
    """Score answers with a reward model.

    Rows of pairs, rankings, or single answers; for those that are ordered, also how often the model agrees.

    \b
    trueup score --model_name_or_path RM --dataset pairs.jsonl
    trueup score --model_name_or_path BASE --adapter_name_or_path RM --dataset pairs.jsonl --output -
    """
    cfg = read_config(words, verb="infer")
    from trueup.recipes.scoring import score as score_answers

    with session.result() as result:
        printed = str(output) == "-"
        done, lines = score_answers(cfg, None if printed else output, force)
        result.data = done.to_dict() | ({"lines": lines} if printed else {})
        result.text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) if printed else done.render()


@main.command(context_settings=CONTEXT)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=None, required=False)
@click.option("--stage", default="dpo", show_default=True, help="What to train: pt, sft, dpo …")
@click.option("--model", default=None, help="Model to start from: a hub name or a directory.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@debug_option
@json_option
@click.pass_obj
def init(session: Session, file: Path | None, stage: str, model: str | None, force: bool) -> None:
    """Write a commented starter config.

    It goes to FILE, or STAGE.yaml; `-` prints it.
    """
    from trueup.config.starter import starter

    text = starter(stage, **({"model": model} if model else {}))
    if str(file) == "-":
        with session.result() as result:
            result.data, result.text = {"text": text}, text.rstrip("\n")
        return
    target = file or Path(f"{stage}.yaml")
    if target.suffix.lower() not in (".yaml", ".yml"):
        meant = target.with_name(f"{target.name}.yaml")
        raise ConfigError(
            f"{target} is no name of a config", where="init", expected="a .yaml file", fix=f"name it {meant}"
        )
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists already",
            where="init",
            fix="name another file, or add --force to replace it",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    with session.result() as result:
        result.data = {"file": str(target)}
        result.text = f"wrote {target}\nnext: trueup check {target}, then trueup train {target}"


@main.command(context_settings=CONTEXT)
@click.argument("directory", type=click.Path(path_type=Path), default=Path("saves"))
@debug_option
@json_option
@click.pass_obj
def runs(session: Session, directory: Path) -> None:
    """List the runs under DIRECTORY (saves)."""
    from trueup.inference.runs import RunList, find_runs

    with session.result() as result:
        found = find_runs(directory)
        result.data, result.text = [run.to_dict() for run in found], RunList(found, directory)


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@debug_option
@json_option
@click.pass_obj
def quickstart(session: Session, words: tuple[str, ...]) -> None:
    """Align the built-in model and compare its answers."""
    from trueup.recipes.quickstart import quickstart as run

    with session.result() as result:
        result.data = run(words)


@main.command(context_settings=CONTEXT)
@debug_option
@json_option
@click.pass_obj
def version(session: Session) -> None:
    """Print the version."""
    with session.result() as result:
        result.data, result.text = {"trueup": __version__}, f"trueup {__version__}"


@main.command(context_settings=CONTEXT)
@debug_option
@json_option
@click.pass_obj
def doctor(session: Session) -> None:
    """Show versions, devices and what is wrong (env).

    Versions, devices, precision, memory, disk, caches, extras; and what of it will make trouble.
    """
    from trueup.inference.doctor import examine, render

    with session.result() as result:
        found = examine()
        result.data, result.text = found, render(found)


@main.command(context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), required=False)
@click.pass_obj
def completion(session: Session, shell: str | None) -> None:
    """Print a completion script for your shell.

    \b
    eval "$(trueup completion bash)"        # in ~/.bashrc; zsh alike
    trueup completion fish > ~/.config/fish/completions/trueup.fish
    """
    _only_text(session, "completion")
    shell = shell or Path(os.environ.get("SHELL", "bash")).name
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"no completion for {shell}; there is one for bash, zsh and fish")
    click.echo(script(main, {}, "trueup", COMPLETE_VARIABLE).source())


@main.command("help", context_settings=PASS_ON)
@click.argument("topic", required=False, type=click.UNPROCESSED)
@debug_option
@json_option
@click.pass_context
def help_(context: click.Context, topic: str | None) -> None:
    """Explain a verb or a config key.

    `trueup help keys` lists all keys; `trueup help schema` prints them as JSON Schema, for editors.
    """
    assert context.parent is not None
    verb = main.get_command(context, topic) if topic else main
    if verb is not None:
        name = f"trueup {topic}" if topic else "trueup"
        with click.Context(verb, info_name=name, **verb.context_settings) as shown:
            text = verb.get_help(shown)
    else:
        text = _explain(str(topic))
    with context.obj.result() as result:
        result.data, result.text = text, text


def _only_text(session: Session, verb: str) -> None:
    if session.json:
        raise click.UsageError(f"`{verb}` has no --json: what it prints is text")


def _explain(topic: str) -> str:
    from trueup.config.explain import explain, known_keys

    if topic == "keys":
        return "\n".join(known_keys())
    if topic == "schema":
        return _schema()
    key = topic.lstrip("-").replace("-", "_")
    text = explain(key)
    if text.startswith(f"{key}: unknown"):
        near = text.partition("; ")[2]
        raise click.UsageError(f"no verb and no key is called {key!r}" + (f"; {near}" if near else ""))
    return text


def _schema() -> str:
    from trueup.config.schema import json_schema

    return json.dumps(json_schema(), indent=2)


def _later(name: str) -> click.Command:
    what, until = LATER[name]

    @click.command(
        name,
        context_settings={**PASS_ON, "help_option_names": []},
        help=f"To come: {what}.",
        add_help_option=False,
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def verb(words: tuple[str, ...]) -> None:
        raise ConfigError(
            f"`trueup {name}` is not there yet; it arrives with {what}",
            fix=f"until then use {until}",
        )

    return verb


for _name in LATER:
    main.add_command(_later(_name))
