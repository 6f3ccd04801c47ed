"""Rows as tokens, asked of a process (recipes/token_worker.py) that stays as long as somebody looks. Torch-free."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.web.jobs import environment

_SECONDS = 180.0
_LINE_BYTES = 64 * 2**20


class Tokens:
    """The process, begun with the first question and again if it has ended; one question at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()

    async def row(self, dataset: str, row: int, words: Sequence[str]) -> dict[str, Any]:
        """A row as `token_worker.answer` tells it."""
        return await self._told({"dataset": dataset, "row": row, "words": list(words)})

    async def report(self, dataset: str, words: Sequence[str]) -> dict[str, Any]:
        """The report on a small dataset, as `trueup data check --json` has it."""
        return await self._told({"dataset": dataset, "words": list(words)})

    async def _told(self, asked: dict[str, Any]) -> dict[str, Any]:
        question = json.dumps(asked) + "\n"
        async with self._asking:
            for _ in range(2):  # one that has ended, as idle ones do, is begun again
                try:
                    return await asyncio.wait_for(self._ask(question.encode()), _SECONDS)
                except (TimeoutError, OSError, ValueError):
                    self.end()
                except asyncio.CancelledError:  # whoever asked has left: the answer must not be the next one's
                    self.end()
                    raise
        return {"ok": False, "problems": [{"what": "the tokens did not come: the process that makes them ends"}]}

    async def _ask(self, question: bytes) -> dict[str, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "trueup.recipes.token_worker", cwd=self.root, env=environment(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES,
            )  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(question)
        await process.stdin.drain()
        return json.loads(await process.stdout.readline())

    def end(self) -> None:
        """Let the process go."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()


_kept: dict[Path, Tokens] = {}


def tokens_of(root: Path) -> Tokens:
    """The one of a workspace."""
    return _kept.setdefault(root, Tokens(root))
