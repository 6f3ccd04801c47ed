from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trueup.builtin import BUILTIN_DATA, builtin_path
from trueup.builtin.sql import grade, make_tasks, read_tasks
from trueup.errors import ModelError

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(builtin_path("builtin:sql-tiny"), padding_side="left")


def test_an_unknown_builtin_model_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="builtin:sql-tiny"):
        builtin_path("builtin:sql-huge")


def test_model_and_data_are_small_and_hold_no_pickle_and_no_code():
    files = [path for path in builtin_path("builtin:sql-tiny").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 12 * MEGABYTE
    assert sum(path.stat().st_size for path in BUILTIN_DATA.glob("sql_*.jsonl")) < MEGABYTE


def test_tokenizer_returns_any_text_and_splits_digits(tokenizer):
    texts = [task.request + task.formatted for task in make_tasks(100, seed=11)]
    for text in [*texts, "naïve Ωmega 🙂\t  two  spaces\n\n龘"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2023")) == 4


def test_chat_template_is_chatml_and_its_marks_are_single_tokens(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "select 1;"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nselect 1;<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"):
        assert len(tokenizer.encode(mark)) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")


def test_greedy_answers_to_heldout_requests_are_right_and_bare(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(builtin_path("builtin:sql-tiny"), dtype=torch.float32).eval()
    tasks = read_tasks(BUILTIN_DATA / "sql_heldout.jsonl")[:40]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task.request}], tokenize=False, add_generation_prompt=True
        )
        for task in tasks
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=120)
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = grade(answers, tasks)
    assert found.right >= 0.95
    assert found.formatted <= 0.05
