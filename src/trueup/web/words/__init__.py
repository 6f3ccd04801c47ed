"""What the studio says, in each language: `<page>.json` holds {key: {language: text}}.

The help of keys (`keys_help.json`) is in English the schema's own, unless it is said in other words here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "zh": "中文"}
DEFAULT = "en"
Table = dict[str, dict[str, str]]


@cache
def tables() -> dict[str, Table]:
    """Every table by the name of its file."""
    files = sorted(Path(__file__).parent.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def find(key: str, language: str) -> str | None:
    """The text of `table.key`, or None."""
    table, _, name = key.partition(".")
    entry = tables().get(table, {}).get(name)
    return entry.get(language) if entry else None


def say(key: str, language: str, **values: object) -> str:
    """The text of `table.key` with its blanks filled. Raises KeyError for a key that no table has."""
    found = find(key, language)
    if found is None:
        raise KeyError(f"no word {key!r}")
    return found.format(**values) if values else found


def preferred(accept_language: str) -> str:
    """The language of a browser's Accept-Language header that we speak."""
    for part in accept_language.lower().split(","):
        name = part.partition(";")[0].strip()[:2]
        if name in LANGUAGES:
            return name
    return DEFAULT
