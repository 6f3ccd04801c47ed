"""Peak memory of one step over vocabulary size and answers per prompt.

    python -m benchmarks.memory

It should grow with the number of distinct tokens, prompt + answers, and hardly with the vocabulary: logits would take
vocabulary × padded length. Every cell is a process of its own; the peak is counted from the loaded model on, so the
weights, which do grow with the vocabulary, are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import HOME, RESULTS, argv, ask, environment, result_path, table, write_result
from benchmarks.models import SHAPES, model_directory

VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
ANSWERS = (1, 2, 4, 8)
PROMPT, ANSWER = 512, 256  # tokens
SHAPE = replace(SHAPES["tiny"], layers=2)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--vocabularies", type=numbers, default=VOCABULARIES)
    parser.add_argument("--answers", type=numbers, default=ANSWERS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cell", type=numbers, help=argparse.SUPPRESS)  # what a measured process is asked for
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.make:
        return print(json.dumps(str(make(options.make))))
    if options.cell:
        return print(json.dumps(one_step(*options.cell)))
    env = environment(threads=options.threads)
    found = machine.describe(env)
    print(machine.in_words(found))
    model_directory("tiny")  # for its tokenizer
    cells = []
    for vocabulary in options.vocabularies:
        ask("benchmarks.memory", "--make", str(vocabulary), env=env)
        for answers in options.answers:
            peak = ask("benchmarks.memory", "--cell", f"{vocabulary},{answers}", env=env)
            cells.append({"vocabulary": vocabulary, "answers": answers, "peak_mb": peak})
        shutil.rmtree(directory_of(vocabulary))
    record = {"argv": argv(words), "machine": found, "prompt": PROMPT, "answer": ANSWER, "cells": cells}
    print(f"\n{summary(record)}")
    path = result_path("memory", options.results)
    write_result(path, "memory", record)
    print(f"\n{path}")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def summary(record: dict[str, Any]) -> str:
    cells = {(cell["vocabulary"], cell["answers"]): cell["peak_mb"] for cell in record["cells"]}
    vocabularies, answers = (sorted({key[i] for key in cells}) for i in range(2))
    prompt, answer = record["prompt"], record["answer"]
    rows = [
        (
            f"{count} answers: {prompt + count * answer:,} tokens",
            *(f"{cells[size, count]:,.0f}" for size in vocabularies),
            f"{logits_mb(max(vocabularies), count, prompt, answer):,.0f}",
        )
        for count in answers
    ]
    sizes = [f"{size // 1024}k" for size in vocabularies]
    head = ("MiB above the model", *sizes, f"logits at {sizes[-1]}")
    return table(head, rows)


def logits_mb(vocabulary: int, answers: int, prompt: int, answer: int) -> float:
    """What bf16 logits of the padded batch alone would take."""
    return vocabulary * answers * (prompt + answer) * 2 / 2**20


# --- one process ------------------------------------------------------------------------------


def directory_of(vocabulary: int) -> Path:
    return HOME / "models" / f"memory-{vocabulary}"


def make(vocabulary: int) -> Path:
    """A small random model with a vocabulary of that size."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**replace(SHAPE, vocabulary=vocabulary).config(), dtype="bfloat16")
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory_of(vocabulary))
    AutoTokenizer.from_pretrained(model_directory("tiny")).save_pretrained(directory_of(vocabulary))
    return directory_of(vocabulary)


def one_step(vocabulary: int, answers: int) -> float:
    """MiB that a forward and backward pass take at their peak above what was there before."""
    import numpy as np
    import torch

    from trueup.config.load import load_config
    from trueup.data.encoded import Answer, Encoded
    from trueup.data.forest import build_forest
    from trueup.models.load import load_policy, load_tokenizer

    cfg = load_config({"model_name_or_path": str(directory_of(vocabulary)), "stage": "dpo", "dataset": "any"})
    policy = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model)).policy
    rng = np.random.default_rng(0)

    def tokens(length: int) -> Any:
        return rng.integers(0, vocabulary, length, dtype=np.int32)

    ones = np.ones(ANSWER, dtype=bool)
    example = Encoded("row", tokens(PROMPT), tuple(Answer(tokens(ANSWER), ones) for _ in range(answers)))
    forest = build_forest([example])
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (-policy.token_logps(forest).sum()).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = reset_peak()
    (-policy.token_logps(forest).sum()).backward()
    return peak_mb() - before


def reset_peak() -> float:
    """Forget the process's peak of resident memory so far (Linux); MiB in use now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): reset VmHWM
    return peak_mb()


def peak_mb() -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    sys.exit(main())
