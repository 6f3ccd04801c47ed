"""Where a server listens, whom it answers, and how much it takes on. Loads no torch and no server."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trueup.errors import ConfigError, Problem

SHORT_KEY = 16  # characters; a shorter key can be guessed
_NEW_KEY = "API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')"


@dataclass(frozen=True)
class Limits:
    """What a request may bring, and how much happens at the same time.

    Attributes:
        slots, queue: answers under way, and waiting; beyond, requests are told 429.
        requests: open at the same time, of any kind; beyond, 503.
        deadline: seconds that a request may take. drain: seconds that requests under way get when the server ends.
        body, headers: bytes. upload: seconds for a body to arrive.
        messages, prompts, choices, stops, alternatives: how many of each in a request.
    """

    slots: int = 32
    queue: int = 256
    requests: int = 1024
    deadline: float = 600.0
    drain: float = 30.0
    body: int = 2 * 2**20
    headers: int = 16 * 2**10
    upload: float = 30.0
    messages: int = 512
    prompts: int = 256
    choices: int = 16
    stops: int = 16
    alternatives: int = 20


@dataclass(frozen=True)
class Settings:
    """A server.

    Attributes:
        key: the token that every request has to bring; None: nobody is asked, on the loopback address only.
        hosts: names by which browsers may reach it, beside its own.
        name: the id of the model as it is loaded; None: by its directory or hub id.
        adapters: further ones, by id. reward_models: directories or hub ids, for /v1/score.

    Raises:
        ConfigError: beyond the loopback address without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    hosts: Sequence[str] = ()
    name: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    reward_models: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.loopback and not self.key:
            raise ConfigError(
                [
                    Problem(
                        f"anybody who reaches {self.host} could use this server", where="--host",
                        expected="a token beyond the loopback address",
                        fix=f"set one: {_NEW_KEY}, or serve on 127.0.0.1",
                    )
                ]
            )  # fmt: skip

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or (is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)

    def answers_to(self, host: str) -> bool:
        """Whether a Host header may be answered.

        A page that rebinds its own name to this machine sends that name: so names have to be known, and beyond the
        loopback address any number is fine.
        """
        name = host_name(host)
        if is_address(name):
            return not self.loopback or ipaddress.ip_address(name).is_loopback
        known = {"localhost", self.host.lower(), *(known.lower() for known in self.hosts)}
        if not self.loopback:
            known |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in known


def host_name(host: str) -> str:
    """`name` of `name`, `name:port` or `[::1]:port`, in lower case; "" for what is none of these."""
    name, _, port = host.rpartition(":") if host[-1:].isdigit() and not host.endswith("]") else (host, "", "")
    if host.count(":") == 0:
        name, port = host, ""
    if port and not port.isdigit():
        return ""
    return name.strip("[]").lower().rstrip(".")


def is_address(name: str) -> bool:
    """Whether this is an IP address, not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
