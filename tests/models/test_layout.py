"""The forest layout gives what plain transformers gives on separate, padded sequences: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.models.tiny import ARCHITECTURES, tiny_model
from trueup.data.forest import build_forest
from trueup.models.policy import Policy, _unseen_window


@dataclass
class Side:
    ids: np.ndarray
    mask: np.ndarray


@dataclass
class Row:
    prompt: np.ndarray
    answers: tuple[Side, ...]


def random_rows(seed: int = 0) -> list[Row]:
    """Pairs, a three-way ranking, a lone promptless text and a multi-turn answer with a hole in its mask."""
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, 120, n).astype(np.int32)

    def side(n: int, hole: bool = False) -> Side:
        mask = np.ones(n, dtype=bool)
        if hole:
            mask[n // 3 : n // 2] = False
        return Side(tokens(n), mask)

    return [
        Row(tokens(9), (side(7), side(4))),
        Row(tokens(3), (side(12), side(1))),
        Row(tokens(5), (side(3), side(6), side(2))),
        Row(tokens(0), (side(11),)),
        Row(tokens(6), (side(14, hole=True),)),
    ]


def plain_logps(model, rows: list[Row]) -> torch.Tensor:
    """Right-padded rows, the model's own logits, log_softmax over everything: the slow, obvious way."""
    sequences = [(row.prompt, answer) for row in rows for answer in row.answers]
    width = max(len(p) + len(a.ids) for p, a in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention = torch.zeros_like(ids)
    trained = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(sequences):
        n = len(prompt) + len(answer.ids)
        ids[i, :n] = torch.from_numpy(np.concatenate([prompt, answer.ids]).astype(np.int64))
        attention[i, :n] = 1
        trained[i, len(prompt) : n] = torch.from_numpy(answer.mask)
    trained[:, 0] = False
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.float()
    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
    return logps[trained[:, 1:]]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_forest_equals_padded_transformers(name: str, shared: bool) -> None:
    rows = random_rows()
    model = tiny_model(name)
    weights = torch.linspace(-1, 1, build_forest(rows).target.numel())

    expected = plain_logps(model, rows)
    (expected * weights).sum().backward()
    expected_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    policy = Policy(model)
    reason = policy.verify_layout()
    assert reason is None
    if not shared:
        policy.shared = False
        model.set_attn_implementation(policy.plain_attention)
    logps = policy.token_logps(build_forest(rows))
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)

    (logps * weights).sum().backward()
    for parameter_name, gradient in expected_grads.items():
        actual = dict(model.named_parameters())[parameter_name].grad
        scale = gradient.abs().max()
        torch.testing.assert_close(actual, gradient, atol=float(2e-5 * scale + 1e-7), rtol=1e-4, msg=parameter_name)


def test_siblings_do_not_see_each_other() -> None:
    policy = Policy(tiny_model())
    policy.verify_layout()
    rows = random_rows()[:1]
    before = policy.token_logps(build_forest(rows))
    rows[0].answers[0].ids[:] = 5
    after = policy.token_logps(build_forest(rows))
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[:7], after[:7])


def test_a_model_that_drops_the_layout_runs_unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, *a, forest=None, **k: forward(self, *a, **k))
    policy = Policy(model)
    assert "forest" in (policy.verify_layout() or "")
    assert not policy.shared
    rows = random_rows()
    torch.testing.assert_close(policy.token_logps(build_forest(rows)), plain_logps(model, rows), atol=1e-5, rtol=1e-5)


def test_bf16_on_a_cpu_stays_within_rounding_of_fp32() -> None:
    rows = random_rows()
    exact, rounded = Policy(tiny_model("llama")), Policy(tiny_model("llama").to(torch.bfloat16))
    assert exact.verify_layout() is None and rounded.verify_layout() is None
    gap = (exact.token_logps(build_forest(rows)) - rounded.token_logps(build_forest(rows))).abs()
    assert gap.mean() < 0.05


def test_a_window_that_only_the_mask_knows_runs_unshared() -> None:
    """The probe is shorter than any window, so a kernel that is not told of it must not be trusted."""
    policy = Policy(tiny_model("mistral", sliding_window=32))
    assert policy.verify_layout() is None
    assert "window" in (_unseen_window(policy.base.config, set()) or "")
    policy.base.config.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in (_unseen_window(policy.base.config, set()) or "")
