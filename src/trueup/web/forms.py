"""The config's schema as a form: what each key is called, what it takes, whether it acts. No key is named here but to
say which come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from trueup.config.explain import alternative, choices, condition_words
from trueup.config.methods import LATER, LATER_VALUES, missing_condition, other_verb
from trueup.config.schema import FIELDS, SECRETS, SECTION_OF, RunConfig, default, is_flag, json_schema, kinds
from trueup.web.draft import CODE_KEYS, Checked, word_of
from trueup.web.view import View

#: keys that stand in front, by card; of these, those are shown that act with the chosen method.
FRONT: dict[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "adapter_name_or_path", "template", "hub", "rope_scaling", "booster"),
    "method": (
        "finetuning_type", "quantization_bit", "lora_rank", "lora_alpha", "lora_target", "pref_loss", "pref_beta",
        "pref_ftx", "simpo_gamma", "kto_chosen_weight", "kto_rejected_weight", "reward_loss", "reward_model",
        "reward_funcs", "num_generations", "max_new_tokens",
    ),
    "data": ("dataset", "eval_dataset", "val_size", "cutoff_len", "max_samples"),
    "training": (
        "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "lr_scheduler_type", "warmup_ratio", "bf16", "fp16",
    ),
}  # fmt: skip
#: words of keys' names that are not written in small letters
_PROPER = {
    "lora": "LoRA", "loraplus": "LoRA+", "rslora": "rsLoRA", "dora": "DoRA", "pissa": "PiSSA", "loftq": "LoftQ",
    "oft": "OFT", "ia3": "(IA)³", "galore": "GaLore", "apollo": "APOLLO", "adam": "Adam", "vllm": "vLLM",
    "llama": "LLaMA",
    "hf": "Hugging Face", "ms": "ModelScope", "om": "Modelers", "kv": "KV", "gpu": "GPU", "ddp": "DDP", "fsdp": "FSDP",
    "dpo": "DPO", "dpop": "DPOP", "rdpo": "R-DPO", "tdpo": "TDPO", "simpo": "SimPO", "alphapo": "AlphaPO", "ld": "LD",
    "bco": "BCO", "kto": "KTO", "ppo": "PPO", "grpo": "GRPO", "dft": "DFT", "asft": "ASFT", "eaft": "EAFT", "kl": "KL",
    "eos": "EOS", "lr": "LR", "sql": "SQL", "gguf": "GGUF", "cpu": "CPU", "id": "ID", "unsloth": "Unsloth",
}  # fmt: skip
_FRONT_KEYS = {key for keys in FRONT.values() for key in keys}
_SCHEMA: dict[str, Any] = json_schema()["properties"]


@dataclass(frozen=True)
class Key:
    """A key as a form needs it. `kind`: flag, choice, number, list, mapping, code, secret or text."""

    name: str
    section: str
    kind: str
    choices: tuple[str, ...] = ()
    limits: str = ""

    def unset(self, cfg: RunConfig) -> str:
        """What it means if it is not set, in words; "" if that is nothing."""
        value = default(self.name) if self.name in cfg.explicit else cfg[self.name]
        return "" if value in (None, [], {}, "") else word_of(value)


def key_of(name: str) -> Key:
    """What the schema says of a key."""
    found = tuple(choice for choice in choices(name) if not LATER_VALUES.get(name, {}).get(choice))
    return Key(name, SECTION_OF[name], _kind(name, found), found, _limits(_SCHEMA[name]))


def _kind(name: str, found: Sequence[str]) -> str:
    types = set(kinds(FIELDS[name].annotation))
    if name in SECRETS:
        return "secret"
    if name in CODE_KEYS:
        return "code"
    if list in types and name not in ("pref_loss",):
        return "list"
    if found:
        return "choice"
    if is_flag(name):
        return "flag"
    if dict in types:
        return "mapping"
    return "number" if types & {int, float} else "text"


def _limits(rule: dict[str, Any]) -> str:
    """The range of a number: `> 0`, `0 … 1`."""
    rules = [rule, *rule.get("anyOf", [])]

    def limit(name: str) -> Any:
        return next((one[name] for one in rules if name in one), None)

    low, high, above, below = (limit(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{low:g} … {high:g}"
    lower = max([(value, sign) for sign, value in (("≥", low), (">", above)) if value is not None], default=None)
    upper = min([(value, sign) for sign, value in (("≤", high), ("<", below)) if value is not None], default=None)
    return ", ".join(f"{sign} {value:g}" for value, sign in filter(None, (lower, upper)))


def front(card: str, cfg: RunConfig) -> list[Key]:
    """The keys of a card that act."""
    return [key_of(name) for name in FRONT[card] if acts(name, cfg)]


def others() -> dict[str, list[Key]]:
    """Every key that does not stand in front, by section."""
    found: dict[str, list[Key]] = {}
    for name in FIELDS:
        if name not in _FRONT_KEYS:
            found.setdefault(SECTION_OF[name], []).append(key_of(name))
    return found


def search(text: str, view: View) -> list[Key]:
    """Keys whose name, label or help has all words of a text; names first."""
    wanted = text.lower().replace("-", "_").split()
    hits = []
    for name in FIELDS:
        whole = f"{name} {label_of(name, view)} {help_of(name, view)}".lower()
        if all(word in whole for word in wanted):
            hits.append((not all(word in name for word in wanted), name))
    return [key_of(name) for _, name in sorted(hits, key=lambda hit: hit[0])]


def acts(name: str, cfg: RunConfig) -> bool:
    """Whether a key does something in a training by `cfg`."""
    return name not in LATER and other_verb(name, cfg) is None and missing_condition(name, cfg) is None


def why_not(name: str, cfg: RunConfig) -> str | None:
    """Why it does nothing, in the program's words."""
    if name in LATER:
        return f"not supported yet; {alternative(LATER[name])}"
    if (verb := other_verb(name, cfg)) is not None:
        return f"belongs to `trueup {verb}`"
    missing = missing_condition(name, cfg)
    return f"acts with {condition_words(*missing)}" if missing else None


