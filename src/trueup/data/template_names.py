"""The chat templates we ship, by name; other names they go by; and names of templates we know and
do not ship.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from importlib import resources

from trueup.errors import ConfigError

log = logging.getLogger("trueup")


@dataclass(frozen=True, slots=True)
class Shipped:
    """A named template: its file, and what the file cannot say."""

    file: str
    setting: str = ""  # written before the file's text, where one file serves two families
    stop: tuple[str, ...] = ()  # tokens that end a turn beside the one the template writes and EOS
    plain: bool = False  # words, no control tokens: BOS only where the tokenizer itself puts one
    default_system: str | None = None  # for people: the file holds it


TEMPLATES: dict[str, Shipped] = {
    "qwen": Shipped(
        "qwen",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": Shipped("qwen3"),
    "qwen3_nothink": Shipped("qwen3", setting="{%- set never_thinks = true -%}\n"),
    "chatml": Shipped("chatml", stop=("<|im_end|>",)),
    "llama2": Shipped("llama2"),
    "llama3": Shipped("llama3", stop=("<|eom_id|>",)),
    "mistral": Shipped("mistral"),
    "gemma": Shipped("gemma"),
    "glm4": Shipped("glm4", stop=("<|user|>", "<|observation|>")),
    "chatglm3": Shipped("chatglm3", stop=("<|user|>", "<|observation|>")),
    "baichuan2": Shipped("baichuan2"),
    "phi": Shipped("phi"),
    "deepseek": Shipped("deepseek"),
    "deepseek3": Shipped("deepseek3"),
    "alpaca": Shipped(
        "alpaca",
        plain=True,
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    "vicuna": Shipped(
        "vicuna",
        plain=True,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "default": Shipped("default", plain=True),
    "empty": Shipped("empty", plain=True),
}

ALIASES = {
    "qwen1.5": "qwen", "qwen2": "qwen", "qwen2.5": "qwen", "qwen2_5": "qwen",
    "yi": "chatml", "smollm": "chatml", "llama-2": "llama2",
    "llama-3": "llama3", "llama3.1": "llama3", "llama3.2": "llama3", "llama3.3": "llama3",
    "gemma2": "gemma", "gemma3": "gemma", "chatglm": "glm4", "chatglm4": "glm4", "glm-4": "glm4",
    "phi3": "phi", "phi-3": "phi", "mixtral": "mistral", "deepseek2": "deepseek",
    "deepseek_v3": "deepseek3",
}  # fmt: skip

#: LLaMA-Factory's templates for text that we do not ship → the nearest that we do, if one is near.
KNOWN_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "bailing": (), "bailing_v2": (), "breeze": ("mistral",), "chatml_de": ("chatml",),
    "cohere": (), "cpm4": ("chatml",), "dbrx": ("chatml",), "deepseekr1": ("deepseek3",),
    "hy3": (), "deepseekcoder": ("deepseek",), "ernie": ("chatml",), "ernie_nothink": (),
    "exaone": (), "falcon": (), "falcon_h1": ("chatml",), "fewshot": ("empty",),
    "gemma3n": ("gemma",), "gemma4": ("gemma",), "gemma4n": ("gemma",), "glm4_moe": ("glm4",),
    "glm4_7": ("glm4",), "glmz1": ("glm4",), "gpt_oss": (), "granite3": (), "granite4": (),
    "hunyuan": (), "hunyuan_small": (), "hy_dense_1_8b": (), "hy_dense_7b": (), "index": (),
    "intern2": ("chatml",), "intern_s1": ("chatml",), "lfm2": ("chatml",),
    "llama2_zh": ("llama2",), "llama4": ("llama3",), "mimo": ("qwen3", "qwen"),
    "mimo_v2": ("qwen3", "qwen"), "minimax1": (), "minimax2": (), "ministral": ("mistral",),
    "ministral3": ("mistral",), "mistral_small": ("mistral",), "moonlight": (), "olmo": (),
    "openchat": (), "openchat-3.6": ("llama3",), "opencoder": ("chatml",), "phi_small": ("phi",),
    "phi4": ("chatml", "phi"), "phi4_mini": ("phi",), "qwen3_5": ("qwen3",),
    "qwen3_5_nothink": ("qwen3_nothink",), "qwen3_6": ("qwen3",), "sailor": ("chatml",), "seed_coder": (),
    "seed_oss": (), "smollm2": ("chatml",), "solar": ("alpaca",), "starchat": ("phi",),
    "telechat2": (), "xuanyuan": ("vicuna",), "youtu": (), "yuan": (), "zephyr": ("phi",),
    "aeva": (),
}  # fmt: skip


def resolve_name(name: str) -> str:
    """The canonical name of a shipped template. Raises ConfigError, naming the nearest ones."""
    asked = name.strip().lower()
    key = ALIASES.get(asked, asked)
    if key in TEMPLATES:
        if key != asked:
            log.info("template: %s is called %s here.", name, key)
        return key
    near = KNOWN_ELSEWHERE.get(key) or difflib.get_close_matches(key, [*TEMPLATES, *ALIASES], n=3, cutoff=0.5)
    known = key in KNOWN_ELSEWHERE
    raise ConfigError(
        f"template {name!r} is a template of LLaMA-Factory that trueup does not ship"
        if known
        else f"there is no template named {name!r}",
        where="template",
        expected=("nearest: " + ", ".join(near) + "; " if near else "") + "all: " + ", ".join(TEMPLATES),
        fix="leave template empty to use the tokenizer's own",
    )


def shipped_source(template: Shipped) -> str:
    """The text of a shipped template."""
    path = resources.files("trueup.builtin") / "templates" / f"{template.file}.jinja"
    return template.setting + path.read_text(encoding="utf-8").removesuffix("\n")
