"""Every command line of the guides our users come with, as they are typed."""

from __future__ import annotations

import shlex

import pytest

from trueup.config.load import load_config
from trueup.errors import ConfigError

G2 = (
    "--do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat --template default "
    "--finetuning_type lora --lora_rank 8 --lora_alpha 16 --lora_target all "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
    "--lr_scheduler_type cosine --logging_steps 5 --save_steps 100 --learning_rate 1e-5 "
    "--num_train_epochs 1.0 --plot_loss --fp16 "
)
G3 = (
    "model_name_or_path=./Qwen3-4B-Base output_dir=./saves/qwen3-4b-base/lora/dpo stage=dpo "
    "adapter_name_or_path=./saves/qwen3-4b-base/lora/sft/checkpoint-2000 dataset=ultrafeedback "
    "template=qwen3 pref_beta=0.1 learning_rate=5.0e-6 num_train_epochs=2.0 lora_rank=8 "
    "per_device_train_batch_size=1 gradient_accumulation_steps=8 cutoff_len=2048 bf16=true "
    "ddp_timeout=180000000 preprocessing_num_workers=16 overwrite_output_dir=true plot_loss=true "
)
G4 = "--fp16 True --plot_loss True --report_to none --output_dir ./out "

WORKS = {
    "G2 sft": "--stage sft --do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat "
    "--dataset sql_gen_custom --finetuning_type lora "
    "--output_dir saves/Qwen1.5-7B/lora/sql_generator_v1",
    "G2 dpo": G2 + "--stage dpo --dataset sql_dpo_custom --dpo_beta 0.1 "
    "--adapter_name_or_path saves/Qwen1.5-7B/lora/sql_generator_v1 "
    "--output_dir saves/Qwen1.5-7B/lora/sql_dpo_v1",
    "G3 dpo": G3 + "pref_loss=sigmoid pref_ftx=0.0",
    "G3 dpo with sft": G3 + "pref_loss=sigmoid pref_ftx=0.1",
    "G3 hinge": G3 + "pref_loss=hinge",
    "G3 orpo": G3 + "pref_loss=orpo pref_ftx=0.1",
    "G3 kto": "model_name_or_path=m dataset=kto_en_demo stage=kto kto_chosen_weight=1.0",
    "G2 rm": G2 + "--stage rm --dataset sql_dpo_custom",
    "G3 evaluation": "model_name_or_path=./Qwen3-4B-Base stage=dpo do_train=false do_eval=true "
    "adapter_name_or_path=./saves/qwen3-4b-base/lora/dpo/checkpoint-1875 "
    "eval_dataset=ultrafeedback template=qwen3 output_dir=./saves/eval",
    "G4 pretrain": G4 + "--stage pretrain --model_name_or_path ./Qwen2.5-7B --dataset my_pretrain "
    "--lora_target q_proj,v_proj --finetuning_type lora",
    "G4 sft": G4 + "--stage sft --model_name_or_path ./pretrain_output --dataset my_sft "
    "--lora_target all-linear --max_seq_length 1024 --evaluation_strategy steps --eval_steps 50 "
    "--load_best_model_at_end True",
    "G2 ppo": G2 + "--stage ppo --dataset sql_ppo_prompts --ppo_score_norm --kl_coeff 0.1 "
    "--reward_model saves/Qwen1.5-7B/lora/sql_reward_model_v1 --dpo_beta 0.1",
    "G4 rlhf": G4 + "--stage rlhf --model_name_or_path ./sft_output --dataset my_sft "
    "--rm_path ./rm_output --ppo_clip_ratio 0.2 --ppo_kl_coeff 0.05 --max_grad_norm 1.0",
    "G4 mixed": G4 + "--stage dpo --model_name_or_path ./sft_output "
        "--dataset my_dpo_data,my_knowledge_data --dpo_beta 0.1 --kto_alpha 0.5",
    "G4 rm": G4 + "--stage rm --model_name_or_path ./sft_output --dataset my_rm --lora_target value",
    "G4 qlora": G4 + "--stage sft --model_name_or_path m --dataset my_sft --load_in_4bit True",
    "G3 qlora": G3 + "quantization_bit=4",
    "G4 dpo": G4 + "--stage dpo --model_name_or_path ./sft_output --dataset my_dpo_data "
    "--dpo_beta 0.1",
}  # fmt: skip

LLAMA_FACTORY = """
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
flash_attn: auto

### method
stage: {stage}
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
{method}

### dataset
dataset: dpo_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3-4b/lora/{stage}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
include_num_input_tokens_seen: true

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

INFERENCE = [
    "--model_name_or_path ./Qwen3-4B-Base --template qwen3 "
    "--adapter_name_or_path ./saves/qwen3-4b-base/lora/dpo/checkpoint-1875",
    "--model_name_or_path ./m --adapter_name_or_path ./dpo_output --finetuning_type lora --device cuda:0",
    "--model_name_or_path ./m --adapter_name_or_path ./dpo_output --export_dir ./merged_model "
    "--export_size 2 --export_legacy_format False",
]


@pytest.mark.parametrize("line", WORKS.values(), ids=WORKS.keys())
def test_supported_lines_of_the_guides_load(line):
    cfg = load_config(None, shlex.split(line))
    assert cfg.model.model_name_or_path
    assert cfg.train.do_train or "evaluation" in line or cfg.train.do_eval


@pytest.mark.parametrize("line", INFERENCE)
def test_chat_and_export_lines_need_no_data(line):
    assert load_config(None, shlex.split(line), verb="infer").model.model_name_or_path


@pytest.mark.parametrize(
    "stage, method, later",
    [
        ("dpo", "pref_beta: 0.1\npref_loss: sigmoid  # choices: [sigmoid (dpo), orpo]", None),
        ("sft", "", None),
        ("pt", "", None),
        ("kto", "pref_beta: 0.1", None),
        ("sft", "deepspeed: ds_z3_config.json", "`deepspeed` is not supported yet"),
        ("sft", "quantization_bit: 4\nquantization_method: bnb\ndouble_quantization: false", None),
    ],
)  # fmt: skip
def test_llama_factorys_example_files_load_as_they_are(tmp_path, stage, method, later):
    path = tmp_path / "llama3_lora.yaml"
    path.write_text(LLAMA_FACTORY.format(stage=stage, method=method), encoding="utf-8")
    if later is None:
        assert load_config(path).objective.stage == stage
        return
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.what for problem in caught.value.problems] == [later]


def test_what_the_guides_lines_mean():
    cfg = load_config(None, shlex.split(WORKS["G2 dpo"]))
    assert (cfg.objective.pref_beta, cfg.train.fp16, cfg.train.plot_loss) == (0.1, True, True)
    assert cfg.model.adapter_name_or_path == ["saves/Qwen1.5-7B/lora/sql_generator_v1"]
    cfg = load_config(None, shlex.split(WORKS["G4 sft"]))
    assert (cfg.data.cutoff_len, cfg.tuning.lora_target) == (1024, ["all"])
    assert (cfg.train.eval_strategy, cfg.train.eval_steps) == ("steps", 50)
    assert (cfg.train.metric_for_best_model, cfg.train.greater_is_better) == ("loss", False)
    cfg = load_config(None, shlex.split(WORKS["G4 pretrain"]))
    assert (cfg.objective.stage, cfg.tuning.lora_target) == ("pt", ["q_proj", "v_proj"])
    assert cfg.train.report_to == []
    cfg = load_config(None, shlex.split(WORKS["G3 evaluation"]))
    assert (cfg.train.do_train, cfg.train.do_eval) == (False, True)
