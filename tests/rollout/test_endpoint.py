"""Endpoints: patience with what may pass, none with what will not; limits; and the key stays secret."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from tests.rollout.judge_server import Raw, Silence, Status, completion, serving
from trueup.errors import ConfigError
from trueup.rollout import endpoint
from trueup.rollout.endpoint import Endpoint, Unanswered, ask_all

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")


def text(reply):
    return reply.text


def in_turn(*answers):
    return lambda request, number: answers[min(number, len(answers)) - 1]


def test_a_reply_with_its_cost():
    with serving(in_turn("hi")) as server:
        asked = Endpoint(server.url, options={"top_k": 3, "seed": None})
        assert asked.chat(HELLO, text, temperature=0.5, seed=4) == "hi"
        assert server.requests == [{"model": "judge", "messages": HELLO, "temperature": 0.5, "top_k": 3}]
        assert asked.spent.to_dict() == {"requests": 1, "retries": 0, "prompt_tokens": 7, "completion_tokens": 3}


@pytest.mark.parametrize(
    "fault",
    [
        Status(429), Status(429, {"Retry-After": "0"}), Status(503), Raw(b"<html>"), Raw(b'{"choices": []}'),
        Raw(b'{"choices": [{"message": {"content": null}}]}'), Raw(completion("hi")[:20], 500), Silence(), Raw(b""),
    ],
    ids=str,
)  # fmt: skip
def test_what_may_pass_is_asked_again(fault):
    with serving(in_turn(fault, fault, "hi")) as server:
        asked = Endpoint(server.url, seconds=0.3)
        assert asked.chat(HELLO, text) == "hi"
        assert asked.spent.retries == 2


def test_a_retry_waits_as_long_as_it_is_told(monkeypatch):
    slept = []
    # In its module alone: other threads of this process sleep too.
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic, time=time.time))
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: 1.0)
    with serving(in_turn(Status(429, {"Retry-After": "7"}), Status(500), Status(500), "hi")) as server:
        assert Endpoint(server.url).chat(HELLO, text) == "hi"
    assert [s for s in slept if s] == [7.0, 14.0, 28.0]


def test_after_all_tries_the_last_reason_is_told():
    with serving(in_turn(Status(429, text="slow down"))) as server:
        with pytest.raises(Unanswered, match="HTTP 429: slow down"):
            Endpoint(server.url, tries=3).chat(HELLO, text)
        assert len(server.requests) == 3


def test_a_request_the_endpoint_cannot_take_is_not_repeated():
    with serving(in_turn(Status(400, text="too long"))) as server:
        with pytest.raises(Unanswered, match="too long"):
            Endpoint(server.url).chat(HELLO, text)
        assert len(server.requests) == 1


def test_a_refusal_of_everything_stops_at_once_and_the_key_is_in_no_message(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
    with serving(in_turn(Status(401, text="bad key sk-secret-123"))) as server:
        with pytest.raises(ConfigError) as caught:
            Endpoint(server.url, key_env="JUDGE_KEY").chat(HELLO, text)
        assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
    assert "sk-secret" not in str(caught.value) and "HTTP 401" in str(caught.value)
    assert "sk-secret" not in str(Endpoint(server.url, key_env="JUDGE_KEY").identity)


def test_a_key_that_is_not_there_is_an_error_before_any_request(monkeypatch, caplog):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        Endpoint("http://127.0.0.1:1/v1#m", key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "k")
    Endpoint("http://far.example/v1#m", key_env="JUDGE_KEY")
    assert "without encryption" in caplog.text


def test_a_redirect_is_not_followed():
    with serving(in_turn("hi")) as other, serving(
        in_turn(Status(302, {"Location": other.url.partition("#")[0]}))
    ) as server:  # fmt: skip
        with pytest.raises(ConfigError, match="HTTP 302"):
            Endpoint(server.url).chat(HELLO, text)
        assert not other.requests


def test_a_query_is_sent_and_not_told():
    with serving(in_turn("hi")) as server:
        asked = Endpoint(server.url.replace("#", "?version=1&secret=s#"))
        assert asked.chat(HELLO, text) == "hi"
        assert server.paths == ["/v1/chat/completions?version=1&secret=s"] and "secret" not in str(asked.identity)


def test_a_reply_has_a_limit_in_size(monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1000)
    with serving(in_turn("x" * 2000)) as server, pytest.raises(Unanswered, match="more than 1,000 bytes"):
        Endpoint(server.url, tries=1).chat(HELLO, text)


def test_junk_is_asked_again_otherwise():
    def read(reply):
        if reply.text != "yes":
            raise ValueError(f"no verdict in {reply.text!r}")
        return reply.text

    with serving(in_turn("er", "yes")) as server:
        assert Endpoint(server.url).chat(HELLO, read, {"temperature": 0.7}, temperature=0.0) == "yes"
        assert [r["temperature"] for r in server.requests] == [0.0, 0.7]
    with serving(in_turn("er")) as server, pytest.raises(Unanswered, match="no verdict in 'er'"):
        Endpoint(server.url, tries=2).chat(HELLO, read)


def test_several_are_under_way_at_once_and_no_more():
    def ask(task):
        with lock:
            now.append(1)
            most[0] = max(most[0], len(now))
        time.sleep(0.02)
        with lock:
            now.pop()
        return task * 2

    lock, now, most = threading.Lock(), [], [0]
    assert sorted(ask_all(range(12), ask, 3)) == [(i, 2 * i) for i in range(12)]
    assert most == [3]


def test_an_endpoint_that_is_gone_is_not_asked_for_ever():
    asked = []

    def ask(task):
        asked.append(task)
        raise Unanswered("nobody there")

    found = dict(ask_all(range(100), ask, 2))
    assert len(found) == 100 and all(isinstance(why, Unanswered) for why in found.values())
    assert len(asked) <= endpoint.IN_A_ROW + 1
    assert "not asked" in str(found[99]) and "nobody there" in str(found[99])


def test_other_errors_are_raised_where_the_results_are_read():
    def ask(task):
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        list(ask_all(range(3), ask, 2))
