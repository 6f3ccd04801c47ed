"""Well-known public datasets by short name, written like entries of a `dataset_info.json`.

A name of the user's own registry, a bundled sample and an existing path come before these. Columns
are given in full, because public sets carry columns beside those they are used for. Where a hub has
a set in another shape, `on` says how it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HUB_KEYS = {"huggingface": "hf_hub_url", "modelscope": "ms_hub_url", "modelers": "om_hub_url"}
SHAREGPT: dict[str, Any] = {"formatting": "sharegpt"}
_MESSAGES = {"messages": "messages"}
_SIDES = {"chosen": "chosen", "rejected": "rejected"}
#: Preference pairs whose sides are whole conversations; other columns that hold turns are left out.
_CONVERSATIONS = {"columns": {**_SIDES, "messages": None, "prompt": None, "query": None}}
_TURNS = {**SHAREGPT, "columns": {"messages": "conversations", **_SIDES}}
_QUESTION = {"columns": {"prompt": "question", "query": None, **_SIDES}}


@dataclass(frozen=True, slots=True)
class Known:
    """A public dataset: what it is for, about how many rows it has, and its registry entry."""

    about: str
    rows: str
    entry: dict[str, Any]
    on: dict[str, dict[str, Any]] = field(default_factory=dict)  # hub → what is different there

    @property
    def type(self) -> str:
        return self.entry["type"]

    @property
    def hubs(self) -> list[str]:
        """The hubs that have it."""
        return [hub for hub, key in HUB_KEYS.items() if key in self.entry or hub in self.on]

    def entry_on(self, hub: str) -> dict[str, Any]:
        """Its registry entry with one source: this hub, or else the first that has it."""
        chosen = hub if hub in self.hubs else self.hubs[0]
        merged = {**self.entry, **self.on.get(chosen, {})}
        others = [key for name, key in HUB_KEYS.items() if name != chosen]
        return {key: value for key, value in merged.items() if key not in others}


def _hub(hf: str | None = None, ms: str | None = None) -> dict[str, Any]:
    return {key: name for key, name in (("hf_hub_url", hf), ("ms_hub_url", ms)) if name}


def _pairs(about: str, rows: str, **entry: Any) -> Known:
    return Known(about, rows, {"type": "dpo", "ranking": True, **entry})


def _sft(about: str, rows: str, **entry: Any) -> Known:
    return Known(about, rows, {"type": "sft", **entry})


_H4 = {
    **_hub("HuggingFaceH4/ultrafeedback_binarized"),
    "type": "dpo",
    "ranking": True,
    "columns": {"prompt": "prompt", **_SIDES, "messages": None, "query": None},
}
_H4_ELSEWHERE = {
    "ms_hub_url": "llamafactory/ultrafeedback_binarized",
    "split": "train",
    "columns": {"prompt": "instruction", **_SIDES},
}
_EN_ZH = {**_hub("hiyouga/DPO-En-Zh-20k"), **_TURNS}
_HH = {**_hub("Anthropic/hh-rlhf"), "columns": _SIDES}
_OPENAI = {"formatting": "openai", "columns": _MESSAGES}

CATALOG: dict[str, Known] = {
    # preference pairs
    "ultrafeedback": Known(
        "answers of many models, ranked by GPT-4",
        "61k",
        {**_H4, "split": "train_prefs"},
        {"modelscope": _H4_ELSEWHERE},
    ),
    "ultrafeedback_eval": Known("its held-out pairs", "2k", {**_H4, "split": "test_prefs"}),
    "ultrafeedback_cleaned": _pairs(
        "the same without leaked and mislabelled rows",
        "61k",
        **_hub("argilla/ultrafeedback-binarized-preferences-cleaned"),
        columns={"prompt": "prompt", **_SIDES, "messages": None, "query": None},
    ),
    "orca_dpo": _pairs(
        "GPT-4 against Llama-2-13B",
        "13k",
        **_hub("Intel/orca_dpo_pairs"),
        columns={**_QUESTION["columns"], "system": "system"},
    ),
    "orca_dpo_cleaned": _pairs(
        "the same, judged again",
        "13k",
        **_hub("argilla/distilabel-intel-orca-dpo-pairs"),
        columns={"prompt": "input", "query": None, "system": "system", **_SIDES},
    ),
    "dpo_en_zh": _pairs("English and Chinese conversations", "20k", **_EN_ZH, subset="en+zh"),
    "dpo_mix_en": _pairs("its English half", "10k", **_EN_ZH, subset="en"),
    "dpo_mix_zh": _pairs("its Chinese half", "10k", **_EN_ZH, subset="zh"),
    "coig_p": _pairs("Chinese, chat, code, maths, roles", "1M", **_hub("m-a-p/COIG-P"), **_TURNS),
    "hh_rlhf": _pairs("people's choices: helpful and harmless", "161k", **_HH),
    "hh_helpful": _pairs("its helpful part", "44k", **_HH, folder="helpful-base"),
    "hh_harmless": _pairs("its harmless part", "43k", **_HH, folder="harmless-base"),
    "dpo_mix_7k": _pairs("a small mixture of three sets", "7k", **_hub("argilla/dpo-mix-7k"), **_CONVERSATIONS),
    "orpo_dpo_mix": _pairs(
        "a mixture of seven sets",
        "44k",
        **_hub("mlabonne/orpo-dpo-mix-40k", "AI-ModelScope/orpo-dpo-mix-40k"),
        **_CONVERSATIONS,
    ),
    # reward models
    "skywork_preference": Known(
        "curated for reward models",
        "77k",
        {"type": "rm", **_hub("Skywork/Skywork-Reward-Preference-80K-v0.2"), **_CONVERSATIONS},
    ),
    # single answers with a label
    "ultrafeedback_kto": Known(
        "UltraFeedback as single answers",
        "122k",
        {
            "type": "kto",
            **_hub(
                "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
                "AI-ModelScope/ultrafeedback-binarized-preferences-cleaned-kto",
            ),
            "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
        },
    ),
    "kto_mix": Known(
        "a small mixture",
        "14k",
        {
            "type": "kto",
            **_hub("trl-lib/kto-mix-14k"),
            "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
        },
    ),
    # conversations and instructions
    "alpaca_en": _sft("instructions", "52k", **_hub("llamafactory/alpaca_en", "llamafactory/alpaca_en")),
    "alpaca_zh": _sft("Chinese instructions", "51k", **_hub("llamafactory/alpaca_zh", "llamafactory/alpaca_zh")),
    "alpaca_gpt4_en": _sft("by GPT-4", "52k", **_hub("llamafactory/alpaca_gpt4_en", "llamafactory/alpaca_gpt4_en")),
    "alpaca_gpt4_zh": _sft(
        "by GPT-4, Chinese", "49k", **_hub("llamafactory/alpaca_gpt4_zh", "llamafactory/alpaca_gpt4_zh")
    ),
    "ultrachat_200k": _sft(
        "long conversations",
        "208k",
        **_hub("HuggingFaceH4/ultrachat_200k", "AI-ModelScope/ultrachat_200k"),
        split="train_sft",
        **_OPENAI,
    ),
    "lima": _sft("few and carefully chosen", "1k", **_hub("llamafactory/lima"), **SHAREGPT),
    "openhermes": _sft("a large mixture", "1M", **_hub("teknium/OpenHermes-2.5"), **SHAREGPT),
    "slimorca": _sft("reasoning traces", "518k", **_hub("Open-Orca/SlimOrca"), **SHAREGPT),
    "open_platypus": _sft("STEM", "25k", **_hub("garage-bAInd/Open-Platypus", "AI-ModelScope/Open-Platypus")),
    "codealpaca": _sft("code", "20k", **_hub("sahil2801/CodeAlpaca-20k", "AI-ModelScope/CodeAlpaca-20k")),
    "mathinstruct": _sft(
        "maths",
        "262k",
        **_hub("TIGER-Lab/MathInstruct", "AI-ModelScope/MathInstruct"),
        columns={"prompt": "instruction", "query": None, "response": "output"},
    ),
    "gsm8k": _sft(
        "grade-school maths with worked answers",
        "7k",
        **_hub("openai/gsm8k"),
        subset="main",
        columns={"prompt": "question", "query": None, "response": "answer"},
    ),
    "belle_0.5m": _sft("Chinese", "519k", **_hub("BelleGroup/train_0.5M_CN", "AI-ModelScope/train_0.5M_CN")),
    "firefly": _sft(
        "Chinese, 23 tasks",
        "1.6M",
        **_hub("YeungNLP/firefly-train-1.1M"),
        columns={"prompt": "input", "query": None, "response": "target"},
    ),
    "ruozhiba_gpt4": _sft("Chinese riddles", "5k", **_hub("hfl/ruozhiba_gpt4_turbo")),
    "magpie_pro_300k": _sft("synthetic", "300k", **_hub("Magpie-Align/Magpie-Pro-300K-Filtered"), **SHAREGPT),
    "tulu3_sft": _sft("the mixture behind Tülu 3", "939k", **_hub("allenai/tulu-3-sft-mixture"), **_OPENAI),
    "smoltalk": _sft("synthetic", "1M", **_hub("HuggingFaceTB/smoltalk"), subset="all", **_OPENAI),
    "open_r1_math": _sft("maths with reasoning", "94k", **_hub("llamafactory/OpenR1-Math-94k"), **_OPENAI),
    "glaive_toolcall_en": _sft(
        "tool calls",
        "1k",
        **_hub("llamafactory/glaive_toolcall_en"),
        **SHAREGPT,
        columns={"messages": "conversations", "tools": "tools"},
    ),
    "glaive_toolcall_zh": _sft(
        "tool calls, Chinese",
        "1k",
        **_hub("llamafactory/glaive_toolcall_zh"),
        **SHAREGPT,
        columns={"messages": "conversations", "tools": "tools"},
    ),
    # documents
    "wikitext": Known(
        "a small piece of Wikipedia",
        "37k",
        {
            "type": "pretrain",
            **_hub("Salesforce/wikitext"),
            "subset": "wikitext-2-raw-v1",
            "columns": {"text": "text"},
        },
    ),
    "tinystories": Known(
        "very simple stories",
        "2.1M",
        {"type": "pretrain", **_hub("roneneldan/TinyStories"), "columns": {"text": "text"}},
    ),
}

#: Other names of the same sets.
ALIASES = {
    "ultrafeedback_binarized": "ultrafeedback",
    "orca_pairs": "orca_dpo",
    "orca_dpo_pairs": "orca_dpo",
    "dpo_mix": "dpo_en_zh",
    "hh-rlhf": "hh_rlhf",
    "ultrafeedback_binarized_cleaned": "ultrafeedback_cleaned",
    "coig-p": "coig_p",
}


def find(name: str) -> tuple[str, Known] | None:
    """The dataset of a short name, an alias, or the id it has on a hub."""
    key = ALIASES.get(name, name)
    if key in CATALOG:
        return key, CATALOG[key]
    return next(((key, known) for key, known in CATALOG.items() if name in _ids(known)), None)


def _ids(known: Known) -> Iterator[str]:
    for part in (known.entry, *known.on.values()):
        yield from (part[key] for key in HUB_KEYS.values() if key in part)
