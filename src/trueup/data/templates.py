"""Which chat template a run uses, and what a user should know about the choice.
 The tokenizer's own template comes first; named ones are `.jinja` files under `builtin/templates`;
a path to a file works too. Without any, `default` is used and that is said.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.data.chat_template import ChatTemplate, plain_prefix
from trueup.data.rendering import Renderer, TemplateRefusal, quoted
from trueup.data.template_names import (
    ALIASES,
    TEMPLATES,
    Shipped,
    resolve_name,
    shipped_source,
)
from trueup.data.template_probe import QUESTION, first_difference
from trueup.data.template_safety import examine
from trueup.errors import ConfigError

__all__ = [
    "ALIASES",
    "OWN",
    "TEMPLATES",
    "ChatTemplate",
    "TemplateRefusal",
    "choose_pad_token",
    "load_template",
    "own_source",
    "resolve_name",
]

log = logging.getLogger("trueup")

OWN = "tokenizer"  # the name of a tokenizer's own template
#: Names of tokens that may pad, the best first.
_PADS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\W{1,2}pad\W{1,2}$",
        r"right_pad",
        r"reserved|unused|dummy|placeholder|extra_\d",
        r"pad",
    )
]
_DEFAULT_SYSTEM = (
    "{%% if messages[0]['role'] != 'system' %%}"
    "{%% set messages = [{'role': 'system', 'content': %s}] + messages %%}{%% endif %%}\n"
)


def load_template(
    tokenizer: Any,
    name: str | None = None,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
    preserve_thinking: bool = False,
    tool_format: str | None = None,
    split_special_tokens: bool = True,
) -> ChatTemplate:
    """The chat template to use with `tokenizer`, which also gets a padding token if it lacks one.

    Args:
        name: a shipped template or the path of a .jinja file; None means the tokenizer's own, or
            `default` (said once) if it has none.
        default_system: the system message of conversations that bring none; None leaves that to
            the template.
        enable_thinking: True renders prompts that invite reasoning; False ones that refuse it, and
            removes it from answers; None goes by whether an example's answer reasons.
        preserve_thinking: keep the reasoning of earlier turns, with templates that can.
        tool_format: accepted if it agrees with the template, which decides how tools are written.
        split_special_tokens: control tokens written in a message stay text; False lets them act.

    Raises: ConfigError for names we do not have, ModelError for templates that cannot be used.
    """
    label, source, shipped = _choose(tokenizer, name)
    if tool_format and tool_format not in (label, shipped and shipped.file):
        raise ConfigError(
            f"tool_format {tool_format!r} has no effect: {label!r} writes tools its own way",
            where="tool_format",
            fix="leave tool_format out, or choose the template that writes tools that way",
        )
    if shipped and shipped.plain and not plain_prefix(tokenizer):
        source = source.replace("{{- bos_token -}}\n", "")
    if default_system is not None:
        source = _DEFAULT_SYSTEM % quoted(default_system) + source
    if preserve_thinking and "preserve_thinking" not in source:
        log.warning(
            "preserve_thinking: true has no effect with this chat template, which treats earlier "
            "reasoning its own way; template: qwen3 knows it."
        )
    template = ChatTemplate(
        tokenizer,
        label,
        source,
        stop=shipped.stop if shipped else None,
        enable_thinking=enable_thinking,
        preserve_thinking=preserve_thinking,
        split_special_tokens=split_special_tokens,
    )
    _say_what_does_not_fit(tokenizer, template)
    choose_pad_token(tokenizer, template.stop_ids, template.renderer.text([QUESTION], header=True))
    return template


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}",
            where=f"template: {path}",
            fix="give the path of a .jinja file",
        ) from error


def own_source(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template; where it has one more for tools, both in one."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        default, tools = own.get("default") or next(iter(own.values()), None), own.get("tool_use")
        if default and tools:
            return "{% if tools %}" + tools + "{% else %}" + default + "{% endif %}"
        return default
    return own or None


def choose_pad_token(tokenizer: Any, stop_ids: Sequence[int], rendered: str = "") -> None:
    """Give `tokenizer` a padding token that ends nothing, if its vocabulary holds a token without
    another use (C9): one that is not a stop token and not part of the template (`rendered`).

    Batches are never padded here and masks never go by id, so this matters to other programs that
    load the result.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stop_ids:
        return
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in taken and token not in rendered]
    for pattern in _PADS:
        token = next((token for token in free if pattern.search(token)), None)
        if token:
            tokenizer.pad_token = token
            log.info("The tokenizer has no padding token of its own: %s is used.", token)
            return
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in stop_ids:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def _choose(tokenizer: Any, name: str | None) -> tuple[str, str, Shipped | None]:
    if name and name.endswith(".jinja"):
        return name, _read_template(Path(name)), None
    if name:
        key = resolve_name(name)
        return key, shipped_source(TEMPLATES[key]), TEMPLATES[key]
    own = own_source(tokenizer)
    if own:
        return OWN, own, None
    log.warning(
        "The tokenizer has no chat template and none is named: template `default` is used "
        "(Human: … Assistant: …). Set template: to choose another."
    )
    return "default", shipped_source(TEMPLATES["default"]), TEMPLATES["default"]


def _say_what_does_not_fit(tokenizer: Any, template: ChatTemplate) -> None:
    unknown = template.ends.unknown_stops
    if unknown:
        log.warning(
            "Template %s ends turns with %s, which is no token of this tokenizer: it is written as "
            "text, and answers end with %s instead. Use the model's own template, or "
            "add_special_tokens: '%s' with resize_vocab: true.",
            template.name,
            ", ".join(unknown),
            template.ends.final,
            ",".join(unknown),
        )
    own = own_source(tokenizer)
    for warning in examine(template, own).warnings():
        log.warning("%s", warning)
    if template.name == OWN or not own:
        return
    theirs = Renderer(own, template.renderer.variables)
    difference = first_difference(template.renderer, theirs, template.enable_thinking)
    if difference:
        log.warning(
            "Template %s is not the tokenizer's own, with which a server would prompt differently "
            "(%s). Leave template empty to train with the tokenizer's own.",
            template.name,
            difference,
        )
