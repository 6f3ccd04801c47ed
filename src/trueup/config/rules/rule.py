"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Keys that exclude or need each other. `broken` sees all keys as attributes."""

    keys: tuple[str, ...]
    broken: Callable[[Any], Any]
    what: str
    fix: str
