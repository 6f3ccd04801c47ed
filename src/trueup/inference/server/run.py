"""`trueup serve`, from a config to the end of the last request."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import BinaryIO

from trueup.config.schema import RunConfig
from trueup.errors import ModelError
from trueup.inference.server.listening import base_url, ends_quietly, listen
from trueup.inference.server.settings import SHORT_KEY, Settings
from trueup.models.allocator import stay_small

try:
    import uvicorn

    from trueup.inference.server.app import State, make_app
    from trueup.inference.server.served import Served
except ImportError as error:
    if error.name not in ("fastapi", "uvicorn", "starlette"):
        raise
    raise ModelError(
        f"serving needs {error.name}, which is not installed", where="serve", fix="pip install 'trueup[serve]'"
    ) from error

log = logging.getLogger("trueup")

LAST_WORDS = 5  # seconds beyond the drain, for answers that were cut short to say so


def serve(cfg: RunConfig, settings: Settings, while_open: BinaryIO | None = None) -> None:
    """Listen at once, load, and answer until SIGINT or SIGTERM; then end what is under way, and return.

    Args:
        while_open: end when this stream ends, too: it is held by the program that started this one.

    Raises:
        ResourceError: the address cannot be had. Whatever keeps the model from being loaded.
    """
    if settings.key and len(settings.key) < SHORT_KEY:
        log.warning("the API key has %d characters: a short one can be guessed", len(settings.key))
    state = State(settings)
    server = make_server(state, state.drain)
    listener = listen(settings)
    stay_small()
    failed: list[BaseException] = []

    def load() -> None:
        try:
            state.served = Served(cfg, settings)
        except BaseException as error:  # told on the main thread
            failed.append(error)
            server.should_exit = True
        else:
            log.info("serving %s on %s", ", ".join(state.served.ids), address(listener))

    def attend(stream: BinaryIO) -> None:
        while os.read(stream.fileno(), 4096):  # past the stream's own lock, with which the program could not end
            pass
        server.should_exit = True

    with listener, ends_quietly():
        threading.Thread(target=load, name="trueup-load", daemon=True).start()
        if while_open is not None:
            threading.Thread(target=attend, args=(while_open,), name="trueup-attend", daemon=True).start()
        try:
            server.run(sockets=[listener])
        finally:
            if state.served is not None:
                state.served.close()
    if failed:
        raise failed[0]


class Server(uvicorn.Server):
    """uvicorn's, which says when its end begins: connections are then taken no more, and answers go on."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=self._ending, name="trueup-drain", daemon=True).start()
        await super().shutdown(sockets)


def make_server(state: State, ending: Callable[[], None] = lambda: None) -> Server:
    """uvicorn, with our limits and without its chatter: requests are not logged."""
    limits = state.settings.limits
    return Server(
        uvicorn.Config(
            make_app(state),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.headers,
            timeout_graceful_shutdown=int(limits.drain) + LAST_WORDS,
        ),
        ending,
    )


def address(listener: socket.socket) -> str:
    """The URL that clients are given."""
    return f"{base_url(listener)}/v1"
