"""The verbs of `trueup data`. As in `cli.py`, each imports its work when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

FOLDER = click.Path(file_okay=False, path_type=Path)
HUBS = click.Choice(["huggingface", "modelscope", "modelers"])

dataset_dir_option = click.option(
    "--dataset_dir", "--dataset-dir", type=FOLDER, default=Path("data"), show_default=True,
    help="Folder with dataset_info.json.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


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
    from trueup.recipes.datasets import preview_datasets, write_page

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
