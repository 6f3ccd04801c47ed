"""The verbs of `trueup data`. As in `cli.py`, each imports its work when called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trueup.cli_options import (
    CONTEXT,
    PASS_ON,
    ConfigCommand,
    Verbs,
    complete_word,
    config_words,
    debug_option,
    json_option,
    read_config,
    split_source,
)
from trueup.console import Session

if TYPE_CHECKING:
    from trueup.data.rowset import Outcome

FOLDER = click.Path(file_okay=False, path_type=Path)
HUBS = click.Choice(["huggingface", "modelscope", "modelers"])

dataset_dir_option = click.option(
    "--dataset_dir", "--dataset-dir", type=FOLDER, default=Path("data"), show_default=True,
    help="Folder with dataset_info.json.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


#: What `convert` can write, as in `data/convert.py`.
TARGETS = ["alpaca", "sharegpt", "openai", "trl", "pairs", "ranking", "kto"]
PAGE = click.Path(dir_okay=False, path_type=Path)
named_words = click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, metavar="[NAME]... [CONFIG] [KEY=VALUE | --KEY VALUE]...",
    shell_complete=complete_word,
)  # fmt: skip


def split_names(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """`(datasets, config file, overrides)`: names come first, and a config ends in .yaml or .yml."""
    names: list[str] = []
    for position, word in enumerate(words):
        is_override = word.startswith("--") or ("=" in word and word.partition("=")[0].replace("-", "_").isidentifier())
        if is_override or word.lower().endswith((".yaml", ".yml")):
            return names, *split_source(words[position:])
        names.append(word)
    return names, None, []


NEW_FILE = click.Path(dir_okay=False, path_type=Path)
SOURCE = click.argument("source", metavar="NAME|FILE")
output_option = click.option(
    "--output", type=NEW_FILE, required=True, help="The new file: .jsonl, .json, .parquet or .csv."
)
report_option = click.option("--report", type=NEW_FILE, help="Write every dropped row's id and reason, as JSON.")
register_option = click.option(
    "--register", is_flag=False, flag_value="", metavar="[NAME]",
    help="Enter the new file in dataset_info.json.  [NAME: the file's]",
)  # fmt: skip


def write_new(
    make: Callable[[], Outcome], targets: Sequence[Path], report: Path | None, force: bool,
    register: Sequence[str], dataset_dir: Path,
) -> Outcome:  # fmt: skip
    """Check all names, make the files, then tell and register them."""
    from trueup.data.register import check_name
    from trueup.data.write import check_free, check_target

    for target in targets:
        check_target(target, force)
    if report:
        check_free(report, force, "--report")
    for name, target in zip(register, targets, strict=False):
        check_name(name, target, dataset_dir)
    outcome = make()
    outcome.register(register, dataset_dir) if register else None
    if report:
        outcome.write_report(report)
    return outcome


def hub_option(text: str):
    """`--hub`; without it, what the environment says."""
    return click.option("--hub", type=HUBS, default=None, help=text)


@click.group(cls=Verbs, context_settings=CONTEXT, no_args_is_help=True)
@debug_option
@json_option
def data() -> None:
    """Look at datasets, get, convert, clean and split them."""


@data.command("list", context_settings=CONTEXT)
@dataset_dir_option
@debug_option
@json_option
@click.pass_obj
def list_(session: Session, dataset_dir: Path) -> None:
    """List the datasets that have a name here.

    Those of your registry, the bundled samples, and well-known public sets.

    \b
    trueup data list
    trueup data list --dataset_dir LLaMA-Factory/data --json
    """
    from trueup.config.load import chosen_hub
    from trueup.data.inventory import inventory

    with session.result() as result:
        found = inventory(dataset_dir, chosen_hub())
        result.data, result.text = found.to_dict(), found


@data.command(context_settings=CONTEXT)
@click.argument("name", required=False)
@hub_option("Where to get it from.  [default: huggingface]")
@click.option("--output", type=FOLDER, help="Folder for the file, instead of the cache.")
@dataset_dir_option
@click.option("--force", is_flag=True, help="Fetch it again.")
@debug_option
@json_option
@click.pass_obj
def get(
    session: Session, name: str | None, hub: str | None, output: Path | None, dataset_dir: Path, force: bool
) -> None:
    """Fetch a public dataset and keep it.

    NAME is a well-known set of `trueup data list`, an entry of your registry, or a hub id. From then on
    `dataset: NAME` in any config reads the copy, with or without a network.

    \b
    trueup data get ultrafeedback
    trueup data get hh_rlhf --hub huggingface --output datasets
    trueup data get argilla/dpo-mix-7k
    """
    from trueup.config.load import chosen_hub

    if name is None:
        raise click.UsageError("name a dataset; `trueup data list` has the well-known ones")
    from trueup.data.fetching import fetch_dataset

    with session.result() as result:
        fetched = fetch_dataset(name, hub or chosen_hub(), output, dataset_dir, force, asked=hub is not None)
        result.data, result.text = fetched.to_dict(), fetched.render()


@data.command(cls=ConfigCommand, context_settings=PASS_ON)
@named_words
@click.option("--rows", type=click.IntRange(1), default=3, show_default=True, help="How many rows to show.")
@click.option("--row", help="Show the row with this number or id.")
@click.option("--html", type=PAGE, help="Write a page instead, with every token's id.")
@force_option
@debug_option
@json_option
@click.pass_obj
def preview(
    session: Session, words: tuple[str, ...], rows: int, row: str | None, html: Path | None, force: bool
) -> None:
    """Show rows as the model will see them.

    Every token of the rendered conversation, coloured by its role in the loss: trained, masked, cut off; and what the
    chat template does. NAME is a dataset or a file; what else is given is the run's config, as for `train`.

    \b
    trueup data preview dpo_en_demo
    trueup data preview pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --cutoff_len 512
    trueup data preview dpo.yaml --row 17 --html row.html
    """
    from trueup.recipes.dataset_views import preview_datasets
    from trueup.recipes.datasets import write_page

    names, source, overrides = split_names(words)
    with session.result() as result:
        shown = preview_datasets(names, source, overrides, rows, row)
        result.data, result.text = shown.to_dict(), shown
        if html:
            write_page(html, shown.page(), force)
            result.data, result.text = {"file": str(html), **result.data}, f"wrote {html}"


@data.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@debug_option
@json_option
@click.pass_obj
def build(session: Session, words: tuple[str, ...]) -> None:
    """Build preference pairs: models answer, a judge ranks.

    Answers come from models here or behind OpenAI-compatible URLs; a judge, rewards, rules or log-probabilities rank
    them. The same command goes on after an interruption, and tries again what failed.

    \b
    trueup data build examples/builtin_build.yaml
    trueup data build --model_name_or_path MODEL --dataset prompts.jsonl --judge_model URL#JUDGE
    """
    cfg = read_config(words, verb="build")
    from trueup.recipes.preferences import build as build_pairs

    with session.result() as result:
        report = build_pairs(cfg)
        result.data, result.text = report.to_dict(), report.render()


@data.command(cls=ConfigCommand, context_settings=PASS_ON)
@named_words
@click.option("--html", type=PAGE, help="Write the report as a page, with histograms.")
@force_option
@debug_option
@json_option
@click.pass_obj
def check(session: Session, words: tuple[str, ...], html: Path | None, force: bool) -> None:
    """Say what would become of every row, without training.

    Rows read, kept, dropped and why, duplicates, reversed pairs; with a model also lengths and what is cut. The exit
    code is 3 where a training would stop; `--on_bad_rows error` stops at every bad row.

    \b
    trueup data check pairs.jsonl
    trueup data check dpo_en_demo alpaca_en_demo --html report.html
    trueup data check dpo.yaml --cutoff_len 1024
    """
    from trueup.recipes.datasets import check_datasets, write_page

    names, source, overrides = split_names(words)
    with session.result() as result:
        report = check_datasets(names, source, overrides)
        result.data, result.text = report.to_dict(), report.render()
        if html:
            write_page(html, report.page(), force)
            result.data, result.text = {"file": str(html), **result.data}, f"{result.text}wrote {html}"


@data.command(cls=ConfigCommand, context_settings=PASS_ON)
@named_words
@debug_option
@json_option
@click.pass_obj
def stats(session: Session, words: tuple[str, ...]) -> None:
    """Show lengths, labels and the balance of sides.

    In tokens with a model, else in characters.

    \b
    trueup data stats dpo_en_demo kto_en_demo
    trueup data stats pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
    """
    from trueup.recipes.datasets import measure_datasets

    names, source, overrides = split_names(words)
    with session.result() as result:
        found = measure_datasets(names, source, overrides)
        result.data, result.text = found.to_dict(), found


@data.command(context_settings=CONTEXT)
@SOURCE
@click.option("--to", "to", required=True, type=click.Choice(TARGETS), help="The format to write.")
@output_option
@force_option
@report_option
@register_option
@dataset_dir_option
@debug_option
@json_option
@click.pass_obj
def convert(
    session: Session, source: str, to: str, output: Path, force: bool, report: Path | None, register: str | None,
    dataset_dir: Path,
) -> None:  # fmt: skip
    """Write a dataset in another format.

    alpaca, sharegpt, openai and trl keep the kind of rows: documents, chats, pairs, rankings, labelled answers.
    pairs, ranking and kto make that kind of others. Every row is read back and compared: one that the format cannot
    say is left out, counted and named.

    \b
    trueup data convert pairs.json --to openai --output pairs.jsonl
    trueup data convert dpo_en_demo --to alpaca --output data/dpo.json --register dpo
    trueup data convert ultrafeedback --to kto --output kto.jsonl --report left_out.json
    """
    from trueup.data.convert import convert as convert_rows

    _write_one(session, lambda: convert_rows(source, to, output, dataset_dir, _hub()), output, report, force, register,
               dataset_dir)  # fmt: skip


@data.command(context_settings=CONTEXT)
@SOURCE
@output_option
@force_option
@report_option
@register_option
@dataset_dir_option
@debug_option
@json_option
@click.pass_obj
def unpair(
    session: Session, source: str, output: Path, force: bool, report: Path | None, register: str | None,
    dataset_dir: Path,
) -> None:  # fmt: skip
    """Write each pair as two labelled answers, for KTO.

    \b
    trueup data unpair dpo_en_demo --output kto.jsonl
    trueup train --stage kto --dataset kto.jsonl --model_name_or_path MODEL
    """
    from trueup.data.convert import convert as convert_rows

    _write_one(session, lambda: convert_rows(source, "kto", output, dataset_dir, _hub()), output, report, force,
               register, dataset_dir)  # fmt: skip


@data.command(context_settings=CONTEXT)
@SOURCE
@output_option
@click.option("--near", type=click.FloatRange(0.3, 1.0), metavar="SIMILARITY",
              help="Drop near duplicates too, from this similarity on: 0.8 is usual.")  # fmt: skip
@click.option("--by", type=click.Choice(["row", "prompt"]), default="row", show_default=True,
              help="Compare whole rows, or their questions only.")  # fmt: skip
@force_option
@report_option
@register_option
@dataset_dir_option
@debug_option
@json_option
@click.pass_obj
def dedup(
    session: Session, source: str, output: Path, near: float | None, by: str, force: bool, report: Path | None,
    register: str | None, dataset_dir: Path,
) -> None:  # fmt: skip
    """Leave out rows that repeat an earlier one.

    \b
    trueup data dedup pairs.jsonl --output unique.jsonl
    trueup data dedup pairs.jsonl --near 0.8 --output unique.jsonl --report dropped.json
    trueup data dedup alpaca.json --by prompt --output unique.json
    """
    from trueup.data.dedup import dedup as drop_duplicates

    _write_one(session, lambda: drop_duplicates(source, output, near, by, dataset_dir, _hub()), output, report, force,
               register, dataset_dir)  # fmt: skip


@data.command(context_settings=CONTEXT)
@SOURCE
@click.option("--val_size", "--val-size", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True,
              help="A share of the rows, or how many.")  # fmt: skip
@click.option("--seed", type=int, default=42, show_default=True, help="Draws the rows.")
@click.option("--output", type=FOLDER, default=Path("."), show_default=True, help="Folder for the two files.")
@click.option("--type", "suffix", type=click.Choice(["jsonl", "json", "parquet", "csv"]), default="jsonl",
              show_default=True, help="Their type.")  # fmt: skip
@force_option
@click.option("--register", is_flag=True, help="Enter both in dataset_info.json, by their names.")
@dataset_dir_option
@debug_option
@json_option
@click.pass_obj
def split(
    session: Session, source: str, val_size: float, seed: int, output: Path, suffix: str, force: bool, register: bool,
    dataset_dir: Path,
) -> None:  # fmt: skip
    """Split rows into a training and an evaluation file.

    Rows with the same question stay on the same side. The files are NAME_train and NAME_eval.

    \b
    trueup data split pairs.jsonl --val_size 0.1
    trueup data split dpo_en_demo --val_size 50 --output data --register
    """
    from trueup.data.split import split as split_rows

    stem = Path(source).stem if Path(source).suffix else Path(source).name
    train, held_out = (output / f"{stem}_{part}.{suffix}" for part in ("train", "eval"))
    names = [train.stem, held_out.stem] if register else []
    with session.result() as result:
        done = write_new(
            lambda: split_rows(source, train, held_out, val_size, seed, dataset_dir, _hub()),
            [train, held_out], None, force, names, dataset_dir,
        )  # fmt: skip
        result.data, result.text = done.to_dict(), done.render()


def _write_one(
    session: Session, make: Callable[[], Outcome], output: Path, report: Path | None, force: bool,
    register: str | None, dataset_dir: Path,
) -> None:  # fmt: skip
    names = [] if register is None else [register or output.stem]
    with session.result() as result:
        done = write_new(make, [output], report, force, names, dataset_dir)
        result.data, result.text = done.to_dict(), done.render()


def _hub() -> str:
    from trueup.config.load import chosen_hub

    return chosen_hub()
