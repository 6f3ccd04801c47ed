"""A tiny model directory, small datasets and a config for them: all on a CPU in fp32, in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.config.schema import RunConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "sun",
    "rain",
    "wind",
    "snow",
    "star",
    "moon",
    "fire",
    "ice",
    "red",
    "blue",
    "green",
    "gold",
    "one",
    "two",
    "three",
    "four",
    "你好",
    "世界",
]


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def pairs(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "instruction": sentence(rng, 2, 9),
            "chosen": sentence(rng, 1, 8),
            "rejected": sentence(rng, 1, 8) + " no",
        }
        for _ in range(count)
    ]


def labelled(rows: list[dict]) -> list[dict]:
    """One answer of each pair, with a label: the chosen of every other row."""
    return [
        {"instruction": row["instruction"], "output": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-shaped model of a few thousand parameters with a byte-level tokenizer and a ChatML template."""
    directory = tmp_path_factory.mktemp("tiny-qwen2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    model = tiny_model("qwen2", vocab_size=len(fast), eos_token_id=2, pad_token_id=0, std=0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads another's reference table."""
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for name, rows in {"pairs": pairs(21), "held": pairs(6, seed=1)}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    chats = [{"instruction": row["instruction"], "output": row["chosen"]} for row in pairs(21)]
    (directory / "chats.json").write_text(json.dumps(chats, ensure_ascii=False), encoding="utf-8")
    texts = [{"text": row["instruction"] + " " + row["chosen"]} for row in pairs(21)]
    (directory / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    for name, rows in {"labels": pairs(24), "held_labels": pairs(8, seed=1)}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled(rows))
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    registry = {
        "pairs": {"file_name": "pairs.jsonl", "type": "dpo"},
        "held": {"file_name": "held.jsonl", "type": "dpo"},
        "chats": {"file_name": "chats.json"},
        "knowledge": {"file_name": "chats.json", "type": "sft"},
        **{
            name: {"file_name": f"{name}.jsonl", "type": "kto", "columns": {"kto_tag": "label"}}
            for name in ("labels", "held_labels")
        },
        "texts": {"file_name": "texts.json", "type": "pretrain", "columns": {"text": "text"}},
    }
    (directory / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return directory


@pytest.fixture
def config(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A DPO LoRA config on the tiny model; keywords override or add keys."""

    def make(**keys) -> RunConfig:
        base = {
            "model_name_or_path": str(tiny_dir), "stage": "dpo", "finetuning_type": "lora", "lora_rank": 4,
            "dataset": "pairs", "dataset_dir": str(data_dir), "cutoff_len": 128, "device": "cpu", "bf16": False,
            "per_device_train_batch_size": 4, "learning_rate": 1e-3, "num_train_epochs": 2, "logging_steps": 1,
            "save_strategy": "no", "output_dir": str(tmp_path / "out"),
        }  # fmt: skip
        prefers = keys.get("stage", "dpo") not in ("pt", "sft", "rm")
        return load_config({**base, **({"regression_report": False} if prefers else {}), **keys})

    return make
