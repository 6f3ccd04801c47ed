"""A server on a real socket, with the built-in model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from trueup.config.load import load_config  # noqa: E402
from trueup.inference.server.app import State  # noqa: E402
from trueup.inference.server.run import address, listen, make_server  # noqa: E402
from trueup.inference.server.served import Served  # noqa: E402
from trueup.inference.server.settings import Settings  # noqa: E402

MODEL = "builtin:sql-tiny"


def load(settings: Settings, *words: str, model: str = MODEL) -> Served:
    """In fp32: in bf16 an answer in a batch may be another one, as other shapes round otherwise."""
    words = (f"model_name_or_path={model}", "bf16=false", *words)
    return Served(load_config(None, words, verb="infer"), settings)


@contextmanager
def serving(settings: Settings, *words: str, served: Served | None = None) -> Iterator[tuple[str, State]]:
    """(base URL, state) of a server that runs until the block ends."""
    if served is None:
        served = load(settings, *words)
    state = State(settings, served)
    server = make_server(state)
    with listen(settings) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address(listener), state
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="session")
def server():
    with serving(Settings(port=0)) as found:
        yield found
        found[1].served.close()


@pytest.fixture(scope="session")
def url(server) -> str:
    return server[0]


@pytest.fixture(scope="session")
def served(server) -> Served:
    return server[1].served
