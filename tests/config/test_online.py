"""Keys of the stages that learn from their own answers: what unset ones mean, what goes together."""

from __future__ import annotations

import pytest

from trueup.config.load import dump_yaml, load_config
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "reward_funcs": "r.py:f"}


def load(stage: str, **keys):
    return load_config({**BASE, "stage": stage, **keys})


def problems(stage: str, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        load(stage, **keys)
    return "\n".join(map(str, caught.value.problems))


@pytest.mark.parametrize(
    "stage, answers, passes, price, clip",
    [("ppo", 1, 4, 0.05, 0.2), ("grpo", 8, 1, 0.0, 0.2), ("rloo", 4, 1, 0.05, 0.2), ("online_dpo", 2, 1, None, None)],
)
def test_unset_keys_mean_what_the_stage_has(stage, answers, passes, price, clip):
    online = load(stage).online
    assert (online.num_generations, online.ppo_epochs) == (answers, passes)
    assert (online.ppo_kl_coeff, online.ppo_clip_ratio) == (price, clip)


@pytest.mark.parametrize(
    "loss, low, high, scale",
    [("dapo", 0.2, 0.2, "group"), ("gspo", 3e-4, 4e-4, "group"), ("cispo", None, 5.0, "group"),
     ("dr_grpo", 0.2, 0.2, "no")],
)  # fmt: skip
def test_unset_keys_mean_what_the_loss_has(loss, low, high, scale):
    online = load("grpo", grpo_loss=loss).online
    assert (online.ppo_clip_ratio, online.ppo_clip_ratio_high, online.scale_rewards) == (low, high, scale)


def test_answers_come_from_the_model_itself_unless_asked_otherwise():
    generate = load("grpo").generate
    assert (generate.temperature, generate.top_p, generate.top_k) == (1.0, 1.0, 0)
    assert load("grpo", temperature=0.95).generate.temperature == 0.95
    assert load_config({**BASE, "stage": "sft", "reward_funcs": []}).generate.temperature == 0.95


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.95, "top_k": 50}, {"grpo_loss": "cispo"}, {"stage": "ppo"}])
def test_a_written_config_loads_equal(tmp_path, keys):
    cfg = load(**{"stage": "grpo", **keys})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(cfg), encoding="utf-8")
    assert load_config(path) == cfg


def test_what_is_missing_or_in_vain_is_an_error():
    assert "nobody says what a good answer is" in problems("grpo", reward_funcs=[])
    assert "one answer cannot be compared" in problems("grpo", num_generations=1)
    assert "`reward_weights` needs one number" in problems("grpo", reward_weights="1,2")
    assert "`ref_model` is compared with at a price of 0" in problems("grpo", ref_model="r")
    assert "`ppo_clip_ratio` has no effect with `grpo_loss: cispo`" in problems("grpo", grpo_loss="cispo", epsilon=0.1)
    assert "`grpo_loss` has no effect with `stage: rloo`" in problems("rloo", grpo_loss="dapo")
    assert "`num_beams` does nothing in training" in problems("grpo", num_beams=4)
    assert "`temperature` does nothing in training" in problems("sft", temperature=0.5, reward_funcs=[])


def test_what_a_judge_or_the_sampling_makes_idle_is_an_error():
    judged = {"reward_funcs": [], "judge": "j.py:f"}
    assert load("online_dpo", **judged, reward_timeout=5).online.reward_timeout == 5
    assert load("grpo", reward_timeout=5).online.reward_timeout == 5
    by_model = {"reward_funcs": [], "reward_model": "r"}
    assert "`reward_timeout` has no effect" in problems("grpo", **by_model, reward_timeout=5)
    assert "`missing_eos_penalty` has no effect" in problems("online_dpo", **judged, missing_eos_penalty=1.0)
    assert "`ppo_target` has no effect" in problems("ppo", ppo_kl_coeff=0, ppo_target=6.0)
    assert "all answers of a prompt are the same" in problems("grpo", temperature=0)
    assert "`packing` has no effect" in problems("grpo", packing=True)


@pytest.mark.parametrize(
    "keys",
    [{"eval_dataset": "e"}, {"val_size": 0.1}, {"do_eval": True, "eval_dataset": "e"},
     {"eval_strategy": "steps", "val_size": 5}],
)  # fmt: skip
def test_a_judge_has_nothing_to_say_of_an_evaluation(keys):
    assert "`judge` compares two" in problems("online_dpo", reward_funcs=[], judge="j.py:f", **keys)
    assert load("online_dpo", **keys).train.do_eval


@pytest.mark.parametrize("key, value", [("ppo_clip_ratio", 0.1), ("ppo_clip_ratio_high", 0.3), ("epsilon_high", 0.28)])
def test_what_would_clip_a_ratio_of_one_is_an_error(key, value):
    assert "learnt from in a single step" in problems("grpo", **{key: value})
    assert "learnt from in a single step" in problems("ppo", ppo_epochs=1, ppo_value_clip=0.1)
    for more in ({"ppo_epochs": 2}, {"ppo_buffer_size": 2}):
        load("grpo", **{key: value}, **more)
    load("grpo", ppo_clip_ratio=0.2)  # what happens anyway
    load("grpo", grpo_loss="cispo", ppo_clip_ratio_high=0.5)  # a cap on the weight itself
    load("rloo", lora_dropout=0.1, **{key: value})  # the policy that learns drops entries, the one before did not
    load("ppo", **{key: value})


def test_a_reward_model_is_what_it_is_said_to_be():
    url = {"reward_funcs": [], "reward_model": "http://localhost:1/"}
    assert load("grpo", **url, reward_model_type="api").online.reward_model_type == "api"
    assert "go together" in problems("grpo", **url, reward_model_type="lora")
    assert "go together" in problems("grpo", reward_model="rm", reward_model_type="api")
    assert "no effect on a scorer" in problems("grpo", **url, reward_model_adapters="a")
    assert "belong to" in problems("grpo", reward_model="rm", reward_model_type="full", reward_model_adapters="a")
    assert "`reward_model_type` has no effect with no `reward_model`" in problems("grpo", reward_model_type="full")


def test_trl_names_are_read():
    cfg = load("grpo", epsilon=0.1, epsilon_high=0.28, num_iterations=2, scale_rewards=False, max_completion_length=99)
    assert (cfg.online.ppo_clip_ratio, cfg.online.ppo_clip_ratio_high, cfg.online.ppo_epochs) == (0.1, 0.28, 2)
    assert cfg.online.scale_rewards == "no" and cfg.generate.max_new_tokens == 99


def test_a_dpo_beta_beside_ppo_is_said_to_be_idle(caplog):
    with caplog.at_level("INFO", "trueup"):
        load("ppo", dpo_beta=0.1)
    assert "`pref_beta` has no effect with `stage: ppo`" in caplog.text
