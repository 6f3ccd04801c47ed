"""How answers are drawn, from the config at first and from `/set` afterwards."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from trueup.config.schema import RunConfig
from trueup.rollout.engines import Sampling

#: what `/set` knows → what it is.
SETTINGS: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_new_tokens": int,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "seed": int, "stop": str,
}  # fmt: skip
_SAME = {"max_tokens": "max_new_tokens", "max_length": "max_new_tokens", "temp": "temperature"}
_NOTHING = ("none", "null", "off")  # of a seed or a stop text


def sampling_of(cfg: RunConfig) -> Sampling:
    """The config's generation keys, as the engine takes them; a seed only where one is asked for."""
    keys = cfg.generate
    return Sampling(
        temperature=keys.temperature if keys.do_sample else 0.0,
        top_p=keys.top_p,
        top_k=keys.top_k,
        repetition_penalty=keys.repetition_penalty,
        max_new_tokens=keys.max_new_tokens,
        seed=cfg.train.seed if "seed" in cfg.explicit else None,
    )


def changed(sampling: Sampling, words: str) -> Sampling:
    """After `temperature 0.3` or `temperature=0.3`. Raises ValueError with a sentence for people."""
    name, _, value = words.replace("=", " ", 1).strip().partition(" ")
    name, value = _SAME.get(name, name), value.strip()
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        raise ValueError(f"there is no setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if not value:
        raise ValueError(f"say what {name} is to be: /set {name} VALUE")
    return replace(sampling, **{name: _read(name, value)})


def _read(name: str, value: str) -> Any:
    if name in ("seed", "stop") and value.lower() in _NOTHING:
        return None if name == "seed" else ()
    if name == "stop":
        return (value.replace("\\n", "\n"),)
    kind = SETTINGS[name]
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} is a {'whole ' if kind is int else ''}number, and not {value!r}") from None


def shown(sampling: Sampling) -> list[tuple[str, str]]:
    """Every setting and its value."""
    return [(name, _word(getattr(sampling, name))) for name in SETTINGS]


def _word(value: Any) -> str:
    if value in (None, ()):
        return "none"
    return repr(value[0]) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
