"""Whether Hugging Face's hub answers, found out in seconds: its own clients try again for up to a minute.

Where it does not, its libraries are told to take what they have kept, and to complain at once about the rest.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

log = logging.getLogger("trueup")

_SECONDS = 5.0  # for somebody to answer
_FRESH_SECONDS = 60.0  # so long an answer, or none, is believed
_seen: dict[str, tuple[float, str | None]] = {}  # endpoint → when it was tried, and why nothing came of it


def mind_the_hub() -> None:
    """To be called before something is fetched. `HF_HUB_OFFLINE`, if it is set, has the last word."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
        return
    from huggingface_hub import constants

    why = trouble_with(constants.ENDPOINT)
    if why and not constants.HF_HUB_OFFLINE:
        log.warning("%s does not answer (%s): only what is on this machine can be used", constants.ENDPOINT, why)
    constants.HF_HUB_OFFLINE = bool(why)


def trouble_with(endpoint: str) -> str | None:
    """Why nobody can be reached there, directly or by the proxy that the environment names; None if somebody can."""
    tried, why = _seen.get(endpoint, (-_FRESH_SECONDS, None))
    if time.monotonic() - tried > _FRESH_SECONDS:
        why = _connect(_way_to(endpoint))
        _seen[endpoint] = time.monotonic(), why
    return why


def _way_to(endpoint: str) -> str:
    """The address that is connected to: a proxy's, if there is one."""
    parts, proxies = urlsplit(endpoint), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy and not proxy_bypass(parts.hostname or "") else endpoint


def _connect(address: str) -> str | None:
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
