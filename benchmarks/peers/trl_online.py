"""GRPO or RLOO with TRL, as its documentation shows it; runs in TRL's own environment: `trl_online.py SETTINGS.json`.

Writes `result.json` into the output directory: the trainer's log, with the time of every row.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

CLASSES = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}


class Clock(TrainerCallback):
    """Writes the time into every row of the log."""

    def on_log(self, args, state, control, **_):
        state.log_history[-1]["time"] = time.time()


def capitals(completions, **_):
    """How many capitals an answer has: as cheap as a reward can be."""
    return [float(sum(c.isupper() for c in answer[0]["content"])) for answer in completions]


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    set_seed(settings["arguments"]["seed"])
    config, trainer_class = CLASSES[settings["method"]]
    arguments = config(
        **settings["arguments"],
        model_init_kwargs={"dtype": torch.bfloat16},
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        settings["model"],
        args=arguments,
        reward_funcs=capitals,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        peft_config=LoraConfig(**settings["lora"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    Path(arguments.output_dir, "result.json").write_text(json.dumps({"log": trainer.state.log_history}), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
