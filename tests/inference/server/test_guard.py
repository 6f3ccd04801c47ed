"""Who is let in, and how much may be sent (A7: S15–S21, S24)."""

from __future__ import annotations

import json
import socket

import pytest

httpx = pytest.importorskip("httpx")

from tests.inference.server.conftest import MODEL, serving  # noqa: E402
from trueup.cli import main  # noqa: E402
from trueup.cli_serve import read_key  # noqa: E402
from trueup.errors import ConfigError, ResourceError  # noqa: E402
from trueup.inference.server.app import State, make_routes  # noqa: E402
from trueup.inference.server.run import listen  # noqa: E402
from trueup.inference.server.settings import Settings  # noqa: E402

KEY = "k" * 40
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(served):
    with serving(Settings(port=0, key=KEY), served=served) as (url, _):
        yield url.removesuffix("/v1")


@pytest.fixture(scope="module")
def root(url):
    return url.removesuffix("/v1")


def raw(root: str, text: str) -> str:
    host, port = root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(text.encode("latin-1"))
        connection.settimeout(10)
        return connection.recv(65536).decode("latin-1")


def test_the_default_is_the_loopback_address():
    assert Settings().host == "127.0.0.1"
    option = next(one for one in main.commands["serve"].params if one.name == "host")
    assert option.default == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_beyond_it_nothing_starts_without_a_token(host):
    with pytest.raises(ConfigError, match="API_KEY"):
        Settings(host=host)
    assert KEY not in repr(Settings(host=host, key=KEY))


PATHS = [
    "//v1/models",
    "/v1/../v1/models",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/metrics",
    "/",
    "/nowhere",
    "/%2fv1/models",
]


def test_every_path_and_method_needs_the_token(locked):
    routes = [route.path for route in make_routes(State(Settings())).routes]
    assert "/v1/chat/completions" in routes and "/health" in routes
    for path in [*routes, *PATHS]:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"):
            found = httpx.request(method, locked + path)
            assert found.status_code == 401, (method, path)
            assert found.headers["x-request-id"]
    absolute = raw(locked, f"GET {locked}/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert absolute.startswith("HTTP/1.1 401")


@pytest.mark.parametrize(
    "header", ["", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", "Bearer \xe4"]
)
def test_only_the_token_lets_in(locked, header):
    found = httpx.get(f"{locked}/v1/models", headers={"authorization": header.encode("latin-1")})
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key" and KEY not in found.text
    assert httpx.get(f"{locked}/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1:80", "", "127.0.0.1.nip.io", "a@localhost"]
)
def test_a_rebound_name_is_not_answered(root, method, host):
    assert raw(root, f"{method} /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith("HTTP/1.1 403")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_its_own_names_are(root, host):
    assert raw(root, f"GET /version HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith("HTTP/1.1 200")


def test_names_are_as_the_operator_says():
    proxied = Settings(hosts=["llm.example.org"])
    assert proxied.answers_to("llm.example.org:443") and not proxied.answers_to("example.org")
    wide = Settings(host="0.0.0.0", key=KEY)
    assert wide.answers_to("192.168.1.7:8000") and not wide.answers_to("evil.example")


def test_pages_of_other_sites_get_nothing(root):
    found = httpx.post(f"{root}/v1/chat/completions", json=CHAT, headers={"origin": "https://evil.example"})
    assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
    plain = httpx.post(f"{root}/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert plain.status_code == 415


@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_there_are_no_websockets_and_no_answers_to_preflights(root, host):
    more = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YWJj\r\n"
    said = raw(root, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n{more}\r\n")
    assert not said.startswith("HTTP/1.1 101") and (host == "localhost" or said.startswith("HTTP/1.1 403"))
    origin = "Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n"
    said = raw(root, f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n{origin}\r\n")
    assert said.startswith("HTTP/1.1 403") and "access-control-allow" not in said.lower()


def test_a_key_file_that_others_may_read_is_said(tmp_path, caplog):
    file = tmp_path / "key"
    file.write_text(KEY, encoding="utf-8")
    file.chmod(0o644)
    assert read_key(file) == KEY and "chmod 600" in caplog.text and KEY not in caplog.text
    caplog.clear()
    file.chmod(0o600)
    assert read_key(file) == KEY and not caplog.text


def test_sizes_are_bounded(root):
    chat = f"{root}/v1/chat/completions"
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * (2 * 2**20)}]}
    assert httpx.post(chat, json=large).status_code == 413

    def pieces():
        for _ in range(40):
            yield b"x" * 65536

    try:
        found = httpx.post(chat, content=pieces(), headers={"content-type": "application/json"})
        assert found.status_code == 413
    except httpx.TransportError:
        pass  # the server had answered and closed before all was sent
    headers = "".join(f"x-{n}: {'y' * 1000}\r\n" for n in range(20))
    found = raw(root, f"GET /version HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n")
    assert found.startswith(("HTTP/1.1 431", "HTTP/1.1 400"))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404),
     ("GET", "/docs", 404), ("GET", "/openapi.json", 404)],
)  # fmt: skip
def test_the_frameworks_errors_have_openais_shape(root, method, path, status):
    found = httpx.request(method, root + path, json={} if method == "POST" else None)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


