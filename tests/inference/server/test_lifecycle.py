"""A server from its start to its end: what it says, when it is busy, how long it takes, how it leaves (T9, T10)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from tests.inference.server.conftest import MODEL, load, serving
from trueup.cli import main
from trueup.inference.server.failures import ApiError
from trueup.inference.server.settings import Limits, Settings
from trueup.inference.server.under_way import GONE, while_wanted

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

ASK = [{"role": "user", "content": "How many customers are there?"}]


def endless(limit: int = 1900) -> dict:
    """A request whose answer takes seconds: nothing ends it before its length."""
    return {"model": MODEL, "messages": ASK, "max_tokens": limit, "logit_bias": {"1": -100, "2": -100}, "stream": True}


@contextlib.contextmanager
def process(*words: str):
    """(url, process) of `trueup serve` as a user starts it, ready to answer."""
    command = [sys.executable, "-m", "trueup", "serve", "--model_name_or_path", MODEL, "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}) as started:
        try:
            told = next(line for line in started.stderr if "serving " in line)
            threading.Thread(target=started.stderr.read, daemon=True).start()
            yield told.split(" on ")[1].strip(), started
        finally:
            started.kill()


def events(response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_server_asked_to_end_lets_answers_end_and_takes_nothing_new(asked: signal.Signals):
    with process("--drain", "60") as (url, started), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/chat/completions", json=endless(400)) as response:
            lines = response.iter_lines()
            next(line for line in lines if '"content":"' in line)
            started.send_signal(asked)
            rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert rest[-1] == "[DONE]" and json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert started.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            client.get(f"{url}/models")


def test_what_is_not_ended_by_then_is_told_so():
    """In this process: the same end, begun by hand."""
    settings = Settings(port=0, limits=Limits(drain=0.2))
    served = load(settings)
    with serving(settings, served=served) as (url, state), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/chat/completions", json=endless()) as response:
            lines = response.iter_lines()
            next(line for line in lines if '"content":"' in line)
            state.drain()
            last = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")][-1]
        assert json.loads(last)["error"]["code"] == "unavailable"
        refused = client.post(f"{url}/chat/completions", json={"model": MODEL, "messages": ASK})
        assert refused.status_code == 503 and refused.headers["retry-after"]
    served.close()


def test_a_model_that_is_still_loading_is_503(served):
    with serving(Settings(port=0), served=served) as (url, state):
        state.served = None
        root = url.removesuffix("/v1")
        health = httpx.get(f"{root}/health")
        assert health.status_code == 503 and health.json() == {"status": "loading"} and health.headers["retry-after"]
        for found in (httpx.get(f"{url}/models"), httpx.post(f"{url}/chat/completions", json={"model": MODEL})):
            assert found.status_code == 503 and found.headers["retry-after"]
            assert found.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{root}/version").status_code == 200
        state.served = served
        assert httpx.get(f"{root}/health").json()["status"] == "ok"


@pytest.fixture(scope="module")
def small():
    """One slot, one place in the queue."""
    served = load(Settings(port=0, limits=Limits(slots=1, queue=1)))
    with serving(served.settings, served=served) as (url, _):
        yield url, served
        served.close()


def idle(served, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while served.engine.stats.active + served.engine.stats.queued and time.monotonic() < until:
        time.sleep(0.01)
    return served.engine.stats.active + served.engine.stats.queued == 0


def test_beyond_the_queue_clients_are_told_to_come_again(small):
    url, served = small
    with contextlib.ExitStack() as held, httpx.Client(timeout=60) as client:
        for _ in range(2):
            response = held.enter_context(client.stream("POST", f"{url}/chat/completions", json=endless()))
            assert response.status_code == 200
        other = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            other.chat.completions.create(model=MODEL, messages=ASK, max_tokens=2)
        assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"]
    assert idle(served)
    many = httpx.post(f"{url}/chat/completions", json={"model": MODEL, "messages": ASK, "n": 16}, timeout=60)
    assert many.status_code == 429  # all or none: those already queued are taken back
    assert idle(served)
    retrying = openai.OpenAI(base_url=url, api_key="none", max_retries=5)
    assert retrying.chat.completions.create(model=MODEL, messages=ASK, max_tokens=2).choices


def test_beyond_the_open_requests_as_well(served):
    with (
        serving(Settings(port=0, limits=Limits(requests=1)), served=served) as (url, _),
        httpx.stream("POST", f"{url}/chat/completions", json=endless(), timeout=60) as response,
    ):
        assert response.status_code == 200
        refused = httpx.get(f"{url}/models")
        assert refused.status_code == 503 and refused.headers["retry-after"]
    assert idle(served)


def test_a_request_takes_no_longer_than_the_deadline():
    served = load(Settings(port=0, limits=Limits(deadline=0.3)))
    with serving(served.settings, served=served) as (url, _):
        whole = httpx.post(f"{url}/chat/completions", json={**endless(), "stream": False}, timeout=60)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "deadline_exceeded"
        with httpx.stream("POST", f"{url}/chat/completions", json=endless(), timeout=60) as response:
            assert json.loads(events(response)[-1])["error"]["code"] == "deadline_exceeded"
        assert idle(served)
        served.close()


def test_scores_and_echoes_take_no_longer_either():
    """Work that draws nothing: it is given up, and the caller told, as when the caller is gone."""

    class Listening:
        async def receive(self):
            await asyncio.sleep(60)

    class Gone:
        async def receive(self):
            return {"type": "http.disconnect"}

    async def told(request, seconds: float) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await while_wanted(request, asyncio.sleep(60), seconds)
        return caught.value

    assert asyncio.run(told(Listening(), 0.01)).code == "deadline_exceeded"
    assert asyncio.run(told(Gone(), 60.0)) is GONE


def test_a_body_that_does_not_arrive_is_not_waited_for(served):
    with serving(Settings(port=0, limits=Limits(upload=0.2)), served=served) as (url, _):
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), 30) as connection:
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_breaks_off_leaves_no_trace(served, caplog):
    with serving(Settings(port=0), served=served) as (url, _):
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        body = json.dumps(endless()).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        for _ in range(20):
            with socket.create_connection((host, int(port)), 30) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert idle(served)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    stats = served.engine.stats
    assert stats.requests == stats.finished and stats.free_slots == served.settings.limits.slots


def test_a_port_in_use_ends_with_4_and_names_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", "--model_name_or_path", MODEL, "--port", port])
    assert result.exit_code == 4 and "--port" in result.stderr
    if sys.platform == "linux":
        assert f"pid {os.getpid()}" in " ".join(result.stderr.split())


def test_without_the_extra_the_way_out_is_said():
    code = "import sys; sys.modules['fastapi'] = None; from trueup.cli import main; main()"
    words = ["serve", "--model_name_or_path", MODEL, "--port", "0"]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert found.returncode == 6 and "pip install 'trueup[serve]'" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("asked", [["--engine", "vllm"], ["infer_backend=vllm"], ["--infer_backend", "vllm"]])
def test_vllm_takes_this_process_over(monkeypatch, asked):
    from trueup.inference.server import vllm_server

    taken = []
    monkeypatch.setattr(vllm_server, "_program", lambda: "/opt/bin/vllm")
    monkeypatch.setattr(os, "execve", lambda *asked: taken.append(asked))
    monkeypatch.setenv("API_KEY", "k" * 40)
    words = ["serve", "--model_name_or_path", MODEL, *asked, "--host", "0.0.0.0", "--port", "8123"]
    words += ["--vllm_maxlen", "512", "--vllm_config", '{"kv_cache_dtype": "fp8", "disable_log_stats": true}']
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    ((program, command, environment),) = taken
    assert program == "/opt/bin/vllm" and command[:2] == ["vllm", "serve"]
    said = " ".join(command)
    for part in ("--host 0.0.0.0", "--port 8123", "--max-model-len 512", "--kv-cache-dtype fp8", "--disable-log-stats"):
        assert part in said
    assert "k" * 40 not in said and environment["VLLM_API_KEY"] == "k" * 40


def test_without_vllm_the_way_out_is_said(monkeypatch):
    from trueup.inference.server import vllm_server

    monkeypatch.setattr(vllm_server.shutil, "which", lambda name: None)
    monkeypatch.setattr(vllm_server.sys, "executable", "/nowhere/python")
    for words in (["--engine", "vllm"], ["infer_backend=vllm", "vllm_enforce_eager=true"]):
        result = CliRunner().invoke(main, ["api", "--model_name_or_path", MODEL, *words])
        assert result.exit_code == 6 and "trueup[vllm]" in result.stderr
    for words in (["chat", "infer_backend=vllm"], ["serve", "--engine", "transformers", "infer_backend=vllm"]):
        result = CliRunner().invoke(main, [words[0], "--model_name_or_path", MODEL, *words[1:]])
        assert result.exit_code == 2 and "serve --engine vllm" in " ".join(result.stderr.split())


def test_a_server_ends_with_the_program_that_holds_its_input():
    words = [sys.executable, "-m", "trueup", "serve", "--model_name_or_path", MODEL, "--port", "0", "--while-stdin"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert any("serving " in line for line in started.stderr)
            assert started.poll() is None
            started.stdin.close()
            assert started.wait(60) == 0
        finally:
            started.kill()
