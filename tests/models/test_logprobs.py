"""Chunked log-probs equal log_softmax over full logits, for every kind of head, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trueup.models.logprobs import Head, token_logps


@pytest.mark.parametrize("tile", [(1, 5), (4, 8), (64, 64)])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)])
def test_equals_full_logits(
    tile: tuple[int, int], trained: bool, bias: bool, scale: float, softcap: float | None
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 23, bias=bias, dtype=torch.float64).requires_grad_(trained)
    head = Head(linear, scale, softcap)
    hidden = torch.randn(11, 8, dtype=torch.float64)
    target = torch.randint(23, (11,))
    weights = torch.randn(11)

    def run(function):
        h = hidden.clone().requires_grad_()
        linear.zero_grad()
        logps = function(h)
        (logps.float() * weights).sum().backward()
        return logps.float(), h.grad, linear.weight.grad

    def full(h):
        z = linear(h) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z, -1).gather(1, target[:, None]).squeeze(1)

    for actual, expected in zip(run(lambda h: token_logps(h, head, target, tile)), run(full), strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_no_predictions_give_an_empty_result() -> None:
    head = Head(nn.Linear(8, 23, bias=False).requires_grad_(False))
    assert token_logps(torch.randn(0, 8), head, torch.empty(0, dtype=torch.long)).shape == (0,)
