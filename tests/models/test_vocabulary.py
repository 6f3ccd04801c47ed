"""New tokens: the rows they get, how these start, and that rows which train alone act as whole matrices do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models.tiny import tiny_model
from trueup.models.adapters import attach_frozen, attach_trained
from trueup.models.distributions import projection
from trueup.models.logprobs import is_plain, token_entropy, token_logps
from trueup.models.policy import head_of
from trueup.models.rows import RowsWrapper, lighten
from trueup.models.vocabulary import NewTokens, grow, num_rows, start_rows

IDS = {"llama": {"model.embed_tokens": [128, 129, 130], "lm_head": [128, 129, 130]},
       "qwen2": {"model.embed_tokens": [3, 128, 129, 130]}, "gemma2": {"model.embed_tokens": [130, 7, 128]},
       "cohere": {"model.embed_tokens": [128, 130]}, "gemma": {"model.embed_tokens": [129]}}  # fmt: skip
TIED = ("qwen2", "gemma2", "cohere", "gemma")


def grown(name: str) -> nn.Module:
    tied = {"tie_word_embeddings": True} if name in TIED else {}
    return grow(tiny_model(name, **tied), 131)


def wanted(ids) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids, task_type="CAUSAL_LM")


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """The same with numbers of our own in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("name", IDS)
def test_rows_act_and_learn_as_in_pefts_own_layer(name: str):
    """In the model's own forward, and in tiles of log-probabilities that are cut between the rows."""
    base, ids = grown(name), torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 3:6] = torch.tensor([128, 130, 3])
    plain = moved(get_peft_model(copy.deepcopy(base), wanted(IDS[name])))
    ours = moved(get_peft_model(copy.deepcopy(base), wanted(IDS[name])))
    lighten(ours)
    assert isinstance(ours.get_base_model().get_input_embeddings(), RowsWrapper)
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)

    target = ids[:, 1:]
    loss = torch.log_softmax(expected[:, :-1].float(), -1).gather(2, target[..., None]).squeeze(2)
    weights = torch.linspace(-1, 1, loss.numel()).view_as(loss)
    (loss * weights).sum().backward()
    inner = ours.get_base_model()
    hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head = head_of(inner)
    assert is_plain(head.module)
    logps = token_logps(hidden, head, target.flatten(), tile=(7, 43))
    torch.testing.assert_close(logps.view_as(loss), loss, atol=1e-5, rtol=1e-5)
    (logps * weights.flatten()).sum().backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert theirs.keys() == mine.keys() and any("trainable_tokens" in key for key in mine)
    for key, grad in mine.items():
        torch.testing.assert_close(grad, theirs[key], atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    entropy = torch.distributions.Categorical(logits=projection(head)(hidden)).entropy()
    torch.testing.assert_close(token_entropy(hidden, head, tile=(7, 43)), entropy, atol=1e-4, rtol=1e-4)


def test_a_base_without_its_adapters_has_its_own_rows():
    base = grown("llama")
    ids = torch.tensor([[5, 128, 129, 7]])
    before = base(input_ids=ids).logits.detach().clone()
    adapters = attach_trained(base, wanted(IDS["llama"]), [], "base")
    moved(adapters.model)
    assert not torch.equal(adapters.model(input_ids=ids).logits, before)
    with adapters.as_reference():
        assert torch.equal(adapters.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rows_do_not_depend_on_when_they_were_added(name: str):
    once, twice = grow(tiny_model(name), 134), grow(grow(tiny_model(name), 131), 134)
    for model in (once, twice):
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embeddings) == (name == "qwen2")
        assert model.config.vocab_size == num_rows(model) == len(head)
    for rows in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(once, rows)().weight, getattr(twice, rows)().weight)
    assert len({tuple(row.tolist()) for row in once.get_input_embeddings().weight[128:]}) == 6


def test_what_a_model_says_of_known_tokens_hardly_changes():
    ids = torch.randint(0, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    before = torch.log_softmax(model(input_ids=ids).logits, -1)
    after = torch.log_softmax(grow(model, 131)(input_ids=ids).logits, -1)
    taken = 1 - after[..., :128].exp().sum(-1)
    torch.testing.assert_close(after[..., :128] - torch.log1p(-taken)[..., None], before, atol=1e-4, rtol=1e-4)
    assert float(taken.mean()) < 3 * 3 / 131  # three times what three of the others have


def test_a_description_is_where_a_row_starts():
    model = grow(tiny_model("llama"), 131)
    start_rows(model, NewTokens([128, 129], {129: [4, 6]}, noise=False), 128)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.testing.assert_close(weight[129], weight[[4, 6]].mean(0))
        assert not torch.allclose(weight[128], weight[:128].mean(0))
    start_rows(model, NewTokens([129], {129: [4, 6]}, noise=True), 128)
    weight = model.lm_head.weight
    assert not torch.allclose(weight[129], weight[[4, 6]].mean(0))


def test_an_adapter_with_rows_loads_on_the_base_as_it_was(tmp_path):
    """Beside another with rows for the same tokens, the last one's act."""
    for seed, name in enumerate(("a", "b")):
        adapters = attach_trained(grown("llama"), wanted(IDS["llama"]), [], "base")
        moved(adapters.model, seed)
        adapters.save(tmp_path / name, {})
    ids = torch.tensor([[5, 128, 129, 7]])
    found = attach_frozen(tiny_model("llama"), [tmp_path / "b"])
    torch.testing.assert_close(found(input_ids=ids).logits, adapters.model(input_ids=ids).logits)
    both = attach_frozen(tiny_model("llama"), [tmp_path / "a", tmp_path / "b"])
    one, other = (m.get_base_model().get_input_embeddings().token_adapter.acting() for m in (both, found))
    assert one.ids == other.ids == (128, 129, 130) and torch.equal(one.values, other.values)
