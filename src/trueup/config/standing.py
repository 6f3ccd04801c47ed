"""What becomes of a key: it acts, asks for what holds anyway, or is refused; for the docs' tables and their tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trueup.config.explain import alternative
from trueup.config.exporting import IN_EXPORTS
from trueup.config.methods import ACTS_WITH, LATER, LATER_VALUES, NOT_ACTING_YET, OTHER_VERBS, SET
from trueup.config.names import IDLE, REFUSED, SWITCHES, SYNONYMS
from trueup.config.schema import FIELDS


@dataclass(frozen=True)
class Standing:
    """`words` say under which name a key acts, with which verb, or why it does not."""

    state: Literal["acts", "holds anyway", "refused"]
    words: str = ""


def standing(name: str) -> Standing:
    """The standing of a key under any of its names.

    Raises:
        KeyError: nobody knows the name.
    """
    if name in SWITCHES:
        key, value = SWITCHES[name]
        shown = ",".join(value) if isinstance(value, list) else str(value).lower()
        return Standing("acts", f"read as `{key}: {shown}`")
    if name in REFUSED:
        return Standing("refused", REFUSED[name].reason)
    if name in IDLE:
        return Standing("holds anyway", IDLE[name])
    key = SYNONYMS.get(name, name)
    if key not in FIELDS:
        raise KeyError(name)
    if key in NOT_ACTING_YET:
        return Standing("holds anyway", NOT_ACTING_YET[key])
    if key in LATER and key not in IN_EXPORTS:
        return Standing("refused", f"not supported yet; {alternative(LATER[key])}")
    if parent := _refused_parent(key):
        return Standing("refused", f"acts with `{parent}`, which is not supported yet")
    said = [f"read as `{key}`"] if key != name else []
    said += ["with `trueup export`; refused with other verbs"] if key in IN_EXPORTS else []
    said += [f"with `trueup {OTHER_VERBS[key]}`"] if key in OTHER_VERBS.keys() - IN_EXPORTS else []
    later = [value for value, instead in LATER_VALUES.get(key, {}).items() if instead]
    said += [f"its values {', '.join(f'`{v}`' for v in later)} are refused with what to use instead"] if later else []
    return Standing("acts", "; ".join(said))


def _refused_parent(key: str) -> str | None:
    """A key that this one needs and nobody can set."""
    for other, allowed in ACTS_WITH.get(key, {}).items():
        if other == "infer_backend":  # vLLM's own server reads these keys: trueup serve --engine vllm
            continue
        later = LATER_VALUES.get(other, {})
        if other in LATER or (allowed is not SET and all(later.get(value) for value in allowed)):
            return other if other in LATER else f"{other}: {allowed[0]}"
    return None
