"""The sampler: what it draws, that it is the model's own distribution, and that nothing but the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.tiny import tiny_model
from trueup.rollout.rollout import Rollout
from trueup.rollout.sampler import Choice, Sampled, sample_batch

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
ONE = Choice(temperature=1.0, top_p=1.0, top_k=0)
GREEDY = Choice(temperature=0.0, top_p=1.0, top_k=0)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return tiny_model(request.param, vocab_size=40, std=0.3).eval()


def draw(model, prompts=PROMPTS, answers=3, choice=ONE, seed=1, longest=12, stops=(1, 2, 3)):
    return sample_batch(
        model, prompts, answers, choice, max_new_tokens=longest, stop_ids=stops, pad_id=0, seed=seed
    )  # fmt: skip


def logps_of(model, prompt, ids, temperature=1.0):
    row = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        logits = model(row).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1)


def test_log_probabilities_are_those_of_plain_forwards(model):
    for prompt, group in zip(PROMPTS, draw(model, choice=Choice(0.7, 1.0, 0)), strict=True):
        for answer in group:
            logps = logps_of(model, prompt, answer.ids.tolist(), 0.7)
            picked = logps.gather(1, torch.tensor(answer.ids, dtype=torch.int64)[:, None]).squeeze(1)
            np.testing.assert_allclose(answer.logps, picked.numpy(), atol=2e-5)
            assert answer.entropy == pytest.approx(float(-(logps.exp() * logps).sum()), rel=1e-4)


def test_greedy_is_what_transformers_generates(model):
    for prompt, (answer,) in zip(PROMPTS, draw(model, answers=1, choice=GREEDY), strict=True):
        ids = torch.tensor([prompt])
        row = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                             eos_token_id=[1, 2, 3], pad_token_id=0)  # fmt: skip
        assert answer.ids.tolist() == row[0, len(prompt) :].tolist()


def test_the_seed_decides_and_nothing_else(model):
    torch.manual_seed(5)
    one = draw(model)
    torch.manual_seed(6)
    two, other = draw(model), draw(model, seed=2)
    assert [a.ids.tolist() for g in one for a in g] == [a.ids.tolist() for g in two for a in g]
    assert [a.ids.tolist() for g in one for a in g] != [a.ids.tolist() for g in other for a in g]
    state = torch.get_rng_state()
    draw(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_ends_with_its_stop_token_or_is_cut(model):
    answers = [a for g in draw(model, answers=20, stops=tuple(range(1, 9))) for a in g]
    assert {a.ended for a in answers} == {True, False} or all(a.ended for a in answers)
    for answer in answers:
        inside = [int(i) in range(1, 9) for i in answer.ids]
        assert not any(inside[:-1]) and inside[-1] == answer.ended
        assert answer.ended or len(answer.ids) == 12
        assert len(answer.logps) == len(answer.ids)


def test_tokens_come_with_the_models_probabilities():
    """20,000 draws of one token against the distribution: χ² far below what another distribution would give."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for choice, kept in ((ONE, 5), (Choice(1.0, 1.0, 2), 2), (Choice(1.0, 0.8, 0), 2), (Choice(0.5, 1.0, 3), 3)):
        ids, logps, _ = choice.draw(logits, uniform)
        expected = torch.softmax(logits[0] / choice.temperature, -1)
        torch.testing.assert_close(logps, expected.log()[ids])
        expected = torch.where(torch.arange(5) < kept, expected, 0.0)
        expected = (expected / expected.sum()).double()
        counts = torch.bincount(ids, minlength=5).double()
        alive = expected > 1e-9
        assert not counts[~alive].any()
        chi2 = ((counts - 20_000 * expected)[alive] ** 2 / (20_000 * expected[alive])).sum()
        assert float(chi2) < 20


def test_a_rollout_keeps_its_bits_in_a_checkpoint():
    import json

    rng = np.random.default_rng(0)
    answers = [[Sampled(rng.integers(0, 9, n).astype(np.int32), rng.random(n, np.float32), 1.0, n < 4) for n in (2, 4)]
               for _ in range(3)]  # fmt: skip
    rollout = Rollout.of(1, 2, np.array([7, 3, 5]), answers)
    rollout.put("old", [0, 2], np.float32([0.1, 0.2, 0.3, 0.4]))
    rollout.kept_S[1] = False
    again = Rollout.from_state(json.loads(json.dumps(rollout.state_dict())))
    for name in Rollout._ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(rollout, name))
    np.testing.assert_array_equal(again.tokens["old"], rollout.tokens["old"])
    assert again.answers_of([0, 2]) == [0, 4, 5] and again.lengths_P.tolist() == [2, 6, 6]
    assert again.take("old", [2, 0]).tolist() == np.float32([0.3, 0.4, 0.1, 0.2]).tolist()


def test_with_a_seed_for_each_answer_the_batch_does_not_matter(model):
    seeds = [[11, 12, 13], [21, 22, 23], [31, 32, 33]]
    together = draw(model, seed=[s for group in seeds for s in group])
    for prompt, group, drawn in zip(PROMPTS, seeds, together, strict=True):
        (alone,) = draw(model, prompts=[prompt], seed=group)
        assert [a.ids.tolist() for a in alone] == [a.ids.tolist() for a in drawn]
        (last,) = draw(model, prompts=[prompt], answers=1, seed=group[2:])
        assert last[0].ids.tolist() == drawn[2].ids.tolist()
