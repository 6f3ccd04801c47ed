"""A reward model with TRL, as its documentation shows it; runs in TRL's own environment: `trl_reward.py SETTINGS.json`.

Writes `result.json` into the output directory: the trainer's log and what its last line sums up.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    set_seed(settings["arguments"]["seed"])
    arguments = RewardConfig(
        **settings["arguments"],
        model_init_kwargs={"dtype": getattr(torch, settings["dtype"])},
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        settings["model"],
        args=arguments,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=LoraConfig(
            **settings["lora"], target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    trainer.train()
    result = {"log": trainer.state.log_history}
    Path(arguments.output_dir, "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
