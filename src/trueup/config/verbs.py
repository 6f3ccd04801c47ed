"""What a verb with a table of its own reads of a config: keys that do nothing there are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trueup.config.methods import OTHER_VERBS, SET, holds
from trueup.config.schema import SECTION_OF, RunConfig, default
from trueup.config.values import words
from trueup.errors import Problem

#: rows of keys → the conditions under which a verb reads them.
Rows = Iterable[tuple[str, Mapping[str, Any]]]


def read_with(rows: Rows) -> dict[str, Mapping[str, Any]]:
    """Key → the values that other keys need for it to act."""
    return {key: needs for row, needs in rows for key in words(row)}


def section_keys(section: str) -> str:
    """The keys of a section, but for those of other verbs."""
    return " ".join(key for key, of in SECTION_OF.items() if of == section and key not in OTHER_VERBS)


def without_effect(
    cfg: RunConfig,
    place: Callable[[str], str | None],
    bad: set[str],
    verb: str,
    reads: Mapping[str, Mapping[str, Any]],
    passes: Callable[[str], bool] = lambda key: False,
) -> list[Problem]:
    """Keys the user set that a verb does not read, or not with the other keys as they are.

    Args:
        reads: the verb's table, of `read_with`.
        passes: which unread keys are let pass: those of a file that holds a whole run.
    """
    found = []
    for key in sorted(cfg.explicit - bad, key=list(SECTION_OF).index):
        if cfg[key] == default(key) and cfg[key] in (None, False, [], {}, 0):
            continue
        if key not in reads:
            if not passes(key):
                found.append(Problem(f"`{key}` does nothing in `trueup {verb}`", place(key), fix="drop it"))
            continue
        for other, allowed in reads[key].items():
            if other not in bad and not holds(cfg[other], allowed):
                now = f"`{other}: {_word(cfg[other])}`" if cfg[other] not in (None, []) else f"no `{other}`"
                acts = f"`{other}`" if allowed is SET else f"`{other}: {' | '.join(map(str, allowed))}`"
                found.append(
                    Problem(f"`{key}` has no effect with {now}", place(key), fix=f"drop it; it acts with {acts}")
                )
                break
    return found


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
