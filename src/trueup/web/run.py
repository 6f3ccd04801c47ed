"""`trueup web`, from its settings to the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from trueup.errors import ConfigError, ModelError
from trueup.inference.server.settings import SHORT_KEY, Settings

try:
    import nicegui  # noqa: F401
    import uvicorn
except ImportError as error:
    raise ModelError(
        f"the studio needs {error.name}, which is not installed", where="web", fix="pip install 'trueup[web]'"
    ) from error

# What NiceGUI may look for and load on its own: none of it is ours, and each costs a second of the start.
os.environ.setdefault("MATPLOTLIB", "false")

from trueup.inference.server.listening import base_url, ends_quietly, listen  # noqa: E402
from trueup.web.app import make_app  # noqa: E402
from trueup.web.workspace import Workspace  # noqa: E402

log = logging.getLogger("trueup")


def serve(settings: Settings, root: Path, allowed: Sequence[Path] = ()) -> None:
    """Listen and answer until SIGINT or SIGTERM. Trainings go on.

    Raises:
        ConfigError: there is no such directory. ResourceError: the address cannot be had.
    """
    if not root.is_dir():
        raise ConfigError(f"there is no directory {root}", where="--root")
    if settings.key and len(settings.key) < SHORT_KEY:
        log.warning("the token has %d characters: a short one can be guessed", len(settings.key))
    workspace = Workspace(root, allowed)
    os.chdir(workspace.root)  # as its children: what a config names is the same there and here
    listener = listen(settings)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(settings, workspace), http="h11", ws="auto", lifespan="on", log_config=None,
            log_level="error", access_log=False, server_header=False, proxy_headers=False,
            h11_max_incomplete_event_size=settings.limits.headers, timeout_graceful_shutdown=2,
        )
    )  # fmt: skip
    with listener, ends_quietly():
        log.info("the studio is at %s", base_url(listener))
        server.run(sockets=[listener])
