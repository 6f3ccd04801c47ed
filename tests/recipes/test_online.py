"""Stages that learn from their own answers: what must not change the result, resumes to the bit, what a run leaves."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_scorer import save_encoder
from tests.training.processes import needs_fork, run_ranks
from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.errors import ConfigError, ModelError
from trueup.models.load import load_policy, load_tokenizer
from trueup.models.scorer import load_text_scorer
from trueup.models.value import ValueHead
from trueup.recipes.batches import plan_batches
from trueup.recipes.check import check
from trueup.recipes.collector import Collected
from trueup.recipes.judges import Judges, load_judges
from trueup.recipes.learners import LeaveOneOut, OnlineDpo
from trueup.recipes.online import make_program
from trueup.recipes.online_program import OnlineProgram
from trueup.recipes.prompts import PromptRows
from trueup.recipes.run import run
from trueup.rollout.rollout import Rollout
from trueup.rollout.sampler import Sampled
from trueup.training.backend import Single
from trueup.training.loop import WALL_CLOCK
from trueup.training.run_directory import read_metrics, read_status
from trueup.training.step import step_totals

Config = Callable[..., RunConfig]

REWARDS = """
def vowels(completions, instruction):
    return [sum(c.count(v) for v in "aeiou") - 0.1 * len(i) for c, i in zip(completions, instruction)]
def short(completions):
    return [-float(len(c)) for c in completions]
def longer(completions):
    return [0 if len(a) > len(b) else 1 if len(b) > len(a) else -1 for a, b in completions]
"""


@pytest.fixture
def online(config: Config, tmp_path: Path) -> Config:
    """A config of an online stage on the tiny model, with rewards in a file."""
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")

    def make(stage: str, **keys) -> RunConfig:
        base = {
            "stage": stage, "dataset": "chats", "num_generations": 3, "max_new_tokens": 12, "max_steps": 6,
            "per_device_train_batch_size": 4, "generation_batch_size": 6, "num_train_epochs": 3.0,
        }  # fmt: skip
        source = {} if "judge" in keys else {"reward_funcs": f"{tmp_path}/rewards.py:vowels"}
        return config(**{**base, **source, **keys})

    return make


class NoDirectory:
    path, writer, checkpoint = Path("/nowhere"), False, None

    def append(self, *_) -> None:
        pass


def program_of(cfg: RunConfig, backend=None) -> OnlineProgram:
    backend = backend or Single("cpu")
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare(cfg, tokenizer)
    plan, _ = plan_batches(cfg, prepared.train.lengths)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer)
    generator = torch.Generator().manual_seed(1)
    rows = PromptRows(cfg)
    judges = load_judges(cfg, prepared.template, rows, loaded.device, loaded.dtype)
    program = make_program(cfg, loaded, tokenizer, prepared, plan, judges, rows, backend, NoDirectory())
    for parameter in program.trainable.values():  # off the start, so that the reference is another model
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return program


def step(program: OnlineProgram, number: int = 0) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and summed gradients of a step."""
    batches = program.micro_batches(*divmod(number, program.steps_per_epoch))
    totals = step_totals(program, batches, Single("cpu"))
    for parameter in program.trainable.values():
        parameter.grad = None
    total, sums = 0.0, {}
    for batch in batches:
        loss, metrics = program.loss(batch, totals)
        loss.backward()
        total += float(loss.detach())
        for name, (value, count) in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + float(value), old[1] + float(count))
    program.collector.judges.close()
    gradients = {n: p.grad.clone() for n, p in program.trainable.items() if p.grad is not None}
    return total, {name: value / count for name, (value, count) in sums.items() if count}, gradients


def assert_same(a, b, tolerance: float = 2e-5) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-6)
    assert a[1] == pytest.approx(b[1], rel=1e-4, abs=1e-5)
    whole_a, whole_b = (torch.cat([g.flatten() for g in x[2].values()]) for x in (a, b))
    assert (whole_a - whole_b).norm() <= tolerance * whole_b.norm()


