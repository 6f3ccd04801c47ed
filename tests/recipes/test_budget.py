"""What a run plans its memory with: the reference beside the model, answers still to be written, its layout."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from trueup.config.schema import RunConfig
from trueup.data.encode import prepare
from trueup.models import allocator, memory
from trueup.models.load import Loaded, load_for_evaluation, load_policy, load_tokenizer
from trueup.models.policy import Policy
from trueup.recipes import offline, online
from trueup.recipes.batches import Tokens, answered_tokens, plan_batches
from trueup.recipes.check import check
from trueup.recipes.header import evaluation_header
from trueup.recipes.references import live_reference, reference_bytes
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
FP32, BF16 = torch.float32, torch.bfloat16


def loaded_by(cfg: RunConfig) -> Loaded:
    return load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))


LIVE = {"precompute_ref_log_probs": False}
FULL = {"finetuning_type": "full", "lora_rank": None}
REFERENCES = {  # keys: copies of all weights, copies of what trains (in fp32: one that runs is the one that is kept)
    "table": (FULL, 0, 0),
    "adapter": (LIVE, 0, 0),
    "copy": ({**FULL, **LIVE}, 1, 0),
    "moving": ({"sync_ref_model": True, **LIVE}, 0, 1),
    "sft": ({"stage": "sft", "dataset": "chats", **FULL}, 0, 0),
    "kto": ({"stage": "kto", "dataset": "labels", **FULL}, 1, 0),
    "grpo": ({"stage": "grpo", "dataset": "chats", "reward_funcs": "f.py:g", **FULL}, 0, 0),
    "grpo with kl": ({"stage": "grpo", "dataset": "chats", "reward_funcs": "f.py:g", "ppo_kl_coeff": 0.1,
                      **FULL}, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_counted_where_it_stays_beside_the_model(config: Config, name: str) -> None:
    keys, whole, moved = REFERENCES[name]
    cfg = config(**keys)
    loaded = loaded_by(cfg)
    every = sum(p.numel() for p in loaded.policy.base.parameters())
    expected = 4 * (whole * every + moved * loaded.num_trainable)
    assert reference_bytes(cfg, loaded.policy.base, FP32) == expected
    if name in ("adapter", "copy", "moving"):  # and that is what it takes
        live = live_reference(cfg, loaded)
        mine = {p.data_ptr() for p in loaded.policy.base.parameters()}
        theirs = {p.data_ptr(): p.nbytes for p in (*live.policy.base.parameters(), *getattr(live, "past", {}).values())}
        assert sum(size for at, size in theirs.items() if at not in mine) == expected


def test_a_reference_of_its_own_is_counted_before_it_is_loaded(config: Config, tiny_dir) -> None:
    cfg = config(ref_model=str(tiny_dir), **LIVE)
    base = loaded_by(cfg).policy.base
    own = live_reference(cfg, loaded_by(cfg)).policy.base
    for dtype in (FP32, BF16):
        assert reference_bytes(cfg, base, dtype) == dtype.itemsize * sum(p.numel() for p in own.parameters())


def test_a_reference_takes_room_from_activations(config: Config, monkeypatch) -> None:
    cfg = config(gradient_checkpointing="auto", **FULL, **LIVE)
    loaded, tokens = loaded_by(cfg), Tokens(0, 0, 200)
    base = loaded.policy.base
    needed = memory.layer_costs(base, cfg.tuning, FP32, base.device).needed(200)
    taken = memory.optimizer_bytes(base, cfg.train, FP32, base.device) + memory.head_bytes(base, FP32, base.device)
    for reference, free in ((0, needed + taken), (1, needed + taken + reference_bytes(cfg, base, FP32))):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: int(free / memory.USABLE) + 8)
        offline.fit_activations(cfg, loaded, tokens)
        assert (loaded.recomputation.recomputing == 0) == bool(reference)
    assert check(cfg).estimate.reference == reference_bytes(cfg, base, FP32)
    assert "reference " in check(cfg).render()


def test_online_runs_plan_with_answers_at_their_longest(config: Config, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "rewards.py").write_text("def none(completions): return [0.0] * len(completions)\n", encoding="utf-8")
    cfg = config(
        stage="grpo", dataset="chats", reward_funcs=f"{tmp_path}/rewards.py:none", num_generations=2, max_new_tokens=10,
        per_device_train_batch_size=3, max_steps=1, gradient_checkpointing="auto",
    )  # fmt: skip
    rows = prepare(cfg, load_tokenizer(cfg.model)).train
    tokens = answered_tokens(cfg, rows, *plan_batches(cfg, rows.lengths)[:1], 1)
    asked = []
    monkeypatch.setattr(offline, "fit_to_memory", lambda *given: asked.append(given) or memory.fit_to_memory(*given))
    run(cfg)
    told = capsys.readouterr().out
    assert asked[0][3] == tokens.largest >= 3 * 2 * 10
    assert tokens.epoch == int(rows.prompt_lengths.sum()) + 21 * 20
    assert f"tokens    at most {tokens.epoch:,} an epoch" in told
    assert "memory    activations" in told and online


def test_an_evaluation_says_why_prompts_are_not_shared(config: Config, tiny_dir, monkeypatch) -> None:
    monkeypatch.setattr(Policy, "_try_shared", lambda *_: "its layers use magnets")
    cfg = config(do_train=False, ref_model=str(tiny_dir), eval_dataset="held")
    tokenizer = load_tokenizer(cfg.model)
    loaded = load_for_evaluation(cfg.model, cfg.train, tokenizer, torch.device("cpu"))
    assert loaded.layout_note == "its layers use magnets"
    assert "prompts not shared: its layers use magnets" in evaluation_header(cfg, loaded, prepare(cfg, tokenizer))


@pytest.mark.parametrize("libc", ["glibc", "musl"])
def test_a_missing_allocator_setting_is_said_once(monkeypatch, caplog, libc: str) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (libc, "1"))
    allocator.keep_memory.cache_clear()
    with caplog.at_level(logging.INFO, logger="trueup"):
        assert allocator.keep_memory() == allocator.keep_memory() == (libc == "glibc")
    allocator.keep_memory.cache_clear()
    assert [r.levelname for r in caplog.records] == (["INFO"] if libc == "musl" else [])
