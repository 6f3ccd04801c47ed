"""Requests as a fuzzer makes them, and inputs that have brought other servers down (S11, S12, S20–S22, S24, T19)."""

from __future__ import annotations

import json
import logging
import socket

import httpx
import pytest

from tests.inference.server.conftest import MODEL, load, serving
from trueup.inference.server.settings import Settings

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TALK = [{"role": "user", "content": "hi"}]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "king"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": ANYTHING}), max_size=2)
CALL = st.fixed_dictionaries(
    {"id": ANYTHING, "function": st.fixed_dictionaries({"name": ANYTHING, "arguments": ANYTHING})}
)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": st.one_of(st.text(max_size=30), PARTS, ANYTHING)},
    optional={"tool_calls": st.one_of(st.lists(CALL, max_size=2), ANYTHING), "name": ANYTHING},
)
FIELDS = {
    "temperature": st.one_of(st.floats(0, 2), ANYTHING),
    "top_p": st.one_of(st.floats(0, 1), ANYTHING),
    "top_k": st.one_of(st.integers(-1, 50), ANYTHING),
    "min_p": st.one_of(st.floats(0, 1), ANYTHING),
    "presence_penalty": st.one_of(st.floats(-2, 2), ANYTHING),
    "frequency_penalty": st.one_of(st.floats(-2, 2), ANYTHING),
    "repetition_penalty": st.one_of(st.floats(0.1, 3), ANYTHING),
    "logit_bias": st.one_of(st.dictionaries(st.integers(-2, 1200).map(str), st.floats(-99, 99), max_size=3), ANYTHING),
    "seed": st.one_of(st.integers(), ANYTHING),
    "n": st.one_of(st.integers(1, 4), ANYTHING),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=5), ANYTHING),
    "stop_token_ids": st.one_of(st.lists(st.integers(0, 2000), max_size=3), ANYTHING),
    "logprobs": st.one_of(st.booleans(), ANYTHING),
    "top_logprobs": st.one_of(st.integers(0, 20), ANYTHING),
    "stream_options": st.one_of(st.fixed_dictionaries({"include_usage": st.booleans()}), ANYTHING),
    "tools": ANYTHING, "tool_choice": ANYTHING, "response_format": ANYTHING, "user": ANYTHING, "metadata": ANYTHING,
}  # fmt: skip
CHAT = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": st.lists(MESSAGE, min_size=1, max_size=3), "max_tokens": st.integers(-1, 3)},
    optional={"stream": st.booleans(), **FIELDS},
)
COMPLETION = st.fixed_dictionaries(
    {
        "model": st.just(MODEL), "max_tokens": st.integers(-1, 3),
        "prompt": st.one_of(st.text(max_size=20), st.lists(st.integers(-1, 1200), max_size=5), ANYTHING),
    },
    optional={"stream": st.booleans(), "echo": st.booleans(), **FIELDS},
)  # fmt: skip
FEW = hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(
        base_url=url.removesuffix("/v1"), timeout=60, headers={"content-type": "application/json"}
    ) as client:
        yield client


def is_fine(client, path: str, body: object) -> None:
    """Answered, or refused in OpenAI's shape; never the server's fault."""
    found = client.post(path, content=json.dumps(body))
    assert found.status_code == 200 or 400 <= found.status_code < 500, (body, found.text)
    assert "internal_error" not in found.text and "Traceback" not in found.text, (body, found.text)
    if found.status_code != 200:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    elif found.headers["content-type"].startswith("text/event-stream"):
        assert found.text.endswith("data: [DONE]\n\n"), (body, found.text[-300:])


@FEW
@given(body=CHAT)
def test_no_chat_is_the_servers_fault(client, body):
    is_fine(client, "/v1/chat/completions", body)


@FEW
@given(body=COMPLETION)
def test_no_completion_is_the_servers_fault(client, body):
    is_fine(client, "/v1/completions", body)


@FEW
@given(path=st.sampled_from(["/v1/score", "/tokenize", "/detokenize"]), body=st.dictionaries(
    st.sampled_from(["model", "messages", "beta", "prompt", "tokens", "tools", "add_special_tokens"]),
    st.one_of(st.just(MODEL), st.lists(MESSAGE, max_size=3), ANYTHING),
))  # fmt: skip
def test_nothing_else_is_either(client, path, body):
    is_fine(client, path, body)


def test_the_server_is_alive_after_all_that(client, served):
    done = client.post("/v1/chat/completions", json={"model": MODEL, "messages": TALK, "max_tokens": 2})
    assert done.status_code == 200
    assert served.engine.stats.active == served.engine.stats.queued == 0


def refused(client, **more) -> tuple[int, str | None]:
    found = client.post("/v1/chat/completions", json={"model": MODEL, "messages": TALK, **more})
    return found.status_code, found.json()["error"]["param"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt_embeds": "gASVFAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOULg=="}, "prompt_embeds"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "UklGRg=="}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]},
         "messages[0].content[0]"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_and_named(client, more, param):
    assert refused(client, **more) == (400, param)


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}/a.png", "http://localhost:{}\\@example.org/a.png"])
def test_no_address_is_ever_visited(client, form):
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.3)
        address = form.format(bait.getsockname()[1])
        part = {"type": "image_url", "image_url": {"url": address}}
        assert refused(client, messages=[{"role": "user", "content": [part]}]) == (400, "messages[0].content[0]")
        said = {"model": MODEL, "messages": [{"role": "user", "content": address}], "max_tokens": 2}
        done = client.post("/v1/chat/completions", json=said)
        assert done.status_code == 200
        with pytest.raises(TimeoutError):
            bait.accept()


def test_prompts_and_tokens_are_not_logged(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    key, secret = "k" * 40, "my diagnosis is private"
    served = load(Settings(port=0, key=key))
    with serving(served.settings, served=served) as (url, _):
        asked = {"model": MODEL, "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": "Bearer wrong"}):
            assert httpx.post(f"{url}/chat/completions", json=asked, headers=headers, timeout=60).status_code in (
                200,
                401,
            )
        assert httpx.get(f"{url}/models?api_key={key}").status_code == 401  # a token in a URL is in other logs
        served.close()
    ours = [record for record in caplog.records if record.name.split(".")[0] in ("trueup", "uvicorn", "fastapi")]
    told = " ".join(record.getMessage() for record in ours) + "".join(capfd.readouterr())
    assert secret not in told and key not in told
