"""What people write beside a run: tags, a note, whether it is put away. In the run's own `logs/`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trueup.training import durable

FILE = Path("logs/remarks.json")
_MOST_TAGS, _LONGEST_TAG, _LONGEST_NOTE = 20, 40, 4000


@dataclass(frozen=True)
class Remarks:
    """What is written beside one run."""

    tags: tuple[str, ...] = ()
    note: str = ""
    archived: bool = False


def read_remarks(run: Path) -> Remarks:
    """A run's remarks; none where there is no file, or one that cannot be read."""
    try:
        found = durable.read_json(run / FILE)
    except (OSError, ValueError):
        return Remarks()
    if not isinstance(found, dict):
        return Remarks()
    tags = found.get("tags")
    return Remarks(
        tags=tidy(map(str, tags)) if isinstance(tags, list) else (),
        note=str(found.get("note") or ""),
        archived=found.get("archived") is True,
    )


def write_remarks(run: Path, remarks: Remarks) -> None:
    """Keep remarks of a run that exists."""
    (run / FILE).parent.mkdir(exist_ok=True)
    kept = {**asdict(remarks), "tags": list(tidy(remarks.tags)), "note": remarks.note[:_LONGEST_NOTE]}
    durable.write_json(run / FILE, kept, sync=False)


def tidy(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags without blanks around them, each once, in their order."""
    trimmed = (" ".join(tag.split())[:_LONGEST_TAG] for tag in tags)
    return tuple(dict.fromkeys(filter(None, trimmed)))[:_MOST_TAGS]
