"""The kinds of value a key can take: what a person may write, and what the program then sees.

Values arrive as YAML scalars or as words of a command line, so "5e-7", "true", "a,b" and "none" all
have to mean what they plainly mean. What is refused is what would change meaning by accident: a
boolean where a number belongs (`learning_rate: no`), a number where a boolean does.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EMPTY_WORDS = {"", "none", "null", "~"}
OFF_WORDS = {"no", "off", "false", "none", "null", ""}


def words(text: str) -> list[str]:
    """The words of a text: long lists of names read better so."""
    return text.split()


class Section(BaseModel):
    """A group of keys. The docstring under a field is its help, in docs and forms too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        coerce_numbers_to_str=True,
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value.replace("_", "") if isinstance(value, str) else value


def _split(value: Any) -> Any:
    """Lists are YAML lists, JSON lists or words between commas; one value is a list of one."""
    if value is None or value is False:
        return []
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in EMPTY_WORDS:
            return []
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        return [word.strip().strip("'\"") for word in text.split(",") if word.strip()]
    if isinstance(value, tuple | set):
        return list(value)
    return value if isinstance(value, list) else [value]


def listed(value: Any) -> list[str]:
    """A list as a person may write it, of a key that is not checked yet."""
    return [str(item) for item in _split(value)]


def _pattern_or_split(value: Any) -> Any:
    """As `_split`, but a regular expression with a comma inside braces or brackets stays whole."""
    if isinstance(value, str) and any(mark in value for mark in r"\(|^$*"):
        return [value.strip()]
    return _split(value)


def _mapping(value: Any) -> Any:
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"a JSON object ({error})") from None
    return value


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _off_is_no(value: Any) -> Any:
    """YAML reads a bare `no` as false; for a strategy both mean the word."""
    if value is False or value is None or (isinstance(value, str) and value.lower() in OFF_WORDS):
        return "no"
    return _lower(value)


def _auto_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _on_is_full(value: Any) -> Any:
    """A switch elsewhere, a choice here."""
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "full"):
        return "full"
    if value is None or word in ("", "none", "null", "auto"):
        return "auto"
    return "off" if word in OFF_WORDS else word


def _digits(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def _resume(value: Any) -> Any:
    """transformers takes a boolean here; true means the newest checkpoint."""
    if isinstance(value, bool):
        return "auto" if value else None
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "yes", "auto", "last", "latest"):
        return "auto"
    return None if isinstance(word, str) and word in OFF_WORDS else value


def _whole(value: Any) -> Any:
    """3.0 steps are 3 steps; half a step is a fraction of the run."""
    try:
        number = float(_number(value))
    except TypeError:
        return value
    return int(number) if number.is_integer() else number


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Int, Field(gt=0)]
NonNegative = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Steps = Annotated[int | float, BeforeValidator(_whole), Field(gt=0)]
"""A number of steps, or below 1 a fraction of all of the run's steps."""
AutoFlag = Annotated[bool | None, BeforeValidator(_auto_is_none)]
Names = Annotated[list[str], BeforeValidator(_split)]
Patterns = Annotated[list[str], BeforeValidator(_pattern_or_split)]
Numbers = Annotated[list[Float], BeforeValidator(_split)]
Mapping = Annotated[dict[str, Any], BeforeValidator(_mapping)]
Lower = BeforeValidator(_lower)
Resume = Annotated[str | None, BeforeValidator(_resume)]
OffIsNo = BeforeValidator(_off_is_no)
OnIsFull = BeforeValidator(_on_is_full)
Split = BeforeValidator(_split)
Bits = Annotated[Literal[1, 2, 3, 4, 5, 6, 8], BeforeValidator(_digits)]
