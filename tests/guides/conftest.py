"""A working directory as the guides' readers have it: tiny models under the guides' names, and their data."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.data.tiny_tokenizers import make_tokenizer
from tests.models.tiny import tiny_model
from tests.recipes.conftest import CHATML
from trueup.cli import main

#: name in the guides: (architecture, tokenizer, whether the tokenizer has a chat template)
MODELS = {
    "Qwen/Qwen1.5-7B-Chat": ("qwen2", "qwen", True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", "qwen", True),
    "Qwen3-4B-Base": ("qwen3", "qwen3", True),
    "Qwen2.5-7B": ("qwen2", "qwen", False),
    "Llama-2-7b-hf": ("llama", "llama2", False),
}
WORDS = ["show", "users", "order", "by", "age", "sum", "of", "name", "city", "where", "id", "查询", "用户", "年龄"]


def save_model(directory: Path, architecture: str, family: str, chat: bool, **config: Any) -> None:
    """A random model of a few thousand parameters with a tokenizer of its family."""
    tokenizer = make_tokenizer(family)
    if chat:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "std": 0.1, **config}
    model = tiny_model(architecture, eos_token_id=tokenizer.eos_token_id, **config)
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model of MODELS."""
    root = tmp_path_factory.mktemp("models")
    for name, (architecture, family, chat) in MODELS.items():
        save_model(root / name, architecture, family, chat)
    return root


@pytest.fixture
def work(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a test: the models at the guides' relative names, nothing else.

    fp16 and bf16 become fp32 on every machine, so that a guide's line gives the same numbers on all.
    """
    directory = tmp_path / "work"
    directory.mkdir()
    shutil.copytree(models, directory, dirs_exist_ok=True)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trueup.models.load._has_bf16", lambda device: False)
    return directory


def trueup(line: str, **how: Any) -> Result:
    """A line of a guide, run in this process."""
    return CliRunner().invoke(main, shlex.split(line), **how)


def succeed(line: str, **how: Any) -> Result:
    """A line that must work; its output is in the failure."""
    result = trueup(line, **how)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return result


def files(directory: Path) -> set[str]:
    """Every path below: what must not change when a line is refused."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_yaml(path: Path | str) -> Any:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def read_lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_json(path: Path | str, value: Any) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path | str, rows: Iterable[dict]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def register(entries: dict[str, dict], directory: str = "data") -> None:
    """Add entries to data/dataset_info.json of the current directory."""
    path = Path(directory) / "dataset_info.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), **entries})


def sentences(seed: int = 0) -> Callable[[int], str]:
    """A source of short texts."""
    rng = random.Random(seed)
    return lambda words: " ".join(rng.choices(WORDS, k=words))