STAGES = {
    "grpo": {},
    "grpo with kl": {"ppo_kl_coeff": 0.1, "grpo_loss": "grpo"},
    "rloo": {},
    "ppo": {"ppo_whiten_rewards": True, "ppo_score_norm": True, "ppo_target": 2.0},
    "online_dpo": {},
}


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_do_not_change_a_step(online: Config, name: str):
    stage, keys = name.split()[0], STAGES[name]
    whole = step(program_of(online(stage, per_device_train_batch_size=8, **keys)))
    cut = step(program_of(online(stage, per_device_train_batch_size=2, gradient_accumulation_steps=4, **keys)))
    assert_same(cut, whole)


@pytest.mark.parametrize("loss", ["bnpo", "dr_grpo", "gspo", "cispo"])
def test_nor_do_they_change_other_losses(online: Config, loss: str):
    whole = step(program_of(online("grpo", grpo_loss=loss, per_device_train_batch_size=8)))
    cut = step(program_of(online("grpo", grpo_loss=loss, per_device_train_batch_size=2, gradient_accumulation_steps=4)))
    assert_same(cut, whole)


def test_the_unshared_layout_gives_the_same_step(online: Config):
    shared, apart = (program_of(online("ppo")) for _ in range(2))
    assert shared.policy.shared
    apart.policy.shared = False
    apart.policy.base.set_attn_implementation(apart.policy.plain_attention)
    assert_same(step(apart), step(shared))


def test_before_the_first_update_ratios_are_1_and_the_kl_is_0(online: Config):
    program = program_of(online("ppo", ppo_epochs=2))
    for parameter in program.trainable.values():
        parameter.data.zero_()
    _, metrics, _ = step(program)
    assert metrics["val/ratio"] == 1.0 and metrics["kl"] == 0.0 and metrics["clip_ratio/region_mean"] == 0.0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    _, later, _ = step(program, 1)
    assert "reward" not in later and later["val/ratio"] == 1.0  # the same answers again


def test_temperature_is_that_of_the_answers(online: Config):
    """The log-probabilities that are trained are those of the distribution the answers were drawn from."""
    _, metrics, _ = step(program_of(online("rloo", temperature=0.6)))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_buffer_is_drawn_once_and_every_prompt_is_seen_in_every_pass(online: Config):
    program = program_of(online("ppo", ppo_buffer_size=2, ppo_epochs=3))
    assert program.steps_per_epoch == 6 * 3  # 21 rows, 4 a step
    seen, drawn = [], []
    for number in range(program.steps_per_epoch):
        batches = program.micro_batches(0, number)
        drawn.append(id(batches[0].rollout))
        seen.append([row for batch in batches for row in program.describe(batch)])
    program.collector.judges.close()
    assert len(set(drawn)) == 3 and [drawn.count(d) for d in dict.fromkeys(drawn)] == [6, 6, 6]
    passes = [sorted(seen[i] + seen[i + 1]) for i in (0, 2, 4)]
    assert passes[0] == passes[1] == passes[2] and len(set(passes[0])) == 8
    assert seen[2] != seen[0] and sorted(r for rows in seen for r in rows) == sorted(3 * program.datasets["train"].rows)


def test_answers_that_do_not_end_can_be_left_out(online: Config):
    program = program_of(online("grpo", mask_truncated_completions=True))
    batches = program.micro_batches(0, 0)
    program.collector.judges.close()
    rollout = program._rollout
    assert rollout is not None and not rollout.ended_S.all()
    answers = [a for batch in batches for a in rollout.answers_of(batch.indices)]
    assert sorted(answers) == [i for i in range(12) if rollout.ended_S[i]]


