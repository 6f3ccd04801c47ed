"""The command lines of the guides our users come with, run as they stand: only the program's name is changed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.guides.conftest import (
    files,
    read_json,
    read_lines,
    register,
    sentences,
    succeed,
    trueup,
    write_json,
    write_lines,
)
from trueup.recipes.program import OfflineProgram

PROBE = torch.arange(5, 40)[None]


def best_and_worse(count: int = 24) -> list[dict]:
    """G2's rows: the same query formatted and commented, and on one bare line."""
    text = sentences()
    rows = []
    for _ in range(count):
        query = text(4)
        worse, best = f"SELECT {query}", f"-- {text(2)}\nSELECT\n  {query};"
        rows.append({"instruction": text(5), "output": [{"content": best}, {"content": worse}]})
    return rows


def instructions(count: int = 24) -> list[dict]:
    text = sentences(1)
    return [{"instruction": text(5), "input": text(2) if i % 2 else "", "output": text(6)} for i in range(count)]


def chosen_rejected(count: int = 24) -> list[dict]:
    text = sentences(2)
    return [{"instruction": text(5), "input": "", "chosen": text(6), "rejected": text(3)} for _ in range(count)]


def plain_peft(base: str, adapter: str) -> torch.Tensor:
    """Logits of the adapter on its original base with nothing but transformers and peft."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(PROBE).logits


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Name of an output directory → logits the policy gave when its last checkpoint was written."""
    seen: dict[str, torch.Tensor] = {}
    save = OfflineProgram.save_model

    def spy(self: OfflineProgram, directory: Path, masters) -> None:
        save(self, directory, masters)
        with torch.no_grad(), self.policy.generating():
            seen[directory.parent.name] = self.policy.model(PROBE).logits

    monkeypatch.setattr(OfflineProgram, "save_model", spy)
    return seen


# --- G1: DPO with the web board ------------------------------------------------------------------

