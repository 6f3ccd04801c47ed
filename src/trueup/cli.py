"""The verbs. Each imports its work when called, so that help and a bad config stay instant."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import get_completion_class, shell_complete

from trueup import __version__
from trueup.cli_data import data
from trueup.cli_export import export
from trueup.cli_options import (
    CONFIG_SUFFIXES,
    CONTEXT,
    PASS_ON,
    ConfigCommand,
    Verbs,
    complete_word,
    config_words,
    debug_option,
    json_option,
    leading_directories,
    only_text,
    read_config,
    split_source,
)
from trueup.cli_serve import serve
from trueup.cli_web import web
from trueup.console import Session, console
from trueup.errors import ConfigError
from trueup.garbage import importing

if TYPE_CHECKING:
    from trueup.config.schema import RunConfig

COMPLETE_VARIABLE = "_TRUEUP_COMPLETE"

#: Verbs that users of other tools type and that are still to come: (what it is, what to use now).
LATER: dict[str, tuple[str, str]] = {}


class Program(Verbs):
    """The group of all verbs; every way it can end goes through one `Session`."""

    aliases = {"env": "doctor", "merge": "export", "api": "serve", "webui": "web", "webchat": "web"}

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        if instruction := os.environ.get(COMPLETE_VARIABLE):
            sys.exit(shell_complete(self, {}, "trueup", COMPLETE_VARIABLE, instruction))
        session = Session()
        sys.exit(session.run(lambda: self._call(words, session)))

    def _call(self, words: list[str], session: Session) -> None:
        with self.make_context("trueup", words, obj=session) as context:
            self.invoke(context)

    def nearest(self, word: str, path: str) -> str:
        if word.lower().endswith(CONFIG_SUFFIXES):
            return f"; did you mean `trueup train {word}`?"
        return super().nearest(word, path)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        now = {name: self.commands[name].get_short_help_str(80) for name in self.commands if name not in LATER}
        for title, verbs in (
            ("Verbs", now),
            ("To come", {name: what for name, (what, _) in LATER.items()}),
        ):
            if verbs:
                with formatter.section(title):
                    formatter.write_dl(list(verbs.items()))


@click.group(
    cls=Program,
    context_settings=CONTEXT,
    no_args_is_help=True,
    epilog="New here: `trueup quickstart`. `trueup help KEY` explains a config key.",
)
@click.version_option(__version__, "-V", "--version", message="trueup %(version)s")
@debug_option
@json_option
def main() -> None:
    """Align language models with people's preferences."""


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
    with importing():
        from trueup import launch

    with session.notices.held() as held:
        cfg = read_config(words)
        with importing():
            num_gpus = launch.count_gpus(cfg.model.device)
        several = launch.is_requested(num_gpus)
        if several:
            held.clear()  # the processes to come say it themselves
    if several:
        raise click.exceptions.Exit(launch.launch(words, num_gpus))
    session.output_dir = Path(cfg.train.output_dir)
    with importing():
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
    with importing():
        from trueup import launch

    cfg = read_config(words)
    with importing():
        from trueup.recipes.check import check as check_run

    with session.result() as result:
        report = check_run(cfg, launch.num_processes(launch.count_gpus(cfg.model.device)))
        result.data, result.text = report.to_dict(), report.render()


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_word,
                metavar="[DIR]... [CONFIG] [KEY=VALUE | --KEY VALUE]...")  # fmt: skip
@click.option("--compare", is_flag=True, help="Show the base model's answer too.")
@click.option("--with", "beside", multiple=True, metavar="MODEL",
              help="Another model beside it: a run, a checkpoint, an adapter, a model or URL#MODEL.")  # fmt: skip
