"""`trueup chat`: talk to a model, or to several side by side; on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from trueup.config.schema import RunConfig, default
from trueup.console import console as make_console
from trueup.data.examples import Message
from trueup.errors import ConfigError, Problem
from trueup.inference.chat.conversation import Conversation
from trueup.inference.chat.lines import questions
from trueup.inference.chat.pairs import PairFile
from trueup.inference.chat.screen import Screen
from trueup.inference.chat.settings import sampling_of
from trueup.inference.chat.sides import Side, load_sides

__all__ = ["PREFERENCES", "Conversation", "Message", "Side", "chat", "load_sides", "sampling_of"]

PREFERENCES = "chat_preferences.jsonl"  # in dataset_dir
_NO_EFFECT = {
    "length_penalty": "it belongs to beam search, and chat draws token by token",
    "skip_special_tokens": "chat never shows special tokens",
}


def chat(
    cfg: RunConfig, compare: bool = False, beside: Sequence[str] = (), preferences: Path | None = None,
    key_env: str | None = None,
) -> None:  # fmt: skip
    """Read questions from stdin until it ends, and stream answers to stdout.

    Args:
        compare: show the base model's answer too.
        beside: models that answer beside the config's: runs, checkpoints, adapters, models, URL#MODEL.
        preferences: where `/prefer` writes; `PREFERENCES` in dataset_dir unless given.
        key_env: environment variable with the API key of the URLs.

    Raises:
        ConfigError: `compare` without an adapter, or generation keys that chat cannot honour.
    """
    _refuse_what_has_no_effect(cfg)
    kept = PairFile(preferences or Path(cfg.data.dataset_dir) / PREFERENCES, cfg.data.dataset_dir)
    sides = load_sides(cfg, compare, beside, key_env)
    hello = f"{_spoken(cfg, sides)}; /help lists the commands"
    make_console(sys.stderr).print(Text(hello, style="dim"))
    start = [Message("system", cfg.data.default_system)] if cfg.data.default_system else []
    try:
        Conversation(sides, sampling_of(cfg), start, Screen(make_console()), kept).follow(questions())
    finally:
        for engine in {id(side.engine): side.engine for side in sides}.values():
            engine.close(drain=False)


def _spoken(cfg: RunConfig, sides: Sequence[Side]) -> str:
    """Who speaks, where."""
    model = cfg.model
    names = [" + ".join([str(model.model_name_or_path), *model.adapter_name_or_path])]
    names += [side.source for side in sides if side.source not in ("", *names)] if len(sides) > 2 else []
    device = next((side.engine.policy.device for side in sides if side.template), None)
    return ", ".join(names) + (f" on {device}" if device else "")


def _refuse_what_has_no_effect(cfg: RunConfig) -> None:
    problems = [
        Problem(f"{key} has no effect in chat: {why}", where=key, fix=f"leave {key} out")
        for key, why in _NO_EFFECT.items()
        if key in cfg.explicit and cfg[key] != default(key)
    ]
    if problems:
        raise ConfigError(problems)
