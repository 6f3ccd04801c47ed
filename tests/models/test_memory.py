"""The memory estimate against what autograd keeps, and what is decided from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.config.schema import TuningSection
from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import build_forest
from trueup.models.adapters import attach_trained
from trueup.models.fused import fuse
from trueup.models.load import unfreeze
from trueup.models.logprobs import bytes_of_logit, tile_of
from trueup.models.memory import SLACK, LayerCosts, decide, head_bytes, layer_costs, recompute
from trueup.models.policy import Policy
from trueup.models.tuners import adapter_config

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=128, intermediate_size=352, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=4)
COSTS = LayerCosts(layers=10, kept=100, entry=10, outside=5, passing=20)


def policy(name: str, dtype: torch.dtype, **keys) -> tuple[Policy, TuningSection]:
    tuning = load_config({"model_name_or_path": "m", "dataset": "alpaca_en_demo", **keys}).tuning
    base = tiny_model(name, std=0.02, **SHAPE).to(dtype).requires_grad_(False)
    if tuning.finetuning_type == "lora":
        made = Policy(base, attach_trained(base, adapter_config(tuning, base), [], name).model)
    else:
        made = Policy(base)
        unfreeze(base, tuning)
    fuse(made.model)
    assert made.verify_layout() is None
    made.model.train()
    return made, tuning


def a_pair(prompt: int = 120, answer: int = 200):
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 120, size=n).astype(np.int32) for n in (prompt, answer, answer)]
    return build_forest([Encoded("0", ids[0], tuple(Answer(a, np.ones(len(a), bool)) for a in ids[1:]))])


def kept_bytes(made: Policy) -> tuple[int, int]:
    """Bytes that autograd holds after a forward, without parameters, and the number of tokens."""
    forest, seen = a_pair(), {}
    parameters = {p.untyped_storage().data_ptr() for p in made.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = made.token_logps(forest)
    assert logps.requires_grad
    return sum(size for _, size in seen.values()), len(forest.input_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_dropout": 0.1},
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    ],
    ids=["lora", "dropout", "full", "freeze"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_the_estimate_is_what_autograd_keeps(name: str, keys: dict, dtype: torch.dtype) -> None:
    made, tuning = policy(name, dtype, **keys)
    kept, tokens = kept_bytes(made)
    costs = layer_costs(made.base, tuning, dtype, CPU)
    estimate = tokens * (costs.layers * costs.kept + costs.outside)
    assert estimate == pytest.approx(kept, rel=0.15)


# --- what is decided ------------------------------------------------------------------------------


def test_auto_keeps_what_fits_and_recomputes_as_few_layers_as_need_be() -> None:
    assert decide("auto", COSTS, 1, room=COSTS.needed(1)).recomputing == 0
    for count in range(1, 10):
        assert decide("auto", COSTS, 1, room=COSTS.needed(1, count)).recomputing == count
    assert decide("auto", COSTS, 1, room=0).recomputing == 10


def test_the_last_layer_to_recompute_needs_room_for_itself() -> None:
    assert COSTS.needed(1, 10) == int(SLACK * (10 * 10 + 100 + 25))
    assert COSTS.needed(1, 9) == int(SLACK * (9 * 10 + 100 + 25))
    assert COSTS.needed(1, 0) == int(SLACK * (10 * 100 + 25))


@pytest.mark.parametrize(("mode", "count"), [("off", 0), ("selective", 5), ("full", 10)])
def test_other_modes_do_as_they_say(mode: str, count: int) -> None:
    assert decide(mode, COSTS, 1, room=1 << 40).recomputing == count


def test_selective_takes_more_where_memory_asks() -> None:
    assert decide("selective", COSTS, 1, room=COSTS.needed(1, 8)).recomputing == 8


@pytest.mark.parametrize("keys", [{}, {"finetuning_type": "freeze", "freeze_trainable_layers": 3}])
def test_recomputing_keeps_less_and_changes_no_gradient(keys: dict) -> None:
    made, _ = policy("llama", torch.float32, **keys)

    def gradients(count: int) -> tuple[int, dict[str, torch.Tensor]]:
        recompute(made.base, count)
        made.model.zero_grad()
        made.token_logps(a_pair(20, 30)).sum().backward()
        recomputing = sum(layer.gradient_checkpointing for layer in made.base.model.layers)
        return recomputing, {n: p.grad.clone() for n, p in made.trainable().items() if p.grad is not None}

    none, kept = gradients(0)
    some, made_again = gradients(2)
    assert (none, some) == (0, 3 if keys else 2)  # the frozen layer below keeps nothing anyway
    assert kept.keys() == made_again.keys()
    assert all(torch.equal(kept[name], made_again[name]) for name in kept)
    assert gradients(0)[0] == 0


def test_an_adapted_or_trained_head_needs_more_than_a_frozen_one() -> None:
    shape = {"vocab_size": 40_000}

    def needed(**keys) -> tuple[int, torch.nn.Module]:
        tuning = load_config({"model_name_or_path": "m", "dataset": "alpaca_en_demo", **keys}).tuning
        base = tiny_model("llama", **shape).requires_grad_(False)
        if tuning.finetuning_type == "lora":
            attach_trained(base, adapter_config(tuning, base), [], "llama")
        else:
            unfreeze(base, tuning)
        return head_bytes(base, torch.float32, CPU), base.get_output_embeddings()

    frozen, _ = needed()
    adapted, module = needed(lora_target="q_proj,lm_head")
    rows, columns = tile_of(module, CPU, torch.float32)
    low_rank = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert columns == 40_000 and low_rank
    assert adapted == rows * columns * bytes_of_logit(module, torch.float32) + 8 * low_rank > 2 * frozen
    saved, _ = needed(additional_target="lm_head")
    assert saved - 8 * 40_000 * 32 == rows * columns * 16
    full, _ = needed(finetuning_type="full")
    assert full - frozen == 8 * 40_000 * 32