BODIES = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"model": "\\ud800"}',
    b'{"model": 1, "messages": 2}', json.dumps({**CHAT, "messages": [[]]}).encode(),
    json.dumps({**CHAT, "messages": [{"role": "user", "content": "\udc00"}]}).encode(),
    json.dumps({**CHAT, "messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}).encode(),
    json.dumps({**CHAT, "messages": [{"role": "tool", "content": {"a": 1}}]}).encode(),
    json.dumps({**CHAT, "temperature": float("nan")}).encode(), json.dumps({**CHAT, "seed": 10**40}).encode(),
    json.dumps({**CHAT, "logit_bias": {"999999": 1}}).encode(), json.dumps({**CHAT, "logit_bias": {"x": 1}}).encode(),
    json.dumps({**CHAT, "max_tokens": -1}).encode(), json.dumps({**CHAT, "stop": [1]}).encode(),
    json.dumps({**CHAT, "stop": ""}).encode(), json.dumps({**CHAT, "tools": [{"function": {"name": {}}}]}).encode(),
    json.dumps({**CHAT, "n": "many"}).encode(), json.dumps({**CHAT, "stream_options": 1}).encode(),
    json.dumps({"model": MODEL, "prompt": [[1], ["x"]]}).encode(), json.dumps({"model": MODEL, "prompt": []}).encode(),
    json.dumps({"model": MODEL, "prompt": [[-1, 10**30]]}).encode(),
    json.dumps({"model": MODEL, "prompt": {}}).encode(),
    json.dumps({"tokens": [10**9]}).encode(), json.dumps({"tokens": [-1]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/score", "/tokenize", "/detokenize"])
def test_strange_bodies_are_the_callers_fault_and_harm_nobody(root, path):
    for body in BODIES:
        found = httpx.post(root + path, content=body, headers={"content-type": "application/json"}, timeout=60)
        if found.status_code == 200:  # a field that this route does not read
            assert path == "/tokenize" and b"messages" in body
            continue
        assert 400 <= found.status_code < 500, (body[:80], found.text)
        assert found.json()["error"]["type"] == "invalid_request_error"
        assert "/src/" not in found.text and "Traceback" not in found.text
    assert httpx.post(f"{root}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200


def test_a_path_is_no_id(served, tmp_path):
    from trueup.inference.server.served import short_name

    (tmp_path / "dpo" / "checkpoint-3").mkdir(parents=True)
    assert short_name(str(tmp_path / "dpo")) == "dpo"
    assert short_name(str(tmp_path / "dpo" / "checkpoint-3")) == "dpo-checkpoint-3"
    assert short_name("org/model") == "org/model" and short_name("/gone/model") == "model"
    assert not any("/" in name for name in served.ids)


def test_a_port_in_use_is_said(root):
    with pytest.raises(ResourceError, match="--port"):
        listen(Settings(port=int(root.rpartition(":")[2])))
