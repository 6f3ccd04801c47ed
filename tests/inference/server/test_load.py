"""Many clients over HTTP on the built-in model: nothing fails, leaks or waits for ever (A8)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from statistics import median, quantiles

import httpx
import psutil
import pytest

from tests.inference.server.conftest import MODEL
from tests.memory_watch import KIB_PER_ANSWER, STANDING, grown, leaked, told, watched

CLIENTS = 32
WORDS = ["list", "show", "count", "customers", "orders", "older", "than", "between", "names", "cheapest", "by", "year"]


@dataclass
class Seen:
    """What clients saw: answers, seconds to first text, streamed pieces of text, cancelled ones."""

    answers: int = 0
    cancelled: int = 0
    first: list[float] = field(default_factory=list)
    pieces: int = 0


@contextlib.contextmanager
def server():
    """(port, process) of `trueup serve`."""
    command = [sys.executable, "-m", "trueup", "serve", "--model_name_or_path", MODEL, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}) as started:
        try:
            line = next(line for line in started.stderr if "serving " in line)
            threading.Thread(target=started.stderr.read, daemon=True).start()
            yield int(line.strip().removesuffix("/v1").rpartition(":")[2]), psutil.Process(started.pid)
        finally:
            started.kill()


async def ask(port: int, body: dict, seen: Seen, leave_after: int = 0) -> None:
    """One streamed answer over a connection of its own; with `leave_after`, broken off after so many pieces."""
    text = json.dumps({"model": MODEL, "stream": True, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n"
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + text)
    try:
        status = await reader.readline()
        assert b" 200 " in status, status
        pieces, done = 0, False
        async for line in reader:
            assert b'"error"' not in line, line
            done = done or line.startswith(b"data: [DONE]")
            if b'"content":"' in line and b'"content":""' not in line:
                pieces += 1
                if pieces == 1:
                    seen.first.append(time.monotonic() - begun)
                if pieces == leave_after:
                    seen.cancelled += 1
                    return
        assert done, "the stream has no end"
        seen.pieces += pieces
        seen.answers += 1
    finally:
        writer.close()


def question(draw: random.Random) -> list[dict]:
    return [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randrange(3, 40)))}]


async def clients(port: int, seen: Seen, seconds: float = 1e9, requests: int = 10**9, count: int = CLIENTS) -> None:
    """So many clients, each asking one thing after the other, until the time or the requests are up."""
    end, left = time.monotonic() + seconds, iter(range(requests))

    async def client(number: int) -> None:
        draw = random.Random(number)
        for _ in left:
            body = {
                "messages": question(draw), "max_tokens": draw.randrange(1, 60), "seed": 1,
                "temperature": draw.choice([0, 1]), "stop": ["zzz"], "logprobs": draw.choice([True, False]),
            }  # fmt: skip
            await ask(port, body, seen, draw.choice([0, 0, 0, 0, 2]))
            if time.monotonic() > end:
                return

    await asyncio.gather(*(client(number) for number in range(count)))


def free_again(port: int, seconds: float) -> float:
    """Seconds until no answer is under way any more."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).json()
        if not health["active"] + health["queued"]:
            return time.monotonic() - begun
        time.sleep(0.01)
    raise AssertionError(health)


def rate(port: int, count: int, tokens: int) -> float:
    """Tokens a second of `count` clients at the same time, none of whose answers ends before its length."""
    draw = random.Random(count)
    body = {"max_tokens": tokens, "temperature": 0, "logit_bias": {"1": -100, "2": -100}, "skip_special_tokens": False}

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(port, {**body, "messages": question(draw)}, Seen()) for _ in range(count)))

    begun = time.monotonic()
    asyncio.run(all_of_them())
    return count * tokens / (time.monotonic() - begun)


def test_some_clients_for_some_requests():
    with server() as (port, _):
        seen = Seen()
        asyncio.run(clients(port, seen, requests=60, count=8))
        assert seen.answers + seen.cancelled == 60
        free_again(port, 30)


@pytest.mark.prove
def test_2000_requests_leave_memory_flat():
    with server() as (port, process):
        seen, begun = Seen(), time.monotonic()
        with watched(process, lambda: seen.answers, every=1.0) as memory:
            asyncio.run(clients(port, seen, requests=2000, count=8))
        seconds, late = time.monotonic() - begun, quantiles(seen.first, n=20)[-1]
        free_again(port, 5)
    print(f"\n{seen.answers} answers, {seen.cancelled} broken off, {seen.pieces / seconds:.0f} pieces/s, 8 clients")
    print(f"first text: p50 {1e3 * median(seen.first):.0f} ms, p95 {1e3 * late:.0f} ms; {told(memory)}")
    assert memory[-1][1] - memory[len(memory) // 2][1] < 24 << 20  # too few answers to tell what each of them leaves


@pytest.mark.prove
def test_32_streaming_clients_for_5_minutes():
    with server() as (port, process):
        rate(port, 8, 96)
        alone, together = (sorted(rate(port, count, 96) for _ in range(5))[2] for count in (1, CLIENTS))
        seen = Seen()
        with watched(process, lambda: seen.answers) as memory:
            asyncio.run(clients(port, seen, seconds=300))
        free_again(port, 5)
        freed = []
        for _ in range(20):
            endless = {"max_tokens": 1900, "logit_bias": {"1": -100, "2": -100}, "messages": question(random.Random(0))}
            asyncio.run(ask(port, endless, Seen(), leave_after=2))
            freed.append(free_again(port, 5))
    print(f"\n{alone:.0f} tokens/s alone, {together:.0f} with {CLIENTS}: {together / alone:.1f} times")
    print(f"{seen.answers} answers, {seen.cancelled} broken off; first text p50 {1e3 * median(seen.first):.0f} ms")
    print(f"{told(memory)}; a broken off one's slot free within {max(freed):.2f} s")
    assert together >= 4 * alone
    assert leaked(memory) < KIB_PER_ANSWER
    assert grown(memory) < STANDING
    assert max(freed) < 1.0
