"""The program, with every message to a browser late by up to STUDIO_TEST_LATE seconds.

What a test (or a person) sees may then be followed much later by what belongs to it: an address, a dialog's end, a
button that took another's place. Run as `STUDIO_TEST_LATE=0.8 pytest tests/web`.
"""

from __future__ import annotations

import asyncio
import os
import random

from nicegui.outbox import Message, Outbox

from trueup.cli import main

SECONDS = float(os.environ["STUDIO_TEST_LATE"])
emit = Outbox._emit


async def emit_late(self: Outbox, message: Message) -> None:
    await asyncio.sleep(random.random() * SECONDS)
    await emit(self, message)


Outbox._emit = emit_late
main()
