"""The engine's surface over a URL, and over vLLM up to its import."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.rollout.judge_server import Raw, Silence, Status, serving
from trueup.errors import ConfigError, ModelError
from trueup.rollout import endpoint as endpoint_module
from trueup.rollout.endpoint import Endpoint, Unanswered
from trueup.rollout.endpoint_engine import EndpointEngine
from trueup.rollout.engines import EngineClosed, QueueFull, Sampling, UnknownAdapter
from trueup.rollout.vllm_engine import VllmEngine


def events(*found, done=True):
    lines = [": keep-alive", *(f"data: {json.dumps(event)}" for event in found), *(["data: [DONE]"] if done else [])]
    return Raw("".join(f"{line}\n\n" for line in lines).encode())


def texts(*pieces, reason="stop"):
    chunks = [{"choices": [{"index": 0, "text": piece}]} for piece in pieces]
    last = {"choices": [{"index": 0, "text": "", "finish_reason": reason}]}
    return events(*chunks, last, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(pieces)}})


def test_pieces_usage_and_end_come_from_the_endpoint():
    with serving(lambda *_: texts("Hel", "lo 🙂", reason="length")) as server:
        engine = EndpointEngine(Endpoint(server.url), adapters=["other"])
        answer = engine.submit([5, 6, 7], Sampling(0.5, top_k=4, stop=("x",), seed=9), "other").result(10)
        assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == ("Hello 🙂", "length", 5)
        asked = server.requests[0]
        assert (asked["prompt"], asked["model"], asked["seed"], asked["top_k"]) == ([5, 6, 7], "other", 9, 4)
        assert asked["stop"] == ["x"] and "min_p" not in asked and "logit_bias" not in asked
        assert server.paths[0].endswith("/completions")
        assert list(engine.stream([5], Sampling())) == ["Hel", "lo 🙂"]
        engine.close()
        with pytest.raises(EngineClosed):
            engine.submit([5], Sampling())


def test_conversations_go_to_chat_completions():
    deltas = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "yes"}}]}]
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    with serving(lambda *_: events(*deltas, last)) as server:
        engine = EndpointEngine(Endpoint(server.url))
        answer = engine.chat([{"role": "user", "content": "ok?"}], Sampling()).result(10)
        assert (answer.text, answer.finish_reason) == ("yes", "stop")
        assert server.paths[0].endswith("/chat/completions")


def test_what_goes_wrong_reaches_the_reader(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)
    faults = [
        (events({"choices": [{"text": "half"}]}, done=False), Unanswered),
        (events({"error": {"message": "broken"}}), Unanswered),
        (Status(401), ConfigError),
        (Status(500), Unanswered),
    ]
    for fault, kind in faults:
        with serving(lambda *_, fault=fault: fault) as server:
            engine = EndpointEngine(Endpoint(server.url, tries=2))
            with pytest.raises(kind):
                engine.submit([5], Sampling()).result(10)
            assert engine.stats.active == 0
            assert len(server.requests) == (1 if kind is ConfigError or "half" in str(fault) else 2)


def test_an_endpoint_asked_again_before_anything_came(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)
    with serving(lambda _, number: Status(503) if number == 1 else texts("fine")) as server:
        assert EndpointEngine(Endpoint(server.url)).submit([5], Sampling()).result(10).text == "fine"


def test_requests_are_bounded_and_names_known():
    with serving(lambda *_: Silence()) as server:
        engine = EndpointEngine(Endpoint(server.url, seconds=1.0, tries=1), at_once=1, max_queue=1)
        asked = [engine.submit([5], Sampling()) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit([5], Sampling())
        with pytest.raises(UnknownAdapter):
            engine.submit([5], Sampling(), "nobody")
        asked[1].cancel()
        with pytest.raises(Unanswered):
            asked[0].result(10)
        assert asked[1].result(10).finish_reason == "cancelled"


def test_scores_come_from_completions_that_echo():
    echo = {"choices": [{"text": "abcd", "logprobs": {"token_logprobs": [None, -1.5, -0.25, -3.0]}}]}
    with serving(lambda *_: events(echo)) as server:
        [scored] = EndpointEngine(Endpoint(server.url)).score([[5, 6, 7]])
        assert [(t.id, t.logp) for t in scored.tokens] == [(6, -1.5), (7, -0.25)]
    with serving(lambda *_: texts("a")) as server, pytest.raises(Unanswered, match="echo"):
        EndpointEngine(Endpoint(server.url)).score([[5, 6, 7]])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_engine_says_how_to_get_it():
    with pytest.raises(ModelError, match=r"trueup\[vllm\]"):
        VllmEngine("some/model", [2])
