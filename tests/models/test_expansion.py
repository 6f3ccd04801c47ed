"""Blocks inserted by LLaMA-Pro's recipe: what they leave as it is, where they are, and which of them train."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from tests.models.tiny import ARCHITECTURES, COMMON, tiny_model
from trueup.errors import ModelError
from trueup.models.expansion import insert_blocks, trained_blocks
from trueup.models.load import unfreeze

ROWS = torch.randint(0, 128, (2, 30), generator=torch.Generator().manual_seed(0))


def deep(name: str) -> tf.PreTrainedModel:
    return tiny_model(name, num_hidden_layers=4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inserted_blocks_leave_every_logit_as_it_is(name: str, tmp_path):
    model = deep(name)
    with torch.no_grad():
        before = model(input_ids=ROWS).logits
        assert insert_blocks(model, 2) == [2, 5]
        after = model(input_ids=ROWS).logits
        model.save_pretrained(tmp_path)
        read = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        written = read(input_ids=ROWS).logits
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    torch.testing.assert_close(written, before, atol=1e-6, rtol=0)
    assert read.config.num_hidden_layers == 6 and read.config.llama_pro_blocks == [2, 5]
    with torch.no_grad():  # the keys and values of every block are its own
        start = read(input_ids=ROWS[:, :8], use_cache=True)
        rest = read(input_ids=ROWS[:, 8:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, written[:, 8:], atol=1e-4, rtol=1e-4)


def test_kinds_of_layers_go_with_them():
    model = tiny_model("gemma2", num_hidden_layers=4)
    kinds = list(model.config.layer_types)
    insert_blocks(model, 4)
    assert model.config.layer_types == [kind for kind in kinds for _ in range(2)]


def test_blocks_of_blocks_are_all_known():
    model = deep("llama")
    insert_blocks(model, 2)
    assert insert_blocks(model, 3) == [2, 5, 8]
    assert model.config.llama_pro_blocks == [2, 3, 5, 7, 8]


def test_blocks_that_cannot_be_spread_evenly_are_refused():
    with pytest.raises(ModelError, match="evenly"):
        insert_blocks(deep("llama"), 3)


def test_an_architecture_whose_blocks_differ_by_position_is_refused():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
    keys = {**COMMON, **experts, "num_hidden_layers": 4, "shared_expert_intermediate_size": 8}
    config = tf.Qwen2MoeConfig(**keys)
    with pytest.raises(ModelError, match="position"):
        insert_blocks(tf.AutoModelForCausalLM.from_config(config), 2)


@pytest.mark.parametrize("count, places", [(2, [2, 5]), (1, [5])])
def test_the_blocks_that_train_are_inserted_ones(count: int, places: list[int]):
    model = deep("llama")
    insert_blocks(model, 2)
    assert trained_blocks(model, count) == places
    model.requires_grad_(False)
    tuning = {"finetuning_type": "freeze", "freeze_trainable_layers": count, "use_llama_pro": True}
    unfreeze(model, SimpleNamespace(**tuning, freeze_trainable_modules=["all"], freeze_extra_modules=[]))
    trained = {int(name.split(".")[2]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(places)


@pytest.mark.parametrize("count", [3, 4, -2])
def test_other_blocks_do_not_pass_for_inserted_ones(count: int):
    model = deep("llama")
    insert_blocks(model, 2)
    with pytest.raises(ModelError, match="inserted"):
        trained_blocks(model, count)
