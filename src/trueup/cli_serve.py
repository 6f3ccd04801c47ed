"""`trueup serve`. As in `cli.py`, the work is imported when called."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from trueup.cli_options import PASS_ON, ConfigCommand, config_words, debug_option, only_text, read_config, read_given
from trueup.console import Session
from trueup.errors import ConfigError
from trueup.garbage import importing

log = logging.getLogger("trueup")


@click.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@click.option("--host", envvar="API_HOST", default="127.0.0.1", show_default=True,
              help="Address to listen on; beyond the loopback address only with a token.")  # fmt: skip
@click.option("--port", envvar="API_PORT", default=8000, show_default=True, type=click.IntRange(0, 65535),
              help="Port; 0 takes any that is free.")  # fmt: skip
@click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="File with the token that clients bring; or set API_KEY.")  # fmt: skip
@click.option("--name", envvar="API_MODEL_NAME", default=None, help="Id of the model; else its hub id or directory.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR",
              help="A further LoRA on the same base, under its own id; may be given again.")  # fmt: skip
@click.option("--reward-model", "reward_models", multiple=True, metavar="DIR",
              help="A reward model for /v1/score; may be given again.")  # fmt: skip
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME",
              help="A name by which clients reach this server, such as a proxy's; may be given again.")  # fmt: skip
@click.option("--slots", envvar="MAX_CONCURRENT", default=32, show_default=True, type=click.IntRange(1, 4096),
              help="Answers under way at the same time.")  # fmt: skip
@click.option("--queue", default=256, show_default=True, type=click.IntRange(0, 100_000),
              help="Requests waiting; beyond, clients are told to come again (429).")  # fmt: skip
@click.option("--deadline", default=600.0, show_default=True, type=click.FloatRange(0.001),
              help="Seconds that a request may take.")  # fmt: skip
@click.option("--drain", default=30, show_default=True, type=click.IntRange(1, 86_400),
              help="Seconds that requests get to end after SIGTERM or Ctrl-C.")  # fmt: skip
@click.option("--engine", type=click.Choice(["transformers", "vllm"]), default=None,
              help="vllm, or infer_backend: vllm, hands over to vLLM's own server; else transformers.")  # fmt: skip
@click.option("--while-stdin", is_flag=True,
              help="End when standard input ends: for programs that start this one.")  # fmt: skip
@debug_option
@click.pass_obj
def serve(
    session: Session, words: tuple[str, ...], host: str, port: int, api_key_file: Path | None, name: str | None,
    adapters: tuple[str, ...], reward_models: tuple[str, ...], hosts: tuple[str, ...], slots: int, queue: int,
    deadline: float, drain: int, engine: str | None, while_stdin: bool,
) -> None:  # fmt: skip
    """Serve models to OpenAI's clients (api).

    The model with its adapters, and the base beside it, each under an id. Generation keys of the config are what
    requests get that say nothing.

    \b
    trueup serve --model_name_or_path MODEL --adapter_name_or_path DIR
    trueup serve --model_name_or_path MODEL --adapter dpo=saves/dpo --adapter kto=saves/kto
    API_KEY=… trueup serve --model_name_or_path MODEL --host 0.0.0.0
    """
    from trueup.inference.server.settings import Limits, Settings

    only_text(session, "serve")
    settings = Settings(
        host=host, port=port, key=read_key(api_key_file), hosts=hosts, name=name, adapters=_named(adapters),
        reward_models=reward_models, limits=Limits(slots=slots, queue=queue, deadline=deadline, drain=drain),
    )  # fmt: skip
    by_vllm = engine == "vllm" or (engine is None and _asks_for_vllm(words))
    # Here the key has chosen the server already; to other verbs it is a backend that they do not have.
    cfg = read_config([*words, "infer_backend=huggingface"] if by_vllm else words, verb="infer")
    if by_vllm:
        if while_stdin:
            raise ConfigError("vLLM's server does not look at standard input", where="--while-stdin", fix="drop it")
        with importing():
            from trueup.inference.server.vllm_server import hand_over
        hand_over(cfg, settings)
        return
    with importing():
        from trueup.inference.server.run import serve as start
    start(cfg, settings, sys.stdin.buffer if while_stdin else None)


def _asks_for_vllm(words: Sequence[str]) -> bool:
    """Whether the config says so, as LLaMA-Factory's `api` has it."""
    return str(read_given(words).get("infer_backend", "")).lower() == "vllm"


def read_key(file: Path | None) -> str | None:
    """The token in a file, or in API_KEY. Raises ConfigError."""
    if file is None:
        return os.environ.get("API_KEY") or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}", where="--api-key-file") from error
    if not key:
        raise ConfigError(f"{file} is empty", where="--api-key-file", expected="a token")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        log.warning("others on this machine may read %s; `chmod 600` keeps the token from them", file)
    return key


def _named(adapters: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in adapters:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{text!r} names no adapter", where="--adapter", expected="NAME=DIR")
        if name in found:
            raise ConfigError(f"two adapters are called {name!r}", where="--adapter", fix="give it another name")
        found[name] = path
    return found
