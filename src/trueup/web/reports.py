"""Data reports for pages: made in a process of its own, kept until the data change.

Large data have a `trueup data check` to themselves; small ones are counted by the process that shows tokens, which is
there already. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import trueup
from trueup.training import durable
from trueup.web.jobs import Jobs
from trueup.web.rows import Table, signature
from trueup.web.tokens import tokens_of

_SECONDS = 1800.0
_MOST = 100
_SMALL_BYTES = 2 * 2**20


async def report_of(jobs: Jobs, table: Table, words: Sequence[str]) -> dict[str, Any]:
    """What `trueup data check NAME …` says of a dataset, as `Jobs.run_json` has it; from an earlier time if it is that
    of the same files, the same words and the same program.
    """
    facts = [trueup.__version__, repr(table.spec), repr(signature(table.files)), *words]
    key = blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
    folder = jobs.workspace.private("reports")
    kept = folder / f"{key}.json"
    try:
        return durable.read_json(kept)
    except (OSError, ValueError):
        size = sum(file.size or 0 for file in table.files)
        if size < _SMALL_BYTES:
            said = await tokens_of(jobs.workspace.root).report(table.spec.name, words)
        else:
            said = await jobs.run_json(["data", "check", table.spec.name, *words], _SECONDS)
    if said.get("ok"):
        durable.write_json(kept, said, indent=None, sync=False)
        for old in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_MOST]:
            old.unlink(missing_ok=True)
    return said