def label_of(name: str, view: View) -> str:
    """A key's label: a word of ours, or its name, made readable where that is the reader's language."""
    return view.maybe(f"keys.{name}") or (_readable(name) if view.language == "en" else name)


def _readable(name: str) -> str:
    first, *others = (_PROPER.get(word, word) for word in name.split("_"))
    return " ".join([first if first in _PROPER.values() else first.capitalize(), *others])


def help_of(name: str, view: View) -> str:
    """A key's help: a sentence of ours in the reader's language, or the schema's own."""
    return view.maybe(f"keys_help.{name}") or str(FIELDS[name].description)


class Widget:
    """One key on the page. `change(key, word or None)` is told what a person enters; `unset` is what nothing means."""

    def __init__(
        self, key: Key, view: View, value: str | None, change: Callable[[str, str | None], None],
        options: Sequence[str] | None = None, note: str | None = None, unset: str = "",
    ) -> None:  # fmt: skip
        self.key, self.view, self._change, self.unset = key, view, change, unset
        self.label = label_of(key.name, view)
        with ui.element("div").classes("field") as self.box:
            self.field = self._make(value, options).without_auto_validation()  # which takes away what `tell` says
            self.field.props["data-key"] = key.name
            self.field.props["hint"] = self._hint(note)
            self.field.props["bottom-slots"] = True
            self.field.props["stack-label"] = True

    def _hint(self, note: str | None) -> str:
        """What the key does, and its range; or what `note` says of why it does nothing now."""
        said = help_of(self.key.name, self.view)
        if note:
            return f"{said} ({self.view.said(note)})"
        return f"{said} ({self.key.limits})" if self.key.limits and self.key.kind == "number" else said

    def _make(self, value: str | None, options: Sequence[str] | None) -> Any:
        key = self.key
        if key.kind == "secret":
            return self._secret()
        if key.kind in ("list", "code") or (options is not None and key.kind == "list"):
            return self._several(value, list(options or key.choices))
        if options is not None or key.kind in ("choice", "flag"):
            return self._one(value, list(options if options is not None else key.choices or ("true", "false")))
        numeric = " inputmode=decimal" if key.kind == "number" else ""
        made = ui.input(self.label, value=value or "", placeholder=self.unset, on_change=self._typed)
        return made.props(f"outlined dense debounce=250{numeric}")

    def _one(self, value: str | None, found: list[str]) -> ui.select:
        """One of several; of a closed set, or with something new typed in."""
        closed = self.key.kind in ("choice", "flag")
        if closed and self.key.choices:
            found = [one for one in found if one in self.key.choices]
        shown = found if value is None or value in found else [value, *found]
        made = ui.select(
            shown, label=self.label, value=value, clearable=True, with_input=not closed or len(found) > 8,
            new_value_mode=None if closed else "add-unique", on_change=self._chosen,
        )  # fmt: skip
        if value is None and self.unset:
            made.props["placeholder" if not closed else "display-value"] = self.unset
            made.classes("unset")
        return made.props("outlined dense options-dense behavior=menu")

    def _several(self, value: str | None, found: list[str]) -> ui.select:
        chosen = [part.strip() for part in value.split(",") if part.strip()] if value else []
        if value and value.startswith("["):
            chosen = [value]
        shown = [*found, *(part for part in chosen if part not in found)]
        made = ui.select(
            shown, label=self.label, value=chosen, multiple=True, with_input=True, clearable=True,
            new_value_mode=None if self.key.kind == "code" else "add-unique", on_change=self._chosen_several,
        )  # fmt: skip
        return made.props("outlined dense options-dense use-chips behavior=menu")

    def _secret(self) -> ui.input:
        made = ui.input(self.label, value="").props("outlined dense readonly")
        made.props["placeholder"] = self.view.t("train.secret")
        return made

    def _typed(self, event: Any) -> None:
        self._change(self.key.name, str(event.value).strip() or None)

    def _chosen(self, event: Any) -> None:
        unset = event.value is None and self.key.kind in ("choice", "flag") and bool(self.unset)
        self.field.props.pop("display-value", None)
        if unset:
            self.field.props["display-value"] = self.unset
        self.field.classes(add="unset" if unset else "", remove="" if unset else "unset")
        self._change(self.key.name, event.value or None)

    def _chosen_several(self, event: Any) -> None:
        self._change(self.key.name, ",".join(event.value or []) or None)

    def tell(self, checked: Checked) -> None:
        """Show what is wrong with this key, if anything is."""
        wrong = checked.of(self.key.name, self.view.said)
        if self.field.props.get("error-message", "") != wrong:
            self.field.props["error"] = bool(wrong)
            self.field.props["error-message"] = wrong
            self.field.update()
