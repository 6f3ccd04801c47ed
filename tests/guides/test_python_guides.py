"""Scripts of the guides that are in Python, and TRL's own, with nothing changed but the import line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

import trueup
from tests.guides.conftest import models, save_model, sentences, work, write_lines  # noqa: F401
from trueup.errors import ConfigError
from trueup.trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from trueup.unsloth import FastLanguageModel, PatchDPOTrainer, is_bfloat16_supported

CHAT = "Qwen/Qwen2.5-0.5B-Instruct"
G5 = "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUICK = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}


def preferences(count: int = 12) -> list[dict]:
    text = sentences()
    return [{"prompt": text(4), "chosen": text(5), "rejected": text(3)} for _ in range(count)]


def conversations(count: int = 12) -> list[dict]:
    """ultrafeedback's layout: a prompt as text, answers as whole conversations."""
    rows = []
    for row in preferences(count):
        asked = {"role": "user", "content": row["prompt"]}
        sides = {s: [asked, {"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")}
        rows.append({"prompt": row["prompt"], **sides})
    return rows


def labelled(count: int = 12) -> list[dict]:
    text = sentences()
    return [{"prompt": text(4), "completion": text(4), "label": i % 2 == 0} for i in range(count)]


@pytest.fixture
def bare(work: Path) -> Path:  # noqa: F811
    """With a model of the name that guide G5 has."""
    save_model(work / G5, "qwen2", "qwen", True)
    return work


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


# --- guide G5 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_g5_dpo_with_unsloth(bare: Path, loss: str):
    model, tokenizer = FastLanguageModel.from_pretrained(G5, max_seq_length=2048, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=SEVEN)
    before = logits(model)
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(
            output_dir="dpo-out", per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1,
            learning_rate=5e-4, beta=0.1, loss_type=loss, fp16=True, warmup_ratio=0.1, logging_steps=1,
        ),
        train_dataset=Dataset.from_list(conversations(24)),
        tokenizer=tokenizer,
    )  # fmt: skip
    output = trainer.train()
    assert output.global_step == 3 and trainer.state.log_history[0]["rewards/margins"] == 0
    assert not torch.equal(logits(model), before)
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(G5), "dpo-out")
    assert torch.allclose(logits(fresh), logits(model), atol=1e-4)
    assert trainer.args.max_length == 2048
    FastLanguageModel.for_inference(model)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] <= 4
    model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("merged").float()), logits(model), atol=0.1)


def test_g5_orpo_and_kto(bare: Path):
    PatchDPOTrainer()
    for trainer_class, config, rows in (
        (ORPOTrainer, ORPOConfig(output_dir="orpo", beta=0.1, learning_rate=8e-6, **QUICK), preferences()),
        (KTOTrainer, KTOConfig(output_dir="kto", beta=0.1, **QUICK), labelled()),
    ):
        model, tokenizer = FastLanguageModel.from_pretrained(G5, max_seq_length=256, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules=SEVEN)
        trainer = trainer_class(model=model, args=config, train_dataset=rows, tokenizer=tokenizer)
        trainer.train()
        assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
        assert (Path(config.output_dir) / "adapter_model.safetensors").exists()


