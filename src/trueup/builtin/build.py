"""Makes `builtin:sql-tiny` from nothing: data, tokenizer, random weights, pt, sft, grade, install.

    make builtin-model        (python -m trueup.builtin.build)

Some twenty minutes on two CPU cores. Every step is seeded; the card beside the model keeps the
figures. The pairs that come with the package are written too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trueup.builtin import BUILTIN_DATA, builtin_path
from trueup.builtin.recipe.chats import (
    PT_CHATS,
    PT_FORMATTED,
    PT_SEED,
    SFT_CHATS,
    SFT_FORMATTED,
    SFT_SEED,
    Chat,
    make_chats,
    write_jsonl,
)
from trueup.builtin.recipe.untrained import END, new_model, save, train_tokenizer
from trueup.builtin.sql import Grade, Task, grade, make_tasks, write_pairs

RECIPE = Path(__file__).parent / "recipe"
PAIRS, PAIRS_SEED = 960, 4
EVAL_PAIRS, EVAL_SEED = 100, 6
GRADED, GRADED_SEED = 200, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin_model"))
    parser.add_argument("--install", type=Path, default=builtin_path("builtin:sql-tiny"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    write_data(work)
    write_pairs(make_tasks(PAIRS, PAIRS_SEED), BUILTIN_DATA / "sql_pairs.jsonl")
    write_pairs(make_tasks(EVAL_PAIRS, EVAL_SEED, "heldout"), BUILTIN_DATA / "sql_heldout.jsonl")
    trueup("train", RECIPE / "pt.yaml", *paths(work, "init", "pt"))
    trueup("train", RECIPE / "sft.yaml", *paths(work, "pt", "sft"))
    finish(work / "sft", work / "finished")
    found = grade_model(work / "finished", make_tasks(GRADED, GRADED_SEED, "heldout"))
    print(f"held-out: {found}")
    if found.right < 0.97 or found.formatted > 0.05:
        raise SystemExit("not installed: the model must be right 97 % of the time and bare 95 %")
    write_card(work / "finished", found)
    shutil.copytree(work / "finished", arguments.install, dirs_exist_ok=True)


def write_data(work: Path) -> None:
    """The chats of both stages, the registry that names them, and the untrained model."""
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    pt = make_chats(PT_CHATS, PT_SEED, PT_FORMATTED)
    sft = make_chats(SFT_CHATS, SFT_SEED, SFT_FORMATTED)
    tokenizer = train_tokenizer(message["content"] for chat in pt[:10_000] for message in chat)
    write_jsonl([{"text": as_document(chat, tokenizer)} for chat in pt], data / "sql_pt.jsonl")
    write_jsonl([{"messages": chat} for chat in sft], data / "sql_sft.jsonl")
    registry = {
        "sql_pt": {"file_name": "sql_pt.jsonl", "columns": {"prompt": "text"}},
        "sql_sft": {
            "file_name": "sql_sft.jsonl",
            "formatting": "openai",
            "columns": {"messages": "messages"},
        },
    }
    text = json.dumps(registry, indent=2)
    (data / "dataset_info.json").write_text(text, encoding="utf-8")
    save(new_model(tokenizer), tokenizer, work / "init")


def as_document(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat as one text, without the end that pre-training adds to every document itself."""
    return tokenizer.apply_chat_template(chat, tokenize=False).removesuffix(f"{END}\n")


def paths(work: Path, start: str, end: str) -> list[str]:
    return [
        f"model_name_or_path={work / start}",
        f"dataset_dir={work / 'data'}",
        f"output_dir={work / end}",
        "overwrite_output_dir=true",
    ]


def trueup(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "trueup", *map(str, words)], check=True)


def grade_model(directory: Path, tasks: list[Task]) -> Grade:
    """Grades of greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task.request}], tokenize=False, add_generation_prompt=True
        )
        for task in tasks
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=160, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return grade(answers, tasks)


def finish(source: Path, target: Path) -> None:
    """The trained model with its weights in bf16 (six megabytes), and its tokenizer."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def write_card(directory: Path, found: Grade) -> None:
    """The model card, with what the model was found to do."""
    card = (RECIPE / "card.md").read_text(encoding="utf-8")
    shares = {
        "right": f"{found.right:.1%}",
        "formatted": f"{found.formatted:.1%}",
        "commented": f"{found.commented:.1%}",
        "count": str(found.count),
    }
    (directory / "README.md").write_text(card.format(**shares), encoding="utf-8")


if __name__ == "__main__":
    main()
