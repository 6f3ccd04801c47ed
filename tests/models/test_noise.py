"""NEFTune: how much noise, on which tokens, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny_model
from trueup.models.memory import recompute
from trueup.models.noise import row_lengths
from trueup.models.policy import Policy
from trueup.types import Forest, Segment

ALPHA, WIDTH = 5.0, 32


def forest() -> Forest:
    """A prompt of 6 with answers of 10 and 3, and a row of 8 without a prompt."""
    ids = torch.randint(3, 128, (27,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(16), torch.arange(6, 9), torch.arange(8)])
    read = torch.cat([torch.arange(5, 15), torch.tensor([5, 16, 17]), torch.arange(19, 26)])
    target = torch.cat([torch.arange(6, 16), torch.arange(16, 19), torch.arange(20, 27)])
    return Forest(
        ids, positions, (Segment(0, 6, -1), Segment(6, 16, 0), Segment(16, 19, 0), Segment(19, 27, -1)),
        read, ids[target], torch.tensor([0] * 10 + [1] * 3 + [2] * 7), 3, ((0, 1), (0, 2), (3,)),
    )  # fmt: skip


def policy(shared: bool = True, alpha: float | None = ALPHA) -> Policy:
    found = Policy(tiny_model("qwen2"))
    found.verify_layout()
    assert found.shared
    if not shared:
        found.shared = False
        found.base.set_attn_implementation(found.plain_attention)
    found.noise_alpha = alpha
    found.model.train()
    return found


def embedded(policy: Policy, seed: int = 0) -> Tensor:
    """What the first layer gets."""
    seen = []
    hook = policy.base.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    torch.manual_seed(seed)
    policy.token_logps(forest())
    hook.remove()
    return seen[0].detach()


def test_the_length_of_a_shared_prompt_is_that_of_its_longest_row():
    assert row_lengths(forest()).tolist() == [16.0] * 16 + [9.0] * 3 + [8.0] * 8


def test_noise_is_uniform_between_the_papers_bounds():
    difference = (embedded(policy()) - embedded(policy(alpha=None)))[0]
    bounds = ALPHA / torch.sqrt(row_lengths(forest()) * WIDTH)
    shares = difference / bounds[:, None]
    assert float(shares.abs().max()) <= 1 + 1e-5
    for part in (shares[:16], shares[16:19], shares[19:]):  # each reaches its own bound, and lies evenly within it
        count = part.numel()
        assert float(part.abs().max()) > 1 - 20 / count
        assert (
            abs(float(part.mean())) < 6 / (3 * count) ** 0.5 and abs(float((part**2).mean()) - 1 / 3) < 2 / count**0.5
        )


def test_unshared_rows_have_the_noise_of_their_own_length():
    difference = embedded(policy(shared=False)) - embedded(policy(shared=False, alpha=None))
    for row, length in enumerate((16, 9, 8)):
        shares = difference[row, :length] / (ALPHA / (length * WIDTH) ** 0.5)
        assert 1 - 20 / shares.numel() < float(shares.abs().max()) <= 1 + 1e-5


def test_there_is_none_outside_training():
    one, plain = policy(), policy(alpha=None)
    one.model.eval()
    assert torch.equal(embedded(one), embedded(plain))
    one.model.train()
    assert not torch.equal(embedded(one), embedded(plain))


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_recompute_see_the_noise_that_was_drawn(shared: bool):
    found = []
    for count in (0, 2):
        one = policy(shared)
        one.base.requires_grad_(True)
        recompute(one.base, count)
        torch.manual_seed(3)
        one.token_logps(forest()).sum().backward()
        state = torch.get_rng_state()
        found.append(({name: p.grad for name, p in one.base.named_parameters()}, state))
    (plain, before), (recomputed, after) = found
    assert torch.equal(before, after)  # nothing more was drawn
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)
