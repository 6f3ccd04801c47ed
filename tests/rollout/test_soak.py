"""Many clients at the same time on the built-in model: nothing fails, leaks or waits for ever."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest

from tests.memory_watch import KIB_PER_ANSWER, STANDING, grown, leaked, told, watched
from trueup.config.load import load_config
from trueup.models.allocator import stay_small
from trueup.models.load import load_for_inference, load_tokenizer
from trueup.rollout.engines import Engine, Limits, Sampling

CLIENTS = 32


def make_engine() -> tuple[Engine, list[int]]:
    words = ["--model_name_or_path", "builtin:sql-tiny", "--device", "cpu"]
    cfg = load_config(None, words, verb="infer")
    tokenizer = load_tokenizer(cfg.model)
    engine = Engine(load_for_inference(cfg.model, cfg.train), tokenizer, [2], Limits(max_slots=CLIENTS))
    return engine, tokenizer("Which students are older than 20?")["input_ids"]


class Client(threading.Thread):
    """Asks one thing after the other, and leaves some answers half read."""

    def __init__(self, engine: Engine, prompt: list[int], number: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.engine, self.prompt, self.seconds = engine, prompt, seconds
        self.random = random.Random(number)
        self.answers, self.cancels = 0, list[float]()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                self.ask()
        except BaseException as error:
            self.failure = error

    def ask(self) -> None:
        prompt = [*self.prompt, *(self.random.randrange(10, 900) for _ in range(self.random.randrange(1, 60)))]
        sampling = Sampling(
            self.random.choice([0.0, 1.0]), self.random.choice([1.0, 0.9]), self.random.choice([0, 40]),
            max_new_tokens=self.random.randrange(1, 60), presence_penalty=self.random.choice([0.0, 0.5]),
            stop=("zzz",), seed=1, logprobs=self.random.choice([None, 2]),
        )  # fmt: skip
        generation = self.engine.submit(prompt, sampling)
        leave = self.random.randrange(5) == 0
        for _ in generation:
            if leave:
                asked = time.monotonic()
                generation.cancel()
                assert generation.wait(60)
                self.cancels.append(time.monotonic() - asked)
                return
        self.answers += 1


def soak(seconds: float) -> tuple[Engine, list[Client], list[tuple[int, int]]]:
    engine, prompt = make_engine()
    clients = [Client(engine, prompt, number, seconds) for number in range(CLIENTS)]
    with watched(psutil.Process(), lambda: sum(client.answers for client in clients)) as memory:
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert [client.failure for client in clients if client.failure] == []
    end = time.monotonic() + 5
    while engine.stats.cached_tokens and time.monotonic() < end:  # given up with the step under way
        time.sleep(0.01)
    stats = engine.stats
    assert (stats.active, stats.queued, stats.free_slots, stats.cached_tokens) == (0, 0, CLIENTS, 0)
    assert stats.requests == stats.finished
    return engine, clients, memory


def tokens_per_second(engine: Engine, prompt: list[int], clients: int, tokens: int = 96) -> float:
    sampling = Sampling(max_new_tokens=tokens, logit_bias={2: -1e4})
    begun = time.perf_counter()
    asked = [engine.submit([*prompt, 10 + number], sampling) for number in range(clients)]
    drawn = sum(generation.result(120).usage.completion_tokens for generation in asked)
    return drawn / (time.perf_counter() - begun)


def test_many_clients_for_some_seconds():
    engine, clients, _ = soak(3.0)
    engine.close()
    assert sum(client.answers for client in clients) >= CLIENTS


def test_together_they_are_answered_faster_than_one_after_the_other():
    engine, prompt = make_engine()
    with engine:
        tokens_per_second(engine, prompt, 8, 16)
        best = max(
            tokens_per_second(engine, prompt, CLIENTS, 48) / tokens_per_second(engine, prompt, 1, 48) for _ in range(3)
        )
    assert best > 2.5  # 4 and more on a machine of one's own: the proof below


def proof(seconds: float) -> tuple[float, float, int, list[float], list[tuple[int, int]]]:
    """Tokens/s of one and of all; answers, seconds until cancelled ones had ended, memory. Set up as `serve` is."""
    stay_small()
    engine, prompt = make_engine()
    with engine:
        tokens_per_second(engine, prompt, 8)
        alone, together = (
            sorted(tokens_per_second(engine, prompt, count) for _ in range(5))[2] for count in (1, CLIENTS)
        )
    engine, clients, memory = soak(seconds)
    engine.close()
    cancels = sorted(wait for client in clients for wait in client.cancels)
    return alone, together, sum(client.answers for client in clients), cancels, memory


@pytest.mark.prove
def test_32_clients_for_5_minutes_leak_nothing_and_get_4_times_the_tokens():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        alone, together, answers, cancels, memory = process.submit(proof, 300.0).result()
    print(f"\n{alone:.0f} tokens/s alone, {together:.0f} with {CLIENTS}: {together / alone:.1f} times")
    half = cancels[len(cancels) // 2]
    print(f"{answers} answers; {len(cancels)} cancelled, half within {half:.3f} s, all within {cancels[-1]:.2f} s")
    print(told(memory))
    assert together >= 4 * alone
    assert cancels[-1] < 1.0
    assert leaked(memory) < KIB_PER_ANSWER
    assert grown(memory) < STANDING
