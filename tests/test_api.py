"""trueup from Python: the same runs as from the command line, and what is loaded of them."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trueup
from tests.recipes.conftest import config, data_dir, labelled, pairs, private_cache, tiny_dir  # noqa: F401
from trueup.cli import main
from trueup.errors import ConfigError, DataError, ModelError
from trueup.training.events import Evaluated, Logged, Stepped
from trueup.training.loop import WALL_CLOCK

PROMPT, ANSWERS = "sun rain", ["gold star", "no"]


@pytest.fixture
def keys(tiny_dir: Path, tmp_path: Path) -> dict:  # noqa: F811
    return {
        "model_name_or_path": str(tiny_dir), "stage": "dpo", "lora_rank": 4, "cutoff_len": 128, "device": "cpu",
        "bf16": False, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "num_train_epochs": 1,
        "logging_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def numbers(history: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in WALL_CLOCK} for row in history]


def base_model(tiny: Path):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def adapted(tiny: Path, rank: int = 4) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base_model(tiny), LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


# --- runs --------------------------------------------------------------------------------------


def test_a_run_is_the_command_lines_to_the_bit(keys, tmp_path, data_dir):  # noqa: F811
    keys |= {"dataset": "pairs", "eval_dataset": "held", "dataset_dir": str(data_dir), "save_strategy": "epoch"}
    run = trueup.train(keys, quiet=True)
    file = tmp_path / "dpo.json"
    file.write_text(json.dumps({**keys, "output_dir": str(tmp_path / "cli")}), encoding="utf-8")
    result = CliRunner().invoke(main, ["train", str(file)])
    assert result.exit_code == 0, result.output
    other = trueup.Run(tmp_path / "cli", {}, run.config)
    assert numbers(run.history) == numbers(other.history) and len(run.history) > 5
    weights = "adapter_model.safetensors"
    assert (run.output_dir / weights).read_bytes() == (other.output_dir / weights).read_bytes()
    assert [path.name for path in run.checkpoints] == ["checkpoint-6"]
    assert run.metrics["eval_loss"] == run.history[-1]["eval_loss"]


def test_rows_in_memory_train_as_their_file_does(keys, data_dir, tmp_path):  # noqa: F811
    named = trueup.train(keys, dataset=str(data_dir / "pairs.jsonl"), quiet=True)
    for number, rows in enumerate((pairs(21), datasets.Dataset.from_list(pairs(21)), tuple(pairs(21)))):
        given = trueup.train(keys, train_dataset=rows, output_dir=str(tmp_path / str(number)), quiet=True)
        assert numbers(given.history) == numbers(named.history)


def test_evaluation_sets_in_memory_are_reported_by_name(keys):
    sets = {"near": pairs(6, seed=1), "far": pairs(4, seed=2)}
    run = trueup.train(keys, train_dataset=pairs(8), eval_dataset=sets, quiet=True)
    assert {"eval_near_loss", "eval_far_loss"} <= run.metrics.keys()
    assert json.loads((run.output_dir / "data_report.json").read_text(encoding="utf-8"))["datasets"].keys() == {
        "train", "near", "far"
    }  # fmt: skip


def test_a_file_and_keys_are_one_config(keys, tmp_path):
    file = tmp_path / "dpo.json"
    file.write_text(json.dumps(keys), encoding="utf-8")
    run = trueup.train(file, train_dataset=pairs(8), max_steps=1, beta=0.3, quiet=True)
    assert run.config.train.max_steps == 1 and run.config.objective.pref_beta == 0.3
    assert run.config.train.learning_rate == 1e-3


def test_every_problem_of_a_call_is_told_at_once(keys):
    with pytest.raises(ConfigError) as caught:
        trueup.train(keys, train_dataset=pairs(4), pref_beta=-1, leraning_rate=3, quiet=True)
    assert len(caught.value.problems) == 2 and "learning_rate" in str(caught.value)


def test_a_run_that_stood_on_memory_says_so_when_its_config_is_run_again(keys, tmp_path):
    run = trueup.train(keys, train_dataset=pairs(8), max_steps=1, quiet=True)
    with pytest.raises(ConfigError, match="memory:train was an object of the Python program"):
        trueup.train(run.output_dir / "run.yaml", output_dir=str(tmp_path / "again"), quiet=True)


def test_a_run_in_memory_resumes_to_the_bit(keys, tmp_path):
    whole = trueup.train(keys, train_dataset=pairs(16), save_strategy="steps", save_steps=2, quiet=True)
    part = trueup.train(keys, train_dataset=pairs(16), output_dir=str(tmp_path / "part"), save_strategy="steps",
                        save_steps=2, resume_from_checkpoint=str(whole.checkpoints[0]), quiet=True)  # fmt: skip
    assert numbers(part.history)[-1] == numbers(whole.history)[-1]


@pytest.mark.parametrize("rows", [iter([]), 7, [1, 2], {"a": [], "b": []}])
def test_what_is_no_dataset_is_refused(keys, rows):
    with pytest.raises(DataError):
        trueup.train(keys, train_dataset=rows, quiet=True)


# --- functions ---------------------------------------------------------------------------------


def test_an_objective_in_python_equals_the_same_one_built_in(keys, tmp_path):
    def my_dpo(logps: trueup.PairLogps) -> torch.Tensor:
        margin = (logps.chosen - logps.ref_chosen) - (logps.rejected - logps.ref_rejected)
        return -F.logsigmoid(0.1 * margin)

    own = trueup.train(keys, train_dataset=pairs(12), objective=my_dpo, quiet=True)
    built_in = trueup.train(keys, train_dataset=pairs(12), output_dir=str(tmp_path / "other"), quiet=True)
    assert [row["loss"] for row in own.history] == pytest.approx([row["loss"] for row in built_in.history], rel=1e-5)
    assert own.history[-1]["rewards/margins"] == pytest.approx(built_in.history[-1]["rewards/margins"], rel=1e-4)
    assert "custom_objective: memory:my_dpo" in (own.output_dir / "run.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["sft", "kto", "rm", "cpo"])
def test_an_objective_sees_what_its_stages_own_sees(keys, stage):
    seen = []

    def objective(given):
        seen.append(type(given).__name__)
        value = given.logps if stage == "sft" else given.answer if stage == "kto" else None
        if stage == "rm":
            return given.rewards[:, 1] - given.rewards[:, 0]
        return -value if value is not None else given.rejected - given.chosen

    rows = {
        "sft": [{"instruction": row["instruction"], "output": row["chosen"]} for row in pairs(8)],
        "kto": labelled(pairs(8)),
    }.get(stage, pairs(8))
    run = trueup.train({**keys, "stage": stage}, train_dataset=rows, objective=objective, max_steps=1, quiet=True)
    expected = {"sft": "TokenLogps", "kto": "FeedbackLogps", "rm": "Rankings", "cpo": "PairLogps"}
    assert set(seen) == {expected[stage]} and math.isfinite(run.history[0]["loss"])


def test_an_objective_leaves_no_room_for_another(keys):
    with pytest.raises(ConfigError, match="custom_objective"):
        trueup.train(keys, train_dataset=pairs(4), objective=lambda logps: logps.chosen, pref_loss="ipo", quiet=True)
    with pytest.raises(ConfigError, match="custom_objective"):
        trueup.train({**keys, "stage": "grpo"}, train_dataset=pairs(4), objective=lambda logps: logps.chosen,
                     reward_functions=lambda completions: [0.0] * len(completions), quiet=True)  # fmt: skip


def test_reward_functions_are_called_with_the_columns_they_ask_for(keys):
    seen = []

    def brevity(completions, colour):
        seen.extend(colour)
        return [-float(len(text)) for text in completions]

    rows = [{"prompt": row["instruction"], "colour": "red"} for row in pairs(4)]
    run = trueup.train(
        {**keys, "stage": "grpo", "num_generations": 2, "max_new_tokens": 4, "per_device_train_batch_size": 2},
        train_dataset=rows, reward_functions=[brevity, lambda completions: [1.0] * len(completions)], max_steps=1,
        quiet=True,
    )  # fmt: skip
    assert set(seen) == {"red"} and run.history[0]["rewards/brevity/mean"] < 0
    assert run.history[0]["rewards/function/mean"] == 1.0


def test_a_reward_function_that_raises_ends_the_run_with_its_own_error(keys):
    def broken(completions):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trueup.train({**keys, "stage": "grpo", "max_new_tokens": 2}, train_dataset=[{"prompt": "sun"}] * 4,
                     reward_functions=broken, quiet=True)  # fmt: skip


def test_callbacks_see_what_happens_and_hurt_nothing(keys, caplog):
    events = []

    def faulty(event):
        raise RuntimeError("never mind")

    with caplog.at_level(logging.WARNING, "trueup"):
        run = trueup.train(keys, train_dataset=pairs(8), eval_dataset=pairs(4, seed=1), quiet=True,
                           callbacks=[events.append, faulty])  # fmt: skip
    kinds = [type(event) for event in events]
    assert kinds.count(Stepped) == 2 and Logged in kinds and Evaluated in kinds and run.metrics["eval_loss"] > 0
    assert "switched off" in caplog.text


# --- models in memory --------------------------------------------------------------------------


def test_a_model_in_memory_trains_as_its_directory_does(keys, tiny_dir, tmp_path):  # noqa: F811
    named = trueup.train(keys, train_dataset=pairs(12), quiet=True)
    model = base_model(tiny_dir)
    keys = {key: value for key, value in keys.items() if key != "model_name_or_path"}
    run = trueup.train(
        {**keys, "output_dir": str(tmp_path / "other")}, model=model, train_dataset=pairs(12), quiet=True
    )
    assert numbers(run.history) == numbers(named.history)
    weights = "adapter_model.safetensors"
    assert (run.output_dir / weights).read_bytes() == (named.output_dir / weights).read_bytes()
    assert run.model().logps(PROMPT, ANSWERS) == pytest.approx(named.model().logps(PROMPT, ANSWERS), abs=1e-4)
    assert json.loads((run.output_dir / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ] == str(tiny_dir)


def test_a_peft_model_in_memory_is_trained_in_place_and_remains_one(keys, tiny_dir):  # noqa: F811
    model = adapted(tiny_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    ids = torch.tensor([tokenizer.encode("sun rain")])
    before = copy.deepcopy(model.state_dict())
    keys = {key: value for key, value in keys.items() if key not in ("model_name_or_path", "lora_rank")}
    run = trueup.train(keys, model=model, tokenizer=tokenizer, train_dataset=pairs(12), quiet=True)
    assert run.history[0]["rewards/margins"] == 0  # the reference is the model as it was given
    assert set(model.peft_config) == {"default"} and model.state_dict().keys() == before.keys()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    fresh = PeftModel.from_pretrained(base_model(tiny_dir), run.output_dir)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, fresh(ids).logits, atol=1e-5)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assert type(model.base_model.model.model.norm).__name__ == "Qwen2RMSNorm"


def test_a_peft_model_that_has_learnt_is_its_own_reference(keys, tiny_dir, tmp_path):  # noqa: F811
    keys = {key: value for key, value in keys.items() if key not in ("model_name_or_path", "lora_rank")}
    model = adapted(tiny_dir)
    trueup.train(keys, model=model, train_dataset=pairs(12), quiet=True)
    again = trueup.train(
        {**keys, "output_dir": str(tmp_path / "again")}, model=model, train_dataset=pairs(12), quiet=True
    )
    assert again.history[0]["rewards/margins"] == 0 and again.history[0]["loss"] == pytest.approx(math.log(2))


def test_full_training_moves_every_weight_of_a_model_in_memory_even_after_lora(keys, tiny_dir, tmp_path):  # noqa: F811
    keys = {key: value for key, value in keys.items() if key not in ("model_name_or_path", "lora_rank")}
    model = adapted(tiny_dir)
    trueup.train(keys, model=model, train_dataset=pairs(8), quiet=True)
    merged = model.merge_and_unload()
    norm = merged.model.norm.weight.detach().clone()
    trueup.train({**keys, "finetuning_type": "full", "output_dir": str(tmp_path / "full")}, model=merged,
                 train_dataset=pairs(8), quiet=True)  # fmt: skip
    assert not torch.equal(merged.model.norm.weight, norm)


def test_models_in_memory_that_no_run_has_a_use_for_are_refused(keys, tiny_dir):  # noqa: F811
    keys = {key: value for key, value in keys.items() if key not in ("model_name_or_path",)}
    with pytest.raises(ConfigError, match="lora_rank"):
        trueup.train(keys, model=adapted(tiny_dir, rank=2), train_dataset=pairs(4), quiet=True)
    with pytest.raises(ModelError, match="carries an adapter"):
        trueup.train(keys, model=adapted(tiny_dir).get_base_model(), train_dataset=pairs(4), quiet=True)
    with pytest.raises(ModelError, match="Qwen2Model"):
        trueup.train(keys, model=base_model(tiny_dir).model, train_dataset=pairs(4), quiet=True)


def test_a_reference_in_memory_is_the_reference(keys, tiny_dir):  # noqa: F811
    run = trueup.train(keys, ref_model=base_model(tiny_dir), train_dataset=pairs(8), max_steps=1, quiet=True)
    assert run.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


# --- loaded models -----------------------------------------------------------------------------


def test_log_probabilities_are_those_of_plain_transformers(tiny_dir):  # noqa: F811
    model = trueup.load(tiny_dir, device="cpu", bf16=False)
    plain = base_model(tiny_dir)
    prompt = model.template.encode_prompt(model._messages(PROMPT))
    for answer, tokens in zip(ANSWERS, model.logps(PROMPT, ANSWERS, per_token=True), strict=True):
        ids = model.tokenizer.encode(answer + "<|im_end|>")
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert tokens[: len(ids)] == pytest.approx(expected.tolist(), abs=1e-4)
    assert model.logps(PROMPT, ANSWERS[0]) == pytest.approx(model.logps(PROMPT, ANSWERS)[0], abs=1e-5)


def test_an_implicit_reward_is_measured_against_the_base(keys):
    run = trueup.train(keys, train_dataset=pairs(12), quiet=True)
    model, base = run.model(), trueup.load(keys["model_name_or_path"], device="cpu", bf16=False)
    expected = [0.5 * (a - b) for a, b in zip(model.logps(PROMPT, ANSWERS), base.logps(PROMPT, ANSWERS), strict=True)]
    assert model.reward(PROMPT, ANSWERS, beta=0.5) == pytest.approx(expected, abs=1e-4)
    assert model.reward(PROMPT, ANSWERS, beta=0.5, reference=base) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="reference"):
        base.reward(PROMPT, ANSWERS)


def test_a_reward_model_scores_and_does_not_write(keys):
    run = trueup.train({**keys, "stage": "rm"}, train_dataset=pairs(12), quiet=True)
    model = run.model()
    scores = model.reward(PROMPT, ANSWERS)
    assert model.scores and len(scores) == 2 and model.reward(PROMPT, ANSWERS[0]) == pytest.approx(scores[0], abs=1e-5)
    with pytest.raises(ConfigError, match="reward"):
        model.generate(PROMPT, max_new_tokens=2)


def test_prompts_are_texts_or_conversations_and_answers_repeat_with_a_seed(tiny_dir):  # noqa: F811
    model = trueup.load(tiny_dir, device="cpu", bf16=False)
    said = [{"role": "user", "content": PROMPT}]
    assert model.generate(PROMPT, max_new_tokens=4) == model.chat(said, max_new_tokens=4)
    assert model.generate([PROMPT, said], max_new_tokens=4) == [model.generate(PROMPT, max_new_tokens=4)] * 2
    drawn = [model.generate([PROMPT], num_answers=3, max_new_tokens=6, temperature=1.0, seed=3) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0][0]) == 3 and len(set(drawn[0][0])) > 1
    assert "".join(model.chat(PROMPT, stream=True, max_new_tokens=4)) == model.chat(PROMPT, max_new_tokens=4)
    with pytest.raises(ConfigError, match="temprature"):
        model.generate(PROMPT, temprature=1)
    with pytest.raises(DataError, match="conversation"):
        model.generate([{"who": "user"}])
    model.engine.close()


def test_merging_leaves_the_models_words_as_they_are(keys, tmp_path):
    run = trueup.train(keys, train_dataset=pairs(12), quiet=True)
    model = run.model()
    merged = trueup.load(model.merge(tmp_path / "merged"), device="cpu", bf16=False)
    assert merged.logps(PROMPT, ANSWERS) == pytest.approx(model.logps(PROMPT, ANSWERS), abs=1e-3)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_model_in_memory_is_spoken_with_and_left_as_it_was(tiny_dir):  # noqa: F811
    own = base_model(tiny_dir)
    model = trueup.load(own, device="cpu", bf16=False)
    named = trueup.load(tiny_dir, device="cpu", bf16=False)
    assert model.logps(PROMPT, ANSWERS) == pytest.approx(named.logps(PROMPT, ANSWERS), abs=1e-4)
    assert own(torch.tensor([[5, 6, 7]])).logits.shape[1] == 3