@click.option("--preferences", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Where /prefer keeps pairs [default: chat_preferences.jsonl in dataset_dir].")  # fmt: skip
@click.option("--key-env", metavar="NAME", help="Environment variable with the API key of a URL.")
@debug_option
@click.pass_obj
def chat(
    session: Session, words: tuple[str, ...], compare: bool, beside: tuple[str, ...], preferences: Path | None,
    key_env: str | None,
) -> None:  # fmt: skip
    """Talk to a model, or to several side by side.

    DIR is a run, a checkpoint or an adapter, with its base. Several answer side by side.

    \b
    trueup chat saves/sql-tiny/dpo --compare
    trueup chat saves/a saves/b/checkpoint-60 --with http://127.0.0.1:8000/v1#qwen
    trueup chat --model_name_or_path MODEL --adapter_name_or_path DIR --compare --device cpu
    """
    only_text(session, "chat")
    from trueup.config.load import given, load_config

    directories, rest = leading_directories(words)
    source, overrides = split_source(rest)
    if directories and "model_name_or_path" not in given(source, overrides):
        overrides += ["--model_name_or_path", directories.pop(0)]
    cfg = load_config(source, overrides, verb="infer")
    with importing():
        from trueup.inference.chat import chat as talk

    talk(cfg, compare, [*directories, *beside], preferences, key_env)


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
    with importing():
        from trueup.recipes.scoring import score as score_answers

    with session.result() as result:
        printed = str(output) == "-"
        done, lines = score_answers(cfg, None if printed else output, force)
        result.data = done.to_dict() | ({"lines": lines} if printed else {})
        result.text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) if printed else done.render()


@main.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("answers.jsonl"),
              show_default=True, help="Where the JSON lines go; - prints them.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@debug_option
@json_option
@click.pass_obj
def generate(session: Session, words: tuple[str, ...], output: Path, force: bool) -> None:
    """Answer every prompt of a dataset or file.

    Each line has the prompt, the answer, its log-probability, its seed and why it ended. The likeliest answer, unless
    temperature asks for chance. The same command goes on after an interruption.

    \b
    trueup generate --model_name_or_path MODEL --dataset prompts.jsonl --output answers.jsonl
    trueup generate --model_name_or_path BASE --adapter_name_or_path DIR --dataset NAME temperature=1 num_generations=4
    """
    cfg = read_config(words, verb="generate")
    with importing():
        from trueup.recipes.generating import generate as answer

    with session.result() as result:
        printed = str(output) == "-"
        done, lines = answer(cfg, None if printed else output, force)
        result.data = done.to_dict() | ({"lines": lines} if printed else {})
        result.text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) if printed else done.render()


@main.command("eval", cls=ConfigCommand, context_settings=PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_word,
                metavar="[DIR]... [CONFIG] [KEY=VALUE | --KEY VALUE]...")  # fmt: skip
@debug_option
@json_option
@click.pass_obj
def eval_(session: Session, words: tuple[str, ...]) -> None:
    """Measure models: preferences, answers, wins, tasks.

    Held-out preference accuracy and margin, also with length taken out, perplexity, KL and entropy against the start,
    what answers are like, who wins by a judge or by rewards, tasks of lm-evaluation-harness; with 95 % intervals, in
    JSON, Markdown and HTML. DIR is a run: its result is measured beside its start.

    \b
    trueup eval saves/sql-tiny/dpo
    trueup eval saves/a saves/b/checkpoint-60 --eval_dataset pairs.jsonl
    trueup eval --model_name_or_path MODEL --task arc_easy,hellaswag --task_limit 100
    """
    directories, rest = leading_directories(words)
    source, overrides = split_source(rest)
    from trueup.recipes.evaluation.target import evaluation_config

    cfg = evaluation_config(directories, source, overrides)
    with importing():
        from trueup.recipes.evaluation.evaluate import evaluate

    with session.result() as result:
        report = evaluate(cfg)
        result.data, result.text = report.to_dict(), report.render()


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


main.add_command(export)
main.add_command(serve)
main.add_command(web)
main.add_command(data)


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
    with importing():
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
    only_text(session, "completion")
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