def test_a_missing_end_costs_what_it_is_told_to(online: Config):
    plain, charged = (program_of(online("grpo", missing_eos_penalty=p)) for p in (0.0, 2.5))
    for program in (plain, charged):
        program.micro_batches(0, 0)
        program.collector.judges.close()
    gap = plain._rollout.rewards_S - charged._rollout.rewards_S
    assert gap.tolist() == pytest.approx((2.5 * ~plain._rollout.ended_S).tolist())


# --- resumes, processes --------------------------------------------------------------------------

RUNS = {
    "ppo in mid-rollout": ("ppo", {"ppo_epochs": 2, "ppo_buffer_size": 2, **STAGES["ppo"]}, 3),
    "ppo between rollouts": ("ppo", {"ppo_epochs": 2, "ppo_score_norm": True, "ppo_target": 1.0}, 4),
    "grpo": ("grpo", {}, 2),
    "rloo, full": ("rloo", {"finetuning_type": "full", "lora_rank": None}, 3),
    "online_dpo": ("online_dpo", {"lora_dropout": 0.1}, 1),
}  # fmt: skip


def fingerprint(directory: Path) -> list:
    last = directory / "checkpoint-6"
    names = ["masters.safetensors", "optimizer.safetensors", "random.safetensors"]
    hashes = [hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names]
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(directory)]
    answers = (directory / "completions.jsonl").read_text(encoding="utf-8")
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["program"]
    return [*hashes, rows, answers, state]


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_is_exact_to_the_bit(online: Config, tmp_path: Path, name: str):
    torch.set_num_threads(1)
    stage, keys, at = RUNS[name]
    keys = {**keys, "save_strategy": "steps", "save_steps": 1}
    whole = tmp_path / "whole"
    run(online(stage, output_dir=str(whole), **keys))
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(whole / f"checkpoint-{at}", again / f"checkpoint-{at}")
    for file in ("metrics.jsonl", "completions.jsonl", "trainer_log.jsonl"):
        shutil.copy(whole / file, again / file)  # with lines past the checkpoint
    torch.manual_seed(999)
    cfg = online(stage, output_dir=str(again), resume_from_checkpoint="auto", **keys)
    run(cfg)
    assert fingerprint(again) == fingerprint(whole)


def test_a_resume_with_an_edited_reward_says_so(online: Config, tmp_path: Path, caplog):
    keys = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(online("grpo", **keys))
    again = {**keys, "max_steps": 3, "resume_from_checkpoint": "auto"}
    run(online("grpo", **again))
    assert "reward_funcs was" not in caplog.text
    with open(tmp_path / "rewards.py", "a", encoding="utf-8") as rewards:
        rewards.write("# mended\n")
    run(online("grpo", **{**again, "max_steps": 4}))
    assert "reward_funcs was 'contents" in caplog.text


PROVEN = {
    "rloo": {"ppo_kl_coeff": 0.1, "normalize_advantages": True},
    "online_dpo": {},
    "grpo over the batch": {"scale_rewards": "batch", "ppo_epochs": 2, "grpo_loss": "dr_grpo"},
    "ppo without some answers": {"mask_truncated_completions": True, "ppo_buffer_size": 2, "ppo_epochs": 2},
}  # fmt: skip


@needs_fork
@pytest.mark.parametrize("name", ["grpo with kl", "ppo", *(pytest.param(n, marks=pytest.mark.prove) for n in PROVEN)])
def test_two_processes_are_one(online: Config, tmp_path: Path, name: str):
    torch.set_num_threads(1)
    stage, keys = name.split()[0], {**STAGES, **PROVEN}[name]
    keys = {**keys, "max_steps": 3, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-4}
    keys |= {"val_size": 4, "eval_strategy": "steps", "eval_steps": 3}
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(online(stage, output_dir=str(alone), per_device_train_batch_size=2, gradient_accumulation_steps=2, **keys))
    pair = online(stage, output_dir=str(together), per_device_train_batch_size=2, **keys)
    assert run_ranks(lambda: run(pair)) == [0, 0]

    def answers(directory: Path) -> list[tuple]:
        lines = (directory / "completions.jsonl").read_text(encoding="utf-8").splitlines()
        return [(row["step"], row["row"], row["completion"], row["reward"]) for row in map(json.loads, lines)]

    assert answers(together) == answers(alone)
    for one, two in zip(read_metrics(alone), read_metrics(together), strict=True):
        same = {k: v for k, v in one.items() if k not in WALL_CLOCK and isinstance(v, float)}
        assert {k: two[k] for k in same} == pytest.approx(same, rel=1e-4, abs=1e-5)