def test_g5_four_bits_are_four_bits(bare: Path):
    pytest.importorskip("bitsandbytes")
    model, _ = FastLanguageModel.from_pretrained(G5, max_seq_length=2048, load_in_4bit=True)
    assert any("Linear4bit" in type(module).__name__ for module in model.modules())
    model, tokenizer = FastLanguageModel.from_pretrained(G5, max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=SEVEN)
    model.save_pretrained_merged("merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not any("4bit" in type(module).__name__ for module in merged.modules())
    assert torch.allclose(logits(merged.float()), logits(model).float(), atol=0.1)


def test_unsloths_arguments_that_cannot_be_honoured_are_refused(bare: Path):
    with pytest.raises(ConfigError, match="fast_inference"):
        FastLanguageModel.from_pretrained(G5, load_in_4bit=False, fast_inference=True)
    model, _ = FastLanguageModel.from_pretrained(G5, load_in_4bit=False)
    with pytest.raises(ConfigError, match="bias"):
        FastLanguageModel.get_peft_model(model, bias="all")
    with pytest.raises(ConfigError, match="gguf"):
        model.save_pretrained_gguf("x")
    assert is_bfloat16_supported() is False  # as this test's machine is told


def test_an_adapter_saved_by_a_run_is_loaded_and_trained_on(bare: Path):
    model, tokenizer = FastLanguageModel.from_pretrained(G5, max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=SEVEN)
    args = DPOConfig(output_dir="first", learning_rate=1e-3, **QUICK)
    DPOTrainer(model, args=args, train_dataset=preferences(), tokenizer=tokenizer).train()
    again, tokenizer = FastLanguageModel.from_pretrained("first", max_seq_length=256, load_in_4bit=False)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    trainer = DPOTrainer(again, args=DPOConfig(output_dir="second", **QUICK), train_dataset=preferences(),
                         tokenizer=tokenizer)  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


# --- TRL's quick starts ------------------------------------------------------------------------


def test_trl_quick_start_sft(work: Path):  # noqa: F811
    rows = [{"messages": row["chosen"]} for row in conversations()]
    trainer = SFTTrainer(model=CHAT, args=SFTConfig(output_dir="sft", **QUICK), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert Path("sft/model.safetensors").exists()  # all weights, as there is no adapter
    assert trueup.train("sft/run.yaml", train_dataset=rows, output_dir="x", quiet=True).config.data.train_on_prompt


def test_trl_quick_start_dpo_with_a_model_and_a_tokenizer(work: Path):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(CHAT)
    tokenizer = AutoTokenizer.from_pretrained(CHAT)
    training_args = DPOConfig(output_dir="Qwen2-0.5B-DPO", **QUICK)
    trainer = DPOTrainer(model=model, args=training_args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(conversations()))  # fmt: skip
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained("Qwen2-0.5B-DPO")
    assert torch.allclose(logits(saved), logits(model), atol=1e-5)
    assert trainer.args.learning_rate == 1e-6 and trainer.model is model


def test_trl_quick_start_kto_reward_and_grpo(work: Path):  # noqa: F811
    KTOTrainer(CHAT, args=KTOConfig(output_dir="kto", **QUICK), train_dataset=Dataset.from_list(labelled())).train()
    reward = RewardTrainer(CHAT, args=RewardConfig(output_dir="rm", **QUICK), train_dataset=conversations())
    reward.train()
    assert reward.model.config.num_labels == 1
    seen = []

    def reward_function(completions, **kwargs):
        seen.append((completions[0], kwargs["prompts"][0], kwargs["subject"][0]))
        return [float(len(set(completion.lower()))) for completion in completions]

    rows = [{"prompt": row["prompt"], "subject": "sql"} for row in preferences(4)]
    config = GRPOConfig(output_dir="grpo", num_generations=2, max_completion_length=4,
                        **{**QUICK, "per_device_train_batch_size": 4})  # fmt: skip
    trainer = GRPOTrainer(model=CHAT, reward_funcs=reward_function, args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert isinstance(seen[0][0], str) and seen[0][1] in {row["prompt"] for row in rows} and seen[0][2] == "sql"
    assert trainer.state.log_history[0]["rewards/reward_function/mean"] >= 0


def test_conversational_prompts_give_conversational_completions(work: Path):  # noqa: F811
    def reward_function(completions, prompts, **kwargs):
        assert prompts[0][-1]["role"] == "user"
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": row["chosen"][:1]} for row in conversations(4)]
    config = GRPOConfig("grpo", num_generations=2, max_completion_length=4, **QUICK)
    GRPOTrainer(CHAT, reward_function, config, train_dataset=rows).train()


def main(script_args, training_args, model_args, trainer_class):
    """The shape of TRL's example scripts: load, train, save."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }  # fmt: skip
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("Training completed.")
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    return trainer


@pytest.mark.parametrize(
    ("trainer_class", "config", "rows"),
    [(DPOTrainer, DPOConfig, conversations), (KTOTrainer, KTOConfig, labelled),
     (SFTTrainer, SFTConfig, lambda: [{"prompt": r["prompt"], "completion": r["completion"]} for r in labelled()])],
)  # fmt: skip
def test_trl_example_scripts(work: Path, trainer_class, config, rows):  # noqa: F811
    for split in ("train", "test"):
        write_lines(work / "data" / f"{split}.jsonl", rows())
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    words = (
        f"--dataset_name data --model_name_or_path {CHAT} --learning_rate 5.0e-6 --max_steps 2 --eval_strategy steps "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_steps 1 --output_dir out --use_cpu "
        "--no_remove_unused_columns --use_peft --lora_r 4 --lora_alpha 16 --lora_target_modules q_proj v_proj"
    )
    script_args, training_args, model_args = parser.parse_args_and_config(words.split())
    trainer = main(script_args, training_args, model_args, trainer_class)
    adapter = json.loads(Path("out/adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], sorted(adapter["target_modules"])) == (4, ["q_proj", "v_proj"])
    assert any("eval_loss" in row for row in trainer.state.log_history)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        next(row["eval_loss"] for row in reversed(trainer.state.log_history) if "eval_loss" in row), rel=1e-4
    )


# --- the trainers' own ---------------------------------------------------------------------------


def test_texts_train_as_texts(work: Path):  # noqa: F811
    rows = [{"text": row["chosen"]} for row in preferences()]
    SFTTrainer(CHAT, SFTConfig("text", **QUICK), train_dataset=rows).train()
    by_function = SFTTrainer(CHAT, SFTConfig("formatted", **QUICK), train_dataset=preferences(),
                             formatting_func=lambda row: row["chosen"])  # fmt: skip
    by_function.train()
    first, second = (trueup.Run(Path(name), {}, None).history for name in ("text", "formatted"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_older_ways_of_saying_it(work: Path):  # noqa: F811
    args = TrainingArguments(output_dir="old", max_steps=1, per_device_train_batch_size=2, logging_steps=1,
                             save_strategy="no", use_cpu=True)  # fmt: skip
    trainer = DPOTrainer(CHAT, None, args=args, beta=0.3, max_length=128, loss_type="ipo", train_dataset=preferences(),
                         peft_config=LoraConfig(r=4), tokenizer=AutoTokenizer.from_pretrained(CHAT))  # fmt: skip
    trainer.train()
    config = trueup.Run(Path("old"), {}, None).output_dir / "run.yaml"
    said = config.read_text(encoding="utf-8")
    assert "pref_beta: 0.3" in said and "pref_loss: ipo" in said and "cutoff_len: 128" in said


def test_evaluation_before_and_after_and_saving_elsewhere(work: Path):  # noqa: F811
    trainer = DPOTrainer(CHAT, args=DPOConfig("out", **{**QUICK, "learning_rate": 1e-3}), train_dataset=preferences(),
                         eval_dataset=DatasetDict({"train": Dataset.from_list(preferences(4))}),
                         peft_config=LoraConfig(r=4, target_modules="all-linear"))  # fmt: skip
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] != 0
    trainer.save_model("elsewhere")
    assert torch.equal(
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(CHAT), "elsewhere")),
        logits(trainer.model),
    )


def test_training_resumes(work: Path):  # noqa: F811
    args = {**QUICK, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = DPOTrainer(CHAT, args=DPOConfig("out", **args), train_dataset=preferences(), peft_config=LoraConfig(r=4))
    trainer.train()
    whole = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    again = DPOTrainer(CHAT, args=DPOConfig("out", **args), train_dataset=preferences(), peft_config=LoraConfig(r=4))
    again.train(resume_from_checkpoint="out/checkpoint-2")
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == whole


class Stopper(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, logs["loss"]))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return control


def test_callbacks_hear_and_may_end_a_training(work: Path):  # noqa: F811
    callback = Stopper()
    trainer = DPOTrainer(CHAT, args=DPOConfig("out", **{**QUICK, "max_steps": 6}), train_dataset=preferences(),
                         peft_config=LoraConfig(r=4), callbacks=[callback])  # fmt: skip
    trainer.train()
    assert [step for step, _ in callback.logs] == [1, 2]
    trainer.save_model("stopped")
    assert Path("stopped/adapter_model.safetensors").exists()
    early = DPOTrainer(CHAT, args=DPOConfig("early", **QUICK), train_dataset=preferences(),
                       callbacks=[EarlyStoppingCallback(3)])  # fmt: skip
    assert early._keys["early_stopping_steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"data_collator": print}, "train_on_prompt"),
        ({"compute_metrics": print}, "callbacks"),
        ({"optimizers": (object(), None)}, "learning_rate"),
        ({"peft_config": LoraConfig(r=4, bias="all")}, "bias"),
        ({"callbacks": [print]}, "TrainerCallback"),
        ({"max_prompt_length": 12}, "cutoff_len"),
        ({"args": DPOConfig("out", model_init_kwargs={"quantum": 1})}, "quantum"),
        ({"args": DPOConfig("out", leraning_rate=1)}, "learning_rate"),
        ({"args": DPOConfig("out", reference_free=True)}, "simpo"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_our_name(work: Path, arguments: dict, word: str):  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        DPOTrainer(CHAT, **{"args": DPOConfig("out", **QUICK), **arguments}, train_dataset=preferences()).train()
    assert word in str(caught.value)
    assert not Path("out").exists()
