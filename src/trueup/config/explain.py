"""Keys in a reader's words: help on one key, all their names, errors as plain sentences."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from trueup.config.methods import ACTS_WITH, LATER, LATER_VALUES, OTHER_VERBS, SET
from trueup.config.names import IDLE, REFUSED, SWITCHES, SYNONYMS, idle_words
from trueup.config.schema import FIELDS, SECRETS, SECTION_OF, default, kinds

#: why a range is what it is, where that is not plain from the key.
REASONS: dict[str, str] = {
    "pref_beta": "at 0 nothing ties the model to its reference",
    "dpo_label_smoothing": "at 0.5 half of the labels are taken to be wrong",
    "cutoff_len": "shorter examples have no room for a prompt and an answer",
    "lora_dropout": "at 1 nothing passes through the adapter",
    "val_size": "a share below 1, or a number of rows",
    "learning_rate": "at 0 nothing is learnt",
    "lora_rank": "the adapter's matrices have this width",
    "device": "auto, cpu, cuda, cuda:N or mps",
}
_MOST_CHOICES = 5
#: what `LATER`'s texts begin with when they name something to do, not something to use.
_DOES = ("drop", "convert", "export", "upload")
_LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "string": "text",
    "list": "a list, or words between commas",
    "dict": "a mapping",
}


def known_keys() -> list[str]:
    """All canonical keys, for completion."""
    return list(FIELDS)


def nearest(name: str) -> str | None:
    """The key a misspelt name was probably meant to be; a synonym's canonical key."""
    candidates = [*FIELDS, *SYNONYMS, *SWITCHES, *REFUSED, *IDLE]
    found = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.75)
    return SYNONYMS.get(found[0], found[0]) if found else None


def choices(key: str) -> list[str]:
    """The values a key may take, if they are a closed set."""
    if key in ("stage", "pref_loss", "optim"):
        return list(LATER_VALUES[key])
    return [str(value) for value in _literals(FIELDS[key].annotation)]


def _literals(annotation: Any) -> list[Any]:
    found = []
    for kind in kinds(annotation):
        if kind is Literal:
            found += _literal_values(annotation)
        elif kind is list:
            found += [v for part in get_args(annotation) for v in _literals(part)]
    return found


def _literal_values(annotation: Any) -> list[Any]:
    if getattr(annotation, "__origin__", None) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) if part is not None for value in _literal_values(part)]


def describe_error(key: str, error: Any, value: Any) -> tuple[str, str]:
    """What is wrong with a value, and what was expected, from one of pydantic's error records."""
    kind = error["type"]
    shown = "this value" if key in SECRETS else repr(value)
    expected = _expected(key, kind, error.get("ctx", {}))
    if key in REASONS and kind in _LIMITS:
        expected += f" ({REASONS[key]})"
    return f"`{key}` cannot be {shown}", expected


def _expected(key: str, kind: str, context: dict[str, Any]) -> str:
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{words} {context[name]}"
    if kind == "literal_error":
        return "one of " + ", ".join(choices(key))
    if kind == "value_error":
        return str(context.get("error", "another value"))
    if kind == "string_pattern_mismatch":
        return REASONS.get(key, "another form of word")
    if kind == "finite_number":
        return "a finite number"
    kind = kind.split("_")[0]
    example = default(key)
    such_as = f", such as {example}" if kind in ("int", "float") and isinstance(example, int | float) else ""
    return _TYPES.get(kind, "another kind of value") + such_as


def closest_choice(key: str, value: Any) -> str | None:
    """The allowed value nearest to a misspelt one."""
    found = difflib.get_close_matches(str(value).lower(), choices(key), n=1)
    return found[0] if found else None


def condition_words(other: str, allowed: Any) -> str:
    """A condition of `ACTS_WITH` in words: the values there are now, if there are any."""
    if allowed is SET:
        return f"`{other}`" + (", which is not supported yet" if other in LATER else "")
    later = LATER_VALUES.get(other, {})
    now = [value for value in allowed if not later.get(value)]
    shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in now or allowed]
    if len(shown) > _MOST_CHOICES:
        shown = [*shown[:_MOST_CHOICES], "…"]
    missing = "" if now and other not in LATER else ", which is not supported yet"
    return f"`{other}: {' | '.join(shown)}`" + missing


def alternative(instead: str) -> str:
    """What to do in place of something not supported yet."""
    return instead if instead.partition(" ")[0] in _DOES else f"use {instead}"


def explain(key: str) -> str:
    """Help on a key: what it does, its values, its default, when it acts, what others call it."""
    key = SYNONYMS.get(key, key)
    if key in SWITCHES:
        ours, value = SWITCHES[key]
        return f"{key}: the same as {ours}: {value}"
    if key in REFUSED:
        return f"{key}: not taken: {REFUSED[key].reason}"
    if key in IDLE:
        return f"{key}: accepted, " + idle_words(key).partition("` ")[2]
    if key not in FIELDS:
        near = nearest(key)
        return f"{key}: unknown" + (f"; did you mean {near}?" if near else "")
    lines = [f"{key} ({SECTION_OF[key]}): {FIELDS[key].description}"]
    lines.append(f"  default: {'unset' if default(key) in (None, []) else default(key)}")
    if choices(key):
        later = LATER_VALUES.get(key, {})
        lines.append("  values: " + ", ".join(f"{v} (not yet)" if later.get(v) else v for v in choices(key)))
    lines += [f"  acts with {condition_words(*item)}" for item in ACTS_WITH.get(key, {}).items()]
    if key in OTHER_VERBS:
        lines.append(f"  belongs to `trueup {OTHER_VERBS[key]}`, not to a training")
    if key in LATER:
        lines.append(f"  not supported yet; {alternative(LATER[key])}")
    others = [name for name, ours in SYNONYMS.items() if ours == key]
    if others:
        lines.append("  also: " + ", ".join(others))
    return "\n".join(lines)
