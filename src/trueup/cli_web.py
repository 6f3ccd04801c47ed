"""`trueup web`. As in `cli.py`, the work is imported when called."""

from __future__ import annotations

from pathlib import Path

import click

from trueup.cli_options import CONTEXT, debug_option, only_text
from trueup.cli_serve import read_key
from trueup.console import Session
from trueup.garbage import importing


@click.command(context_settings=CONTEXT)
@click.option("--host", envvar="GRADIO_SERVER_NAME", default="127.0.0.1", show_default=True,
              help="Address to listen on; beyond the loopback address only with a token.")  # fmt: skip
@click.option("--port", envvar="GRADIO_SERVER_PORT", default=7860, show_default=True, type=click.IntRange(0, 65535),
              help="Port; 0 takes any that is free.")  # fmt: skip
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), default=Path("."), show_default=True,
              help="Directory with data, saves and configs; runs are started in it.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="File with the token that people type; or set API_KEY.")  # fmt: skip
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME",
              help="A name by which browsers reach this server, such as a proxy's; may be given again.")  # fmt: skip
@click.option("--allow-dir", "allowed", multiple=True, type=click.Path(file_okay=False, path_type=Path),
              help="A further directory that configs may name, such as models; may be given again.")  # fmt: skip
@debug_option
@click.pass_obj
def web(
    session: Session, host: str, port: int, root: Path, api_key_file: Path | None, hosts: tuple[str, ...],
    allowed: tuple[Path, ...],
) -> None:  # fmt: skip
    """Open the studio in a browser (webui).

    Data, training, live curves, runs, chat, labelling, evaluation and export. Trainings are processes of their own:
    they go on when the studio ends.

    \b
    trueup web
    trueup web --port 0 --root ~/experiments
    API_KEY=… trueup web --host 0.0.0.0 --allowed-host studio.example.org
    """
    from trueup.inference.server.settings import Limits, Settings

    only_text(session, "web")
    settings = Settings(
        host=host, port=port, key=read_key(api_key_file), hosts=hosts, limits=Limits(headers=32 * 2**10)
    )
    with importing():
        from trueup.web.run import serve

    serve(settings, root, allowed)
