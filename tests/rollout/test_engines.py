"""The engine: what it says is what the model says alone, whoever else is being answered."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.data.tiny_tokenizers import make_tokenizer
from tests.models.tiny import tiny_model
from trueup.models.adapters import attach_frozen
from trueup.models.policy import Policy
from trueup.rollout.batching import SPARE, Batch
from trueup.rollout.engines import (
    BASE,
    Engine,
    EngineClosed,
    Limits,
    QueueFull,
    Sampling,
    TooLong,
    UnknownAdapter,
)

TOKENIZER = make_tokenizer("qwen")
SIZE = len(TOKENIZER)
STOPS = [1, 2, 3]
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17], list(range(20, 45)), [9, 10]]


def make_engine(name: str = "qwen2", limits: Limits | None = None, stops=STOPS, **overrides) -> Engine:
    return Engine(Policy(tiny_model(name, vocab_size=SIZE, **overrides)), TOKENIZER, stops, limits)


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def engine(request):
    with make_engine(request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def one():
    with make_engine(limits=Limits(max_slots=4, max_queue=8)) as engine:
        yield engine


def by_transformers(engine, prompt, longest=12, stops=STOPS, **options):
    ids = torch.tensor([prompt])
    row = engine.policy.base.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=longest, eos_token_id=stops or None,
        pad_token_id=0, **options,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return engine.until_stop(row)


def logps_of(engine, prompt, ids):
    with torch.no_grad():
        logits = engine.policy.base(torch.tensor([[*prompt, *ids]])).logits[0].float()
    return torch.log_softmax(logits, -1)


def test_greedy_is_what_transformers_generates_whoever_comes_and_goes(engine):
    sampling = Sampling(max_new_tokens=12)
    under_way = []
    for prompt in PROMPTS:  # one after the other, so that they join a batch that runs
        under_way.append(engine.submit(prompt, sampling))
        time.sleep(0.01)
    for prompt, generation in zip(PROMPTS, under_way, strict=True):
        answer = generation.result(30)
        assert list(answer.ids) == by_transformers(engine, prompt)
        assert answer.text == TOKENIZER.decode(answer.ids, skip_special_tokens=True)
        with pytest.raises(EOFError):
            generation.next_piece()
        assert answer.usage.completion_tokens == len(answer.ids) and answer.usage.prompt_tokens == len(prompt)
    assert engine.generate(PROMPTS, sampling, batch_size=2) == [by_transformers(engine, p) for p in PROMPTS]
    expected = TOKENIZER.decode(by_transformers(engine, PROMPTS[0]), skip_special_tokens=True)
    assert engine.generate_text(PROMPTS[:1], sampling) == [expected]


def test_log_probabilities_are_those_of_a_plain_forward(engine):
    sampling = Sampling(temperature=0.8, max_new_tokens=12, seed=3, logprobs=4)
    for prompt, generation in [(p, engine.submit(p, sampling)) for p in PROMPTS]:
        answer = generation.result(30)
        plain = logps_of(engine, prompt, answer.ids)[len(prompt) - 1 :]
        assert len(answer.logps) == len(answer.ids)
        for place, token in enumerate(answer.logps):
            assert token.id == answer.ids[place]
            assert token.logp == pytest.approx(float(plain[place, token.id]), abs=1e-4)
            best = plain[place].topk(4)
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [x for _, x in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scores_are_those_of_a_plain_forward_and_name_the_likeliest(engine):
    sequences = [[5, 6, 7, 8, 9], [9], list(range(20, 40))]
    for ids, scored in zip(sequences, engine.score(sequences, top=2), strict=True):
        assert scored.ids == tuple(ids) and len(scored.tokens) == len(ids) - 1
        plain = logps_of(engine, ids, [])
        for place, token in enumerate(scored.tokens):
            assert token.id == ids[place + 1]
            assert token.logp == pytest.approx(float(plain[place, token.id]), abs=1e-4)
            assert token.top[0][0] == int(plain[place].argmax())
    ids = by_transformers(engine, [5, 6, 7], longest=4)
    [greedy] = engine.score([[5, 6, 7, *ids]], top=1)
    assert all(token.logp == token.top[0][1] for token in greedy.tokens[2:])


def test_a_seed_decides_in_any_company(engine):
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=30, max_new_tokens=10)
    alone = [engine.submit(p, replace(sampling, seed=i)).result(30).ids for i, p in enumerate(PROMPTS)]
    together = [engine.submit(p, replace(sampling, seed=i)) for i, p in enumerate(PROMPTS)]
    assert [g.result(30).ids for g in together] == alone
    drawn = engine.sample(PROMPTS, sampling, 1, list(range(len(PROMPTS))))
    assert [tuple(a.ids[: len(a.ids) - a.ended].tolist()) for [a] in drawn] == alone
    without = {engine.submit([5, 6], Sampling(1.0, max_new_tokens=10)).result(30).ids for _ in range(3)}
    assert len(without) > 1
    assert alone[1] != alone[5]  # the same prompt with another seed


def test_generate_follows_torchs_generator_where_no_seed_is_given(one):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(one.generate(PROMPTS, Sampling(1.0, repetition_penalty=1.2, max_new_tokens=8)))
    assert draws[0] == draws[1] != draws[2]


def test_repetition_penalty_is_transformers(one):
    for prompt in PROMPTS[:3]:
        answer = one.submit(prompt, Sampling(repetition_penalty=1.7, max_new_tokens=12)).result(30)
        assert list(answer.ids) == by_transformers(one, prompt, repetition_penalty=1.7)


def test_penalties_and_bias_are_openais(one):
    prompt, plain = [5, 6, 7], Sampling(max_new_tokens=6, logprobs=0)

    def by_hand(presence=0.0, frequency=0.0, bias=()):
        ids = []
        for _ in range(6):
            with torch.no_grad():
                logits = one.policy.base(torch.tensor([[*prompt, *ids]])).logits[0, -1].clone()
            for token in set(ids):
                logits[token] -= presence + frequency * ids.count(token)
            for token, value in bias:
                logits[token] += value
            ids.append(int(logits.argmax()))
            if ids[-1] in STOPS:
                return ids[:-1]
        return ids

    first = one.submit(prompt, plain).result(30).ids[0]
    for options in ({"presence": 50.0}, {"frequency": 30.0}, {"bias": ((first, -100.0), (33, 5.0))}):
        asked = replace(
            plain,
            presence_penalty=options.get("presence", 0.0),
            frequency_penalty=options.get("frequency", 0.0),
            logit_bias=dict(options.get("bias", ())),
        )
        answer = one.submit(prompt, asked).result(30)
        assert list(answer.ids) == by_hand(**options)
    assert len(set(one.submit(prompt, replace(plain, presence_penalty=1e4)).result(30).ids)) == 6


def test_top_k_1_and_min_p_1_are_greedy(one):
    greedy = one.submit([5, 6, 7], Sampling(max_new_tokens=8)).result(30).ids
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}):
        assert one.submit([5, 6, 7], Sampling(1.3, max_new_tokens=8, **narrow)).result(30).ids == greedy


def test_prompts_longer_than_a_stretch_give_the_same_answer():
    with make_engine(limits=Limits(prefill_tokens=7)) as engine:
        long = engine.submit(list(range(10, 60)), Sampling(max_new_tokens=6))
        short = [engine.submit(prompt, Sampling(max_new_tokens=30)) for prompt in PROMPTS]
        assert list(long.result(30).ids) == by_transformers(engine, list(range(10, 60)), 6)
        assert [list(g.result(30).ids) for g in short] == [by_transformers(engine, p, 30) for p in PROMPTS]


def test_little_memory_makes_requests_wait_and_bounds_the_cache():
    with make_engine(limits=Limits(max_slots=8, max_tokens=64), stops=[0]) as engine:
        assert engine.context == 64
        asked = [engine.submit([5, 6, 7, 8, i], Sampling(max_new_tokens=20)) for i in range(10, 18)]
        most = 0
        while not all(g.wait(0.001) for g in asked):
            most = max(most, engine.stats.cached_tokens)
        assert most <= 64
        assert {len(g.result().ids) for g in asked} == {20}
        assert len(engine.submit(list(range(5, 65 - 4)), Sampling(max_new_tokens=20)).result(30).ids) == 64 - 56


def test_rows_that_come_as_others_end_do_not_widen_the_cache(monkeypatch):
    widths, step = list[int](), Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: (step(self), widths.append(self.cache.width)))
    lengths = [24 + 5 * (number % 4) for number in range(24)]  # of four answers under way, one at a time ends
    with make_engine(limits=Limits(max_slots=4), stops=[]) as engine:
        with engine.together():
            asked = [engine.submit([5 + number], Sampling(max_new_tokens=n)) for number, n in enumerate(lengths)]
        answers = [generation.result(60).ids for generation in asked]
        assert answers == [tuple(by_transformers(engine, [5 + i], n, stops=[])) for i, n in enumerate(lengths)]
    assert len(widths) > 3 * max(lengths)  # steps of the batch, which was never empty
    assert max(widths) <= 1 + max(lengths) + SPARE


def test_what_cannot_be_answered_is_refused_at_once(one):
    with pytest.raises(TooLong, match="256 tokens"):
        one.submit([5] * 256, Sampling())
    with pytest.raises(TooLong):
        one.score([[5] * 257])
    with pytest.raises(ValueError, match="empty"):
        one.submit([], Sampling())
    with pytest.raises(ValueError, match="vocabulary"):
        one.submit([SIZE], Sampling())
    with pytest.raises(UnknownAdapter):
        one.submit([5], Sampling(), adapter="nobody")
    with pytest.raises(ValueError, match="top_p 2"):
        Sampling(top_p=2)


def wait_until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_queue_is_bounded_and_the_first_come_is_first_served():
    with make_engine(limits=Limits(max_slots=1, max_queue=2), stops=[0]) as engine:
        asked = [engine.submit([5, 6], Sampling(max_new_tokens=200)) for _ in range(3)]
        with pytest.raises(QueueFull):
            engine.submit([5, 6], Sampling())
        asked[2].cancel()  # one that waits
        assert asked[2].result(5).finish_reason == "cancelled"
        assert asked[0].result(30).usage.completion_tokens == 200
        assert asked[1].result(30).usage.completion_tokens == 200
        assert asked[0].ended < asked[1].started
        wait_until(lambda: engine.stats.active == 0)
        stats = engine.stats
        assert (stats.queued, stats.free_slots, stats.requests, stats.finished) == (0, 1, 3, 3)


def test_a_cancelled_request_frees_its_slot(one):
    engine = make_engine(limits=Limits(max_slots=2), stops=[0])
    begun, cancelled, pieces = threading.Event(), threading.Event(), []

    def hear(piece):  # in the engine's thread, which therefore cannot finish before it is told to stop
        pieces.append(piece)
        begun.set()
        cancelled.wait(30)

    with engine:
        generation = engine.submit([5, 6], Sampling(max_new_tokens=250), on_piece=hear)
        assert begun.wait(30)
        generation.cancel()
        cancelled.set()
        wait_until(lambda: engine.stats.active == 0)  # within a second: the soak measures it
        wait_until(lambda: pieces[-1].finish_reason is not None)
        assert pieces[-1].finish_reason == "cancelled" and generation.usage.completion_tokens < 250
        stream = engine.stream([5, 6], Sampling(max_new_tokens=250))
        next(stream)
        stream.close()
        assert engine.stats.active == 0


def test_pieces_can_be_pushed_and_a_reader_that_fails_is_gone(one):
    seen, done = [], threading.Event()

    def hear(piece):
        seen.append(piece)
        if piece.finish_reason:
            done.set()

    one.submit([5, 6], Sampling(max_new_tokens=9), on_piece=hear)
    assert done.wait(10)
    assert "".join(p.text for p in seen) == one.submit([5, 6], Sampling(max_new_tokens=9)).result(10).text

    def fail(piece):
        raise RuntimeError("gone")

    generation = one.submit([5, 6], Sampling(max_new_tokens=200), on_piece=fail)
    assert generation.wait(10)
    assert generation.finish_reason in ("cancelled", "stop")


def test_a_failing_model_ends_the_answers_under_way_and_no_others(caplog):
    with make_engine() as engine:
        forward, engine.policy.base.forward = engine.policy.base.forward, None
        broken = engine.submit([5, 6], Sampling(max_new_tokens=5))
        with pytest.raises(TypeError):
            broken.result(10)
        engine.policy.base.forward = forward
        assert engine.submit([5, 6], Sampling(max_new_tokens=5)).result(10).finish_reason in ("length", "stop")
        assert engine.stats.active == 0


def test_closing_drains_or_cancels_and_takes_nothing_more():
    for drain, reason in ((True, "length"), (False, "cancelled")):
        engine = make_engine(limits=Limits(max_slots=1), stops=[0])
        asked = [engine.submit([5, 6], Sampling(max_new_tokens=60)) for _ in range(3)]
        engine.close(drain=drain)
        assert [g.result(1).finish_reason for g in asked][-1] == reason
        with pytest.raises(EngineClosed):
            engine.submit([5], Sampling())
    engine = make_engine(stops=[0])
    slow = engine.submit([5, 6], Sampling(max_new_tokens=250))
    engine.close(drain=True, timeout=0.0)
    assert slow.result(1).finish_reason in ("cancelled", "length")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters that clearly change what the model says."""
    found = []
    base = tmp_path_factory.mktemp("base")
    tiny_model("qwen2", vocab_size=SIZE).save_pretrained(base)
    for seed in (1, 2):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        found.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(found[-1])
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_adapters_are_chosen_by_the_request(adapters, adapted):
    def alone(directories):
        base = tiny_model("qwen2", vocab_size=SIZE)
        policy = Policy(base, attach_frozen(base, directories))
        with Engine(policy, TOKENIZER, STOPS) as engine:
            return [tuple(ids) for ids in engine.generate(PROMPTS, Sampling(max_new_tokens=10))], engine.score(PROMPTS)

    first, second = adapters
    plain, one, two, both = alone([]), alone([first]), alone([second]), alone([first, second])
    base = tiny_model("qwen2", vocab_size=SIZE)
    policy = Policy(base, attach_frozen(base, [second] if adapted else []))
    with Engine(policy, TOKENIZER, STOPS) as engine:
        engine.attach("one", [first])
        engine.attach("both", [first, second])
        assert engine.adapters == (BASE, "one", "both")
        expected = {None: two if adapted else plain, BASE: plain, "one": one, "both": both}
        asked = [
            (voice, number, engine.submit(prompt, Sampling(max_new_tokens=10), voice))
            for number, prompt in enumerate(PROMPTS)
            for voice in expected
        ]
        for voice, number, generation in asked:
            assert generation.result(30).ids == expected[voice][0][number]
        for voice, (_, scores) in expected.items():
            for mine, theirs in zip(engine.score(PROMPTS, adapter=voice), scores, strict=True):
                assert [t.logp for t in mine.tokens] == pytest.approx([t.logp for t in theirs.tokens], abs=1e-4)
    assert not policy.trainable()


def test_a_policy_in_training_is_left_as_it_was(adapters):
    base = tiny_model("qwen2", vocab_size=SIZE)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    policy = Policy(base, model)
    policy.model.train()
    trained = set(policy.trainable())
    with Engine(policy, TOKENIZER, STOPS) as engine:
        engine.submit([5, 6], Sampling(max_new_tokens=4), BASE).result(10)
        engine.score([[5, 6, 7]], adapter=BASE)
        wait_until(lambda: engine.stats.active == 0)
    assert set(policy.trainable()) == trained and policy.model.training
    assert model.active_adapters == ["default"]


def test_a_model_with_other_memory_than_keys_and_values_is_answered_one_by_one():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Lfm2Config(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    with Engine(Policy(tf.AutoModelForCausalLM.from_config(config).eval()), TOKENIZER, STOPS) as engine:
        asked = [engine.submit(prompt, Sampling(max_new_tokens=8)) for prompt in PROMPTS]
        assert [list(g.result(60).ids) for g in asked] == [by_transformers(engine, p, 8) for p in PROMPTS]