G1 = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
template: qwen
stage: dpo
do_train: true
finetuning_type: lora
dataset: dpo_zh_demo
learning_rate: 1.0e-4
num_train_epochs: 3.0
{compute}: true
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
lora_rank: 8
lora_alpha: 16
output_dir: saves/Qwen2.5-0.5B-Instruct/lora/train_1
"""


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_g1_its_parameters_train_on_the_built_in_sample_and_the_adapter_talks(work: Path, compute: str):
    Path("dpo.yaml").write_text(G1.format(compute=compute), encoding="utf-8")
    result = succeed("train dpo.yaml")
    assert f"{compute} is not supported on this cpu; computing in float32" in result.stderr
    output = work / "saves/Qwen2.5-0.5B-Instruct/lora/train_1"
    assert (output / "adapter_model.safetensors").is_file()
    assert read_json(output / "status.json")["state"] == "finished"
    assert (output / "training_loss.png").is_file()
    talk = "chat --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --template qwen --max_new_tokens 3"
    assert "assistant: " in succeed(talk, input="你好\n").stdout
    adapter = "--adapter_name_or_path saves/Qwen2.5-0.5B-Instruct/lora/train_1"
    assert "assistant: " in succeed(f"{talk} {adapter}", input="你好\n").stdout
    both = succeed(f"{talk} {adapter} --compare", input="你好\n").stdout
    assert "base: " in both and "adapter: " in both


# --- G2: the long DPO chapter --------------------------------------------------------------------

G2_SFT = (
    "train --stage sft --do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat --dataset sql_gen_custom "
    "--finetuning_type lora --output_dir saves/Qwen1.5-7B/lora/sql_generator_v1"
)
G2_DPO = (
    "train --stage dpo --do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat "
    "--adapter_name_or_path saves/Qwen1.5-7B/lora/sql_generator_v1 --dataset sql_dpo_custom --template default "
    "--finetuning_type lora --lora_rank 8 --lora_alpha 16 --lora_target all "
    "--output_dir saves/Qwen1.5-7B/lora/sql_dpo_v1 --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 5 --save_steps 100 "
    "--learning_rate 1e-5 --num_train_epochs 1.0 --plot_loss --fp16 --dpo_beta 0.1"
)
G2_RM = (
    "train --stage rm --do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat --dataset sql_dpo_custom "
    "--template default --finetuning_type lora --output_dir saves/Qwen1.5-7B/lora/sql_reward_model_v1"
)
G2_PPO = (
    "train --stage ppo --do_train --model_name_or_path Qwen/Qwen1.5-7B-Chat "
    "--adapter_name_or_path saves/Qwen1.5-7B/lora/sql_generator_v1 "
    "--reward_model saves/Qwen1.5-7B/lora/sql_reward_model_v1 --dataset sql_ppo_prompts --template default "
    "--finetuning_type lora --lora_rank 8 --lora_alpha 16 --lora_target all "
    "--output_dir saves/Qwen1.5-7B/lora/sql_ppo_v1 --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 5 --save_steps 100 "
    "--learning_rate 1e-5 --num_train_epochs 1.0 --plot_loss --fp16"
)


def g2_data() -> None:
    sft = [{**row, "output": row["output"][0]["content"]} for row in best_and_worse()]
    write_json("data/sql_gen_custom.json", sft)
    write_json("data/sql_dpo_custom.json", best_and_worse())
    entry = {"file_name": "sql_dpo_custom.json", "ranking": True}
    register({"sql_gen_custom": {"file_name": "sql_gen_custom.json"}, "sql_dpo_custom": entry})


def test_g2_sft_then_dpo_from_its_adapter(work: Path, trained: dict):
    g2_data()
    succeed(G2_SFT)
    result = succeed(G2_DPO)
    assert "sql_generator_v1" in result.stdout  # the header says where the policy starts
    for word in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl"):
        assert word in result.stdout
    assert "`dpo_beta` is read as `pref_beta`" in result.stderr
    output = work / "saves/Qwen1.5-7B/lora/sql_dpo_v1"
    assert (output / "training_loss.png").is_file()
    assert [row["step"] for row in read_lines(output / "metrics.jsonl")] == [5, 6]
    logits = plain_peft("Qwen/Qwen1.5-7B-Chat", str(output))
    torch.testing.assert_close(logits, trained["sql_dpo_v1"], atol=1e-5, rtol=1e-5)


def test_g2_the_reference_is_the_sft_model_and_the_policy_starts_there(work: Path):
    g2_data()
    succeed(f"{G2_SFT} --learning_rate 1e-2")
    succeed(f"{G2_DPO} --max_steps 1 --logging_steps 1")
    first = read_lines("saves/Qwen1.5-7B/lora/sql_dpo_v1/metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("shape", ["array", "lines", "one after another", "indented, one after another"])
def test_g2_rankings_in_every_file_shape(work: Path, shape: str):
    rows = best_and_worse(8)
    as_text = {
        "array": json.dumps(rows, ensure_ascii=False, indent=2),
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "one after another": " ".join(json.dumps(row) for row in rows),
        "indented, one after another": "\n".join(json.dumps(row, indent=2) for row in rows),
    }
    Path("data").mkdir()
    Path("data/rows.json").write_text(as_text[shape], encoding="utf-8")
    register({"sql_dpo_custom": {"file_name": "rows.json", "ranking": True}})
    result = succeed("check --stage dpo --model_name_or_path Qwen/Qwen1.5-7B-Chat --dataset sql_dpo_custom --json")
    report = json.loads(result.stdout)["result"]["data"]
    assert report["datasets"]["sql_dpo_custom"]["kept"] == report["splits"]["train"] == 8


# --- G3: the RL training guide (YAML) ------------------------------------------------------------

G3 = """
### model
model_name_or_path: ./Qwen3-4B-Base
adapter_name_or_path: ./saves/qwen3-4b-base/lora/sft/checkpoint-2000
trust_remote_code: true

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: {loss}
pref_ftx: {ftx}

