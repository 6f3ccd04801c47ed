"""The verbs of `trueup data`. As in `cli.py`, each imports its work when called."""

from __future__ import annotations

import click

from trueup.cli_options import CONTEXT, Verbs, debug_option, json_option


@click.group(cls=Verbs, context_settings=CONTEXT, no_args_is_help=True)
@debug_option
@json_option
def data() -> None:
    """Look at datasets, get, convert, clean and split them."""
