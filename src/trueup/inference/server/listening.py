"""A socket that listens, and an end without noise: for every server of ours. Torch-free."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from trueup.errors import ResourceError
from trueup.inference.server.settings import Settings


def listen(settings: Settings) -> socket.socket:
    """A socket that listens. Raises ResourceError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        owner = who_listens(settings.port)
        raise ResourceError(
            f"cannot listen on {settings.host}:{settings.port}: {error}" + (f": {owner}" if owner else ""),
            where="--port", fix="another --port; 0 takes any that is free",
        ) from error  # fmt: skip


def who_listens(port: int) -> str | None:
    """The process that has a port, as far as this user may see it: `it belongs to nginx (pid 17)`."""
    try:
        owners = [one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr[1] == port]
        found = next(pid for pid in owners if pid)
        return f"it belongs to {psutil.Process(found).name()} (pid {found})"
    except (psutil.Error, OSError, StopIteration):
        return None


def base_url(listener: socket.socket) -> str:
    """Where it is reached: `http://host:port`."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def ends_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, when all is done; here it has no more to say."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {one: signal.signal(one, lambda *_: None) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
