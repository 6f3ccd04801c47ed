"""What the studio and a browser have agreed on, seen without one."""

from __future__ import annotations

import json
import urllib.request


def test_a_browser_may_be_busy_for_a_while(studio):
    """A training on the same machine keeps it from answering; its page must not begin anew for that."""
    address = f"{studio.url}/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    with urllib.request.urlopen(address, timeout=60) as answer:
        agreed = json.loads(answer.read().decode("utf-8")[1:])
    assert agreed["pingTimeout"] >= 15_000
