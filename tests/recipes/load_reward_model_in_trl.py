"""Lets TRL's RewardTrainer evaluate a reward model of trueup's. Run it in an environment that has TRL.

    python tests/recipes/load_reward_model_in_trl.py SAVES_OF_STAGE_RM PAIRS.jsonl SCORES.jsonl

PAIRS has rows of instruction, chosen and rejected; SCORES is what `trueup score` wrote of them. Prints the largest
difference between TRL's rewards and those, and both accuracies.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def conversation(row: dict, side: str) -> list[dict]:
    return [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row[side]}]


def main(model: str, pairs: str, scores: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Templates end a turn with a line break after its end token; a reward is read at the end token.
    texts = [
        {s: tokenizer.apply_chat_template(conversation(row, s), tokenize=False).rstrip("\n")
         for s in ("chosen", "rejected")}
        for row in rows_of(pairs)
    ]  # fmt: skip
    data = Dataset.from_list(
        [{f"{s}_ids": tokenizer(t, add_special_tokens=False)["input_ids"] for s, t in row.items()} for row in texts]
    )
    with tempfile.TemporaryDirectory() as directory:
        args = trl.RewardConfig(
            directory, per_device_eval_batch_size=4, report_to="none", bf16=False, use_cpu=True, max_length=None,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = trl.RewardTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=data,
                                    eval_dataset=data)  # fmt: skip
        told = trainer.evaluate()
        rewards = []
        for batch in trainer.get_eval_dataloader():
            with torch.no_grad():
                chosen, rejected = trainer.model(**trainer._prepare_inputs(batch)).logits[:, 0].chunk(2)
            rewards += torch.stack([chosen, rejected], 1).tolist()
    ours = [row["rewards"] for row in rows_of(scores)]
    gap = max(abs(a - b) for x, y in zip(rewards, ours, strict=True) for a, b in zip(x, y, strict=True))
    accuracy = sum(a > b for a, b in ours) / len(ours)
    print(
        f"TRL {trl.__version__}, {type(trainer.model).__name__}: accuracy {told['eval_accuracy']:.4f} (trueup score "
        f"{accuracy:.4f}), largest difference of a reward {gap:.1e} over {2 * len(ours)} answers"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
