"""The verbs of `trueup data`. As in `cli.py`, each imports its work when called."""

from __future__ import annotations

from pathlib import Path

import click

from trueup.cli_options import CONTEXT, Verbs, debug_option, json_option
from trueup.console import Session

FOLDER = click.Path(file_okay=False, path_type=Path)
HUBS = click.Choice(["huggingface", "modelscope", "modelers"])

dataset_dir_option = click.option(
    "--dataset_dir", "--dataset-dir", type=FOLDER, default=Path("data"), show_default=True,
    help="Folder with dataset_info.json.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


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