### dataset
dataset: {dataset}
template: qwen3
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: ./saves/qwen3-4b-base/lora/dpo
logging_steps: 1
save_steps: 1
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
report_to: wandb
"""
G3_EVAL = """
model_name_or_path: ./Qwen3-4B-Base
adapter_name_or_path: ./saves/qwen3-4b-base/lora/dpo/checkpoint-1875
stage: dpo
do_train: false
do_eval: true
finetuning_type: lora
eval_dataset: ultrafeedback
template: qwen3
cutoff_len: 2048
output_dir: ./saves/qwen3-4b-base/lora/eval
per_device_eval_batch_size: 1
"""
G3_CHAT = (
    "chat --model_name_or_path ./Qwen3-4B-Base "
    "--adapter_name_or_path ./saves/qwen3-4b-base/lora/dpo/checkpoint-1875 --template qwen3"
)


def g3_config(loss: str = "sigmoid", ftx: float = 0.0, dataset: str = "ultrafeedback") -> str:
    Path("dpo_config.yaml").write_text(G3.format(loss=loss, ftx=ftx, dataset=dataset), encoding="utf-8")
    return "train dpo_config.yaml"


def g3_data() -> None:
    """`ultrafeedback` has the public set's columns; `my_pairs` is registered as the guide registers own data."""
    rows = []
    for row in chosen_rejected(16):
        question = {"role": "user", "content": row["instruction"]}
        sides = {side: [question, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        rows.append({"prompt": row["instruction"], "prompt_id": "0", **sides, "messages": sides["chosen"],
                     "score_chosen": 8.0, "score_rejected": 2.0})  # fmt: skip
    write_lines("data/ultrafeedback.jsonl", rows)
    own = [{key: row[key] for key in ("instruction", "chosen", "rejected")} for row in chosen_rejected(16)]
    write_json("data/my_pairs.json", own)
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    register({
        "ultrafeedback": {"file_name": "ultrafeedback.jsonl", "ranking": True},
        "my_pairs": {"file_name": "my_pairs.json", "ranking": True, "columns": columns},
    })  # fmt: skip


def g3_sft_checkpoint() -> None:
    """checkpoint-2000 of an SFT run, in two steps."""
    succeed(
        "train --stage sft --model_name_or_path ./Qwen3-4B-Base --dataset alpaca_en_demo --template qwen3 "
        "--max_steps 2 --save_steps 2 --learning_rate 1e-2 --output_dir ./saves/qwen3-4b-base/lora/sft"
    )
    sft = Path("saves/qwen3-4b-base/lora/sft")
    shutil.copytree(sft / "checkpoint-2", sft / "checkpoint-2000")


def test_g3_dpo_from_a_checkpoint_then_evaluate_and_chat_with_a_checkpoint(work: Path):
    g3_data()
    g3_sft_checkpoint()
    result = succeed(g3_config())
    output = work / "saves/qwen3-4b-base/lora/dpo"
    rows = read_lines(output / "metrics.jsonl")
    assert len(rows) == 4
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all({"kl", "rewards/chosen", "rewards/rejected", "rewards/margins"} <= row.keys() for row in rows)
    assert all(0 <= row["kl"] < 10 for row in rows)
    assert (output / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert "wandb" in result.stderr  # absent here: said, and no failure
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-1875")

    Path("eval_config.yaml").write_text(G3_EVAL, encoding="utf-8")
    before = files(work)
    succeed("train eval_config.yaml")
    evaluation = work / "saves/qwen3-4b-base/lora/eval"
    found = read_json(evaluation / "eval_results.json")
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl"} <= found.keys()
    assert not list(evaluation.glob("*.safetensors"))
    assert not {name for name in before if not (work / name).exists()}

    assert "assistant: " in succeed(f"{G3_CHAT} --max_new_tokens 3", input="Hello\n").stdout


def test_g3_own_pairs_with_an_sft_term_and_a_second_round_on_top(work: Path, trained: dict):
    g3_data()
    g3_sft_checkpoint()
    succeed(g3_config(ftx=0.1, dataset="my_pairs"))
    second = "adapter_name_or_path=./saves/qwen3-4b-base/lora/dpo output_dir=./saves/qwen3-4b-base/lora/dpo_2"
    succeed(f"train dpo_config.yaml {second}")
    first = read_lines("saves/qwen3-4b-base/lora/dpo_2/metrics.jsonl")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    logits = plain_peft("./Qwen3-4B-Base", "saves/qwen3-4b-base/lora/dpo_2")
    torch.testing.assert_close(logits, trained["dpo_2"], atol=1e-5, rtol=1e-5)


# --- G4: the whole pipeline ----------------------------------------------------------------------

G4_PRETRAIN = (
    "train --stage pretrain --model_name_or_path ./Qwen2.5-7B --dataset my_pretrain_data --finetuning_type lora "
    "--lora_rank 8 --lora_alpha 32 --lora_target q_proj,v_proj --output_dir ./pretrain_output "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --learning_rate 2e-4 --num_train_epochs 3 "
    "--max_seq_length 512 --logging_steps 10 --save_steps 100 --fp16 True --plot_loss True --report_to none"
)
G4_SFT = (
    "train --stage sft --model_name_or_path ./pretrain_output --dataset my_sft_data --finetuning_type lora "
    "--lora_rank 8 --lora_alpha 32 --lora_target all-linear --output_dir ./sft_output "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 1e-4 --num_train_epochs 3 "
    "--max_seq_length 1024 --logging_steps 10 --save_steps 100 --evaluation_strategy steps --eval_steps 50 "
    "--load_best_model_at_end True --fp16 True --plot_loss True --report_to none"
)
G4_DPO = (
    "train --stage dpo --model_name_or_path ./sft_output --dataset my_dpo_data --finetuning_type lora "
    "--lora_rank 4 --lora_target q_proj,v_proj,o_proj --output_dir ./dpo_output --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 4 --learning_rate 5e-5 --num_train_epochs 1 --logging_steps 1 "
    "--dpo_beta 0.1 --fp16 True --plot_loss True --report_to none"
)
G4_CHAT = (
    "chat --model_name_or_path ./Qwen2.5-7B --adapter_name_or_path ./dpo_output --finetuning_type lora --device cuda:0"
)
G4_EXPORT = (
    "export --model_name_or_path ./Qwen2.5-7B --adapter_name_or_path ./dpo_output --finetuning_type lora "
    "--export_dir ./merged_model --export_size 2 --export_legacy_format False"
)


def g4_data() -> None:
    """As the guide registers them: columns and type, never `ranking`."""
    text = sentences(3)
    write_json("data/my_pretrain_data.json", [{"text": text(40)} for _ in range(24)])
    write_json("data/my_sft_data.json", instructions(40))
    write_json("data/my_dpo_data.json", chosen_rejected())
    write_json("data/my_rm_data.json", [{**row, "output": [text(5), text(4), text(3)]} for row in instructions(8)])
    write_json("data/my_knowledge_data.json", instructions(8))
    alpaca = {"instruction": "instruction", "input": "input"}
    kinds = {
        "pretrain": {"text": "text"},
        "sft": {**alpaca, "output": "output"},
        "rm": {**alpaca, "output": "output"},
        "dpo": {**alpaca, "chosen": "chosen", "rejected": "rejected"},
    }
    register({
        f"my_{kind}_data": {"file_name": f"my_{kind}_data.json", "columns": columns, "type": kind}
        for kind, columns in kinds.items()
    })  # fmt: skip
    register({"my_knowledge_data": {"file_name": "my_knowledge_data.json", "type": "sft"}})


def test_g4_pretrain_sft_dpo_then_only_the_last_adapter_on_the_original_base(work: Path, trained: dict):
    g4_data()
    succeed(G4_PRETRAIN)
    result = succeed(G4_SFT)
    assert "template" in result.stderr and "default" in result.stderr  # this base model has none: said
    assert "5 %" in result.stderr  # evaluation without data: held out, and said
    assert {"eval_loss"} <= read_json("sft_output/eval_results.json").keys()
    succeed(G4_DPO)
    row = read_lines("dpo_output/metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for output in ("pretrain_output", "sft_output", "dpo_output"):
        assert read_json(f"{output}/adapter_config.json")["base_model_name_or_path"] == "./Qwen2.5-7B"
        assert (work / output / "training_loss.png").is_file()
        logits = plain_peft("./Qwen2.5-7B", output)
        torch.testing.assert_close(logits, trained[output], atol=1e-5, rtol=1e-5)
    chat = succeed(f"{G4_CHAT} --max_new_tokens 3", input="Hello\n")
    assert "assistant: " in chat.stdout
    if not torch.cuda.is_available():
        assert "cuda:0 is not present here; running on" in chat.stderr


def test_g4_export_of_only_the_last_adapter_on_the_original_base(work: Path):
    g4_data()
    succeed(f"{G4_SFT.replace('./pretrain_output', './Qwen2.5-7B')} --max_steps 1")
    succeed(f"{G4_DPO} --max_steps 1")
    result = succeed(G4_EXPORT)
    assert "files of at most 2 GB" in result.stderr  # one guide means bits by it
    merged = AutoModelForCausalLM.from_pretrained("./merged_model", dtype=torch.float32).eval()
    with torch.no_grad():
        found = merged(input_ids=PROBE).logits
    torch.testing.assert_close(found, plain_peft("./Qwen2.5-7B", "./dpo_output"), atol=1e-4, rtol=1e-4)
    assert "largest logit difference of the model from base + adapter" in " ".join(result.stdout.split())
    chat = succeed("chat --model_name_or_path ./merged_model --max_new_tokens 3", input="Hello\n")
    assert "assistant: " in chat.stdout
    refused = trueup(G4_EXPORT.replace("False", "True"))
    assert refused.exit_code == 2 and "safetensors" in refused.stderr


@pytest.mark.parametrize("loss", ["hinge", "orpo"])
def test_g3_other_losses_on_the_same_pairs(work: Path, loss: str):
    """hinge trains hinge and orpo trains ORPO, also with the guide's SFT term."""
    g3_data()
    g3_sft_checkpoint()
    succeed(f"{g3_config(loss, 0.1)} --max_steps 1 --report_to none")
    row = read_lines("saves/qwen3-4b-base/lora/dpo/metrics.jsonl")[0]
    assert row["sft_loss"] > 0
    if loss == "hinge":
        assert row["loss"] == pytest.approx(1 + 0.1 * row["sft_loss"], rel=1e-3)
    else:
        assert row["odds_ratio_loss"] > 0 and "kl" not in row


def test_g3_kto_on_labelled_answers(work: Path):
    line = "train --stage kto --model_name_or_path ./Qwen3-4B-Base --dataset kto_en_demo --template qwen3"
    succeed(f"{line} --max_steps 1 --output_dir kto --report_to none --logging_steps 1")
    assert read_lines("kto/metrics.jsonl")[0]["loss"] == pytest.approx(0.5, abs=1e-4)


def test_g4_pairs_mixed_with_knowledge(work: Path):
    g4_data()
    line = (
        "train --stage dpo --model_name_or_path ./Qwen2.5-7B --dataset my_dpo_data,my_knowledge_data "
        "--dpo_beta 0.1 --kto_alpha 0.5 --output_dir ./kto_output"
    )
    result = succeed(f"{line} --max_steps 1 --per_device_train_batch_size 32 --logging_steps 1 --report_to none")
    assert "`kto_alpha` is read as `knowledge_weight`" in result.stderr
    row = read_lines("kto_output/metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * row["knowledge_loss"], rel=1e-4)


def test_g4_a_base_model_without_a_template_gets_the_default_said_once(work: Path):
    g4_data()
    line = G4_SFT.replace("./pretrain_output", "./Qwen2.5-7B")
    result = succeed(f"{line} --max_steps 1")
    said = [row for row in result.stderr.splitlines() if "default" in row and "template" in row.lower()]
    assert len(said) == 1, result.stderr
    assert "template  default" in result.stdout


@pytest.mark.parametrize("words", ["--load_in_4bit True", "--quantization_bit 4"])
def test_g4_on_four_bits(work: Path, words: str):
    pytest.importorskip("bitsandbytes")
    g4_data()
    result = succeed(f"{G4_SFT.replace('./pretrain_output', './Qwen2.5-7B')} --max_steps 1 {words}")
    assert "4-bit weights (bitsandbytes nf4, constants too)" in result.stdout


# --- sample sets by name -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage"),
    [("dpo_zh_demo", "dpo"), ("dpo_en_demo", "dpo"), ("alpaca_zh_demo", "sft"), ("alpaca_en_demo", "sft"),
     ("identity", "sft")],
)  # fmt: skip
def test_sample_sets_train_out_of_the_box(work: Path, name: str, stage: str):
    succeed(f"train --stage {stage} --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset {name} --max_steps 1 "
            f"--output_dir out")  # fmt: skip
    entry = read_json("out/data_report.json")["datasets"][name]
    assert entry["read"] == entry["kept"] > 0
    assert not Path("data").exists()


def test_a_sample_set_of_the_same_name_in_the_users_registry_wins(work: Path):
    write_json("data/mine.json", instructions(3))
    register({"identity": {"file_name": "mine.json"}})
    succeed("train --stage sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset identity --max_steps 1 "
            "--output_dir out")  # fmt: skip
    assert read_json("out/data_report.json")["datasets"]["identity"]["read"] == 3


# --- as a program --------------------------------------------------------------------------------


def test_a_line_works_as_a_process_and_leaves_no_noise(work: Path):
    """One line through a shell's eyes: exit code, streams, and nothing of the libraries' own chatter."""
    g2_data()
    command = [sys.executable, "-m", "trueup", *G2_SFT.split(), "--max_steps", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "trueup chat --model_name_or_path Qwen/Qwen1.5-7B-Chat" in done.stdout
    assert done.stderr.strip() == ""
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_g3_on_two_devices_as_the_guide_starts_it(work: Path):
    """FORCE_TORCHRUN and a YAML; two processes on the CPU stand for the guide's two GPUs."""
    g3_data()
    g3_sft_checkpoint()
    environment = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trueup", *g3_config().split(), "device=cpu", "report_to=none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "× 2 processes" in done.stdout
    assert done.stdout.count("next\n") == 1
    assert [row["step"] for row in read_lines("saves/qwen3-4b-base/lora/dpo/metrics.jsonl")] == [1, 2]
    assert read_json("saves/qwen3-4b-base/lora/dpo/status.json")["state"] == "finished"