# --- what a run leaves and says ------------------------------------------------------------------


def test_a_run_leaves_its_answers_metrics_and_a_model(online: Config, tmp_path: Path):
    cfg = online("ppo", val_size=5, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
                 reward_funcs=f"{tmp_path}/rewards.py:vowels,{tmp_path}/rewards.py:short", reward_weights="1,0.5",
                 metric_for_best_model="rewards/short/mean", load_best_model_at_end=True, plot_loss=True)  # fmt: skip
    result = run(cfg)
    out = result.output_dir
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    first = lines[0]
    assert {row["step"] for row in lines} == {1, 5} and len(lines) == 2 * 12  # 4 passes over each of two rollouts
    assert first["rewards"].keys() == {"vowels", "short"}
    assert first["reward"] == pytest.approx(first["rewards"]["vowels"] + 0.5 * first["rewards"]["short"])
    rows = read_metrics(out)
    wanted = ("reward", "reward_std", "rewards/short/mean", "kl", "entropy", "completions/mean_length", "objective/kl",
              "objective/scores", "loss/value_avg", "policy/clipfrac_avg", "clip_ratio/low_mean")  # fmt: skip
    assert all(name in rows[0] for name in wanted)
    held_out = [row for row in rows if "eval_reward" in row]
    assert held_out[0]["eval_loss"] == pytest.approx(-held_out[0]["eval_reward"])
    for name in ("adapter_model.safetensors", "value_head.safetensors", "training_reward.png"):
        assert (out / name).is_file()
    assert math.isfinite(result.metrics["eval_reward"])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_ppo_goes_on_with_the_value_head_of_an_earlier_run(online: Config, tmp_path: Path, caplog, tuning: str):
    keys = {"finetuning_type": tuning, "on_unused_keys": "warn"}
    first = run(online("ppo", max_steps=4, **keys)).output_dir
    stored = load_file(first / "value_head.safetensors")
    assert set(stored) == {"v_head.summary.weight", "v_head.summary.bias"}  # as TRL and LLaMA-Factory name them
    assert stored["v_head.summary.weight"].abs().sum() > 0
    caplog.set_level("INFO", "trueup")
    keys |= {"output_dir": str(tmp_path / "second"), "max_steps": 1, "learning_rate": 1e-12}
    again = run(online("ppo", model_name_or_path=str(first), **keys)).output_dir
    assert f"the value head goes on from {first}" in caplog.text
    for name, tensor in load_file(again / "value_head.safetensors").items():
        assert torch.allclose(tensor, stored[name], rtol=1e-5)


