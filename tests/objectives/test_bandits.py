"""Known optima: policies over a few arms learn which one pays, whatever the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trueup.objectives.policy_gradient import DENOMINATORS, AnswerLogps, grpo, ppo, rloo, value_loss
from trueup.rollout import advantages

CONTEXTS, ARMS, GROUP = 3, 4, 8
PAYS = np.array([[0.1, 0.9, 0.3, 0.0], [1.0, 0.2, 0.8, 0.1], [0.0, 0.2, 0.1, 0.7]])


def answers_of(logits: torch.Tensor, arms: torch.Tensor, old: torch.Tensor, adv: np.ndarray) -> AnswerLogps:
    logps = torch.log_softmax(logits, -1).gather(1, arms).reshape(-1)
    return AnswerLogps(logps, old, torch.from_numpy(adv.reshape(-1)), torch.arange(len(logps)), len(logps))


def train(method: str, seed: int, steps: int = 120) -> torch.Tensor:
    """Probabilities [CONTEXTS, ARMS] after training from a policy that prefers a bad arm."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    logits = torch.zeros(CONTEXTS, ARMS, dtype=torch.float64)
    logits[:, 3], logits[2, 1] = 1.0, 1.0
    logits.requires_grad_()
    values = torch.zeros(CONTEXTS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    for _ in range(steps):
        probabilities = torch.softmax(logits.detach(), -1)
        arms = torch.multinomial(probabilities, GROUP, replacement=True)
        old = torch.log(probabilities).gather(1, arms).reshape(-1)
        paid = np.take_along_axis(PAYS, arms.numpy(), 1) + 0.05 * rng.standard_normal((CONTEXTS, GROUP))
        expected = values.detach()[:, None].expand(-1, GROUP)
        if method == "ppo":
            rewards = [np.array([r]) for r in paid.reshape(-1)]
            found, returns = advantages.gae(rewards, [np.array([v]) for v in expected.reshape(-1).tolist()], 1.0, 0.95)
            adv = np.concatenate(advantages.whiten(found))
        elif method == "rloo":
            adv = advantages.leave_one_out(paid)
        else:
            adv = advantages.group_relative(paid, "no" if method == "dr_grpo" else "group")
        for _ in range(4 if method == "ppo" else 2):
            a = answers_of(logits, arms, old, adv)
            if method == "ppo":
                v = values[:, None].expand(-1, GROUP).reshape(-1)
                target = torch.from_numpy(np.concatenate(returns))
                loss = ppo(a, low=0.2, high=0.2).sum + 0.5 * value_loss(v, expected.reshape(-1), target, 0.2).sum
            elif method == "rloo":
                loss = rloo(a, low=0.2, high=0.2).sum
            else:
                high = 5.0 if method == "cispo" else 0.2
                loss = grpo(a, loss=method, low=0.2, high=high).sum
                assert method in DENOMINATORS
            optimizer.zero_grad()
            (loss / a.num_answers).backward()
            optimizer.step()
    return torch.softmax(logits.detach(), -1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", ["ppo", "rloo", "dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_the_arm_that_pays_most_is_found(method, seed):
    final = train(method, seed)
    best = torch.from_numpy(PAYS.argmax(1))
    assert float(final[torch.arange(CONTEXTS), best].min()) > 0.9
