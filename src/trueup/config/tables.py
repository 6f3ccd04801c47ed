"""Tables of losses and their keys for the docs: `python -m trueup.config.tables > docs/objectives/keys.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from trueup.config.losses import LOSSES_OF_KEY, PREF_LOSSES, STAGE_LOSSES, PrefLoss, stages_of
from trueup.config.methods import ACTS_WITH, SET
from trueup.config.schema import FIELDS, default
from trueup.config.values import words

_HEAD = """# Losses and keys

Made from the schema by `python -m trueup.config.tables`; a test holds it current. A key that is set where it does not
act is an error, with the values it acts with.
"""
_ADDED = words(
    """
    pref_loss loss_weights pref_ftx pref_bco_weight ld_alpha ld_reference use_weighting knowledge_weight ref_model
    precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    """
)


def page() -> str:
    """The whole page, as Markdown."""
    known = {name: loss for name, loss in PREF_LOSSES.items() if not loss.instead}
    losses = _table(["pref_loss", "what it is", "stages", "learns from", "reference", "paper"], _losses(known))
    own = _table(["key", "default", "acts with pref_loss", "what it does"], map(_key, LOSSES_OF_KEY))
    added = _table(["key", "default", "acts with", "what it does"], map(_added, _ADDED))
    values = _table(["pref_loss", "keys it reads, with their values when unset"], _values(known))
    return "\n".join(
        [_HEAD, "## Losses\n", losses, "## What unset keys mean\n", values, "## Keys of single losses\n", own,
         "## Keys beside any loss\n", added]
    )  # fmt: skip


def _losses(known: dict[str, PrefLoss]) -> Iterable[list[str]]:
    for name, loss in known.items():
        paper = f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else ""
        learns = "pairs" if loss.kind == "pair" else "labelled answers"
        yield [f"`{name}`", loss.help, ", ".join(stages_of((name,))), learns, "yes" if loss.reference else "no", paper]


def _values(known: dict[str, PrefLoss]) -> Iterable[list[str]]:
    for name, loss in known.items():
        read = dict.fromkeys([*words(loss.keys), *loss.defaults])
        yield [f"`{name}`", ", ".join(f"`{key}: {loss.defaults.get(key, default(key))}`" for key in read)]


def _key(key: str) -> list[str]:
    return [f"`{key}`", f"{default(key)}", _joined(LOSSES_OF_KEY[key]), FIELDS[key].description or ""]


def _added(key: str) -> list[str]:
    needs = []
    for other, allowed in ACTS_WITH[key].items():
        if allowed is SET:
            needs.append(f"`{other}`")
        elif other != "pref_loss" or len(allowed) < len(STAGE_LOSSES["dpo"]):
            needs.append(f"`{other}`: {_joined(str(value).lower() for value in allowed)}")
    shown = default(key)
    return [
        f"`{key}`",
        "" if shown in (None, []) else str(shown).lower(),
        "; ".join(needs),
        FIELDS[key].description or "",
    ]


def _joined(names: Iterable[str]) -> str:
    return ", ".join(names)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