def test_a_value_head_of_another_model_is_refused(tmp_path: Path):
    ValueHead(8).save(tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        ValueHead(16).start_from([tmp_path])


def test_a_judge_chooses_pairs(online: Config, tmp_path: Path):
    cfg = online("online_dpo", judge=f"{tmp_path}/rewards.py:longer", num_generations=2)
    out = run(cfg).output_dir
    rows = read_metrics(out)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["completions/chosen_length"] > 0 and "judge/ties" in rows[0]
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    for one, two in zip(lines[0::2], lines[1::2], strict=True):
        if one["reward"] is not None and one["reward"] == 1.0:
            assert len(one["completion"]) > len(two["completion"])


def test_processes_share_the_judges_work_and_hear_one_verdict(online: Config):
    """A judge may answer otherwise when asked again: no pair is asked about twice."""
    asked: list[int] = []
    told: list[list[int]] = [[0] * 3, [0] * 2]

    def prefer(first, second) -> list[int]:
        asked.extend(first)
        return [answer % 3 - 1 for answer in first]

    def gather_as(rank: int):
        return lambda value: told.__setitem__(rank, value) or told

    verdicts = []
    for rank in (1, 0):
        backend = SimpleNamespace(rank=rank, world_size=2, gather=gather_as(rank))
        learner = OnlineDpo(online("online_dpo"), SimpleNamespace(judge="coin", prefer=prefer), backend)
        verdicts.append(learner._verdicts(list(range(5)), list(range(5))).tolist())
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert verdicts[-1] == [-1, 0, 1, -1, 0]


def test_an_encoder_judges_questions_and_answers(online: Config, tmp_path: Path):
    """A reward model that is no decoder reads the row's question and the answer's text, with its own tokenizer."""
    name = str(save_encoder(tmp_path / "encoder"))
    out = run(online("grpo", reward_model=name, reward_funcs="", max_steps=1)).output_dir
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = json.loads((tmp_path / "data" / "chats.json").read_text(encoding="utf-8"))
    scorer = load_text_scorer(online("grpo").model, name, torch.device("cpu"), torch.float32)
    questions = [asked[int(row["row"].partition(":")[2])]["instruction"] for row in lines]
    expected = scorer(questions, [row["completion"] for row in lines])
    assert len(lines) == 12 and len(set(expected)) > 1
    assert [row["rewards"]["reward_model"] for row in lines] == pytest.approx(expected, abs=1e-5)


def test_only_evaluating_scores_greedy_answers(online: Config):
    keys = {"do_train": False, "do_eval": True, "val_size": 5}
    first, second = (run(online("grpo", overwrite_output_dir=True, **keys)).metrics for _ in range(2))
    assert first["eval_reward"] == second["eval_reward"]
    assert "eval_completions/mean_length" in first


@pytest.mark.parametrize("epochs", [1.0, 0.4])
def test_check_and_header_count_every_pass_over_the_answers(online: Config, epochs: float, capsys):
    cfg = online("ppo", ppo_epochs=3, max_steps=-1, num_train_epochs=epochs, cutoff_len=64)
    report = check(cfg)
    assert "21 rows × 3 passes → 18 steps an epoch" in report.render()
    result = run(cfg)
    assert "21 rows × 3 passes → 18 steps an epoch" in capsys.readouterr().out
    assert report.arithmetic.total_steps == read_metrics(result.output_dir)[-1]["step"]
    rows, tokens = report.prepared.train, report.tokens
    longest = int(rows.prompt_lengths.max()) + 3 * 12
    assert tokens.epoch == int(rows.prompt_lengths.sum()) + 21 * 3 * 12  # nobody knows yet how long answers will be
    assert longest <= tokens.largest <= 4 * longest
    assert f"tokens    at most {tokens.epoch:,} an epoch" in report.render()


def test_what_is_not_there_is_said_before_the_run(online: Config, tmp_path: Path):
    for keys, words in (
        ({"reward_funcs": "nowhere.py:f"}, "there is no file"),
        ({"reward_funcs": f"{tmp_path}/rewards.py:nobody"}, "has no function"),
        ({"metric_for_best_model": "rewards/x/mean", "val_size": 3, "eval_strategy": "steps",
          "load_best_model_at_end": True, "save_strategy": "steps"}, "no evaluation of this run reports"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            run(online("grpo", **keys))
    with pytest.raises(ConfigError, match="there is no file"):
        check(online("grpo", reward_funcs="nowhere.py:f"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_groups_without_variance_are_told_once(online: Config, tmp_path: Path, caplog, stage: str):
    (tmp_path / "same.py").write_text("def one(completions): return [1.0] * len(completions)", encoding="utf-8")
    result = run(online(stage, reward_funcs=f"{tmp_path}/same.py:one"))
    words = "in 100% of the groups all answers have the same reward"
    assert caplog.text.count(words) == 1
    assert [words in found["text"] for found in read_status(result.output_dir)["warnings"]] == [True]


def test_an_adapter_is_no_whole_reward_model(online: Config, tmp_path: Path, tiny_dir: Path):
    adapter = tmp_path / "rm"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_dir)}), "utf-8")
    whole = {"reward_model": str(tiny_dir), "reward_model_type": "lora"}
    for keys in ({"reward_model": str(adapter), "reward_model_type": "full"}, whole):
        for stage in (check, run):
            with pytest.raises(ConfigError, match="what reward_model is can be seen"):
                stage(online("grpo", **keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stage, keys", [("ppo", {"ppo_target": 2.0}), ("rloo", {"ppo_kl_coeff": 0.1}), ("grpo", {"ppo_epochs": 2})]
)
def test_a_rollout_with_nothing_to_learn_from_is_said_and_its_metrics_are_kept(online: Config, caplog, stage, keys):
    program = program_of(online(stage, mask_truncated_completions=True, **keys))
    sample = program.collector.engine.sample

    def ending(every: int):
        """The model's answers, of which the first of so many has come to its end."""
        numbers = itertools.count()
        return lambda *asked: [[replace(a, ended=next(numbers) % every == 0) for a in g] for g in sample(*asked)]

    program.collector.engine.sample = lambda *asked: [[replace(a, ended=False) for a in g] for g in sample(*asked)]
    assert step(program) == (0.0, {}, {})
    assert caplog.text.count("no answer to learn from") == 1
    again = program.state_dict()
    program.load_state_dict(again)
    program.collector.engine.sample = ending(every=2)
    program.schedule = replace(program.schedule, passes=1)
    program._rollout = None
    _, metrics, _ = step(program, 1)
    if stage == "ppo":
        assert metrics["objective/kl_coef"] > 0
    assert "completions/clipped_ratio" in metrics and metrics["completions/clipped_ratio"] > 0


def test_ppo_does_not_learn_from_answers_without_a_reward(online: Config):
    program = program_of(online("ppo"))
    score = program.collector.judges.score

    def partly(answers):
        scores = score(answers)
        scores[0] = np.inf
        return np.where(np.isfinite(scores), scores, np.nan)

    program.collector.judges.score = partly
    step(program)
    rollout = program._rollout
    missing = np.flatnonzero(np.isnan(rollout.rewards_S)).tolist()
    assert missing and not rollout.kept_S[missing].any() and not rollout.take("advantages", missing).any()


def test_answers_that_are_cut_off_are_no_baseline_and_no_kl(online: Config):
    logps = [np.full(2, -1.0, dtype=np.float32)] * 3
    rollout = Rollout.of(
        0, 0, np.array([0]),
        [[Sampled(np.array([5, 6]), logps[i], 0.0, ended) for i, ended in enumerate([True, True, False])]],
    )  # fmt: skip
    rollout.rewards_S, rollout.kept_S = np.array([1.0, 0.0, 9.0]), np.array([True, True, False])
    rollout.tokens |= {"sampled": np.concatenate(logps)}
    rollout.put("old", [0, 1], np.full(4, -1.0))
    rollout.put("reference", [0, 1], np.full(4, -1.5))
    learner = LeaveOneOut(online("rloo", ppo_kl_coeff=0.1), on_policy=True)
    found = learner.appraise(Collected(rollout, [], np.zeros((3, 0)), {}))
    assert found["kl"] == (2.0, 2.0)
    assert rollout.tokens["advantages"].tolist() == [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]


def test_scores_that_are_not_finite_are_no_opinion():
    class Odd:
        name = "odd"

        def score(self, answers):
            return [math.inf, -math.inf, math.nan, None, 2.0]

    scores = Judges([Odd()], [1.0], None, None).score([None] * 5)
    assert np.isnan(scores[:4]).all() and scores[4, 0] == 2.0
