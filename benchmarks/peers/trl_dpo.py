"""DPO with TRL, as its documentation shows it; runs in TRL's own environment: `trl_dpo.py SETTINGS.json`.

Writes `result.json` into the output directory: the trainer's log and what its last line sums up.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """Writes the time into every row of the log."""

    def on_log(self, args, state, control, **_):
        state.log_history[-1]["time"] = time.time()


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    set_seed(settings["arguments"]["seed"])
    arguments = DPOConfig(
        **settings["arguments"],
        model_init_kwargs={"dtype": getattr(torch, settings["dtype"])},
        train_sampling_strategy="random" if settings["shuffle"] else "sequential",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        settings["model"],
        args=arguments,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=LoraConfig(**settings["lora"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    if settings.get("adapter"):
        load_adapter(trainer.model, settings["adapter"])
    trainer.train()
    result = {"log": trainer.state.log_history}
    Path(arguments.output_dir, "result.json").write_text(json.dumps(result), encoding="utf-8")


def load_adapter(model, directory: str) -> None:
    """Start from given LoRA weights, so that two tools can be compared step by step."""
    from peft import load_peft_weights, set_peft_model_state_dict

    unexpected = set_peft_model_state_dict(model, load_peft_weights(directory, device="cpu")).unexpected_keys
    assert not unexpected, unexpected


if __name__ == "__main__":
    main(sys.argv[1])
