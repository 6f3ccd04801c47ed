"""Who may ask: J9, and S15 to S19 and S26 of the threat model, over real sockets."""

from __future__ import annotations

import httpx
import pytest

KEY = "a-token-of-some-length-1234567890"
PATHS = [
    "/",
    "/train",
    "/static/studio.css",
    "/_nicegui_ws/socket.io/?EIO=4&transport=polling",
    "//train",
    "/docs",
    "/x",
]


@pytest.fixture(scope="module")
def closed(make_studio, tmp_path_factory):
    return make_studio(tmp_path_factory.mktemp("closed"), API_KEY=KEY)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", PATHS)
def test_other_hosts_and_origins_are_refused(studio, method: str, path: str):
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "http://localhost:1"}):
        assert httpx.request(method, studio.url + path, headers=headers).status_code == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_handed_out(closed, method: str, path: str):
    origin = {"origin": closed.url}
    assert httpx.request(method, closed.url + path, headers=origin).status_code == 401
    wrong = {**origin, "authorization": "Bearer nearly"}
    assert httpx.request(method, closed.url + path, headers=wrong).status_code == 401


@pytest.mark.parametrize("origin", [None, "http://evil.example"])
def test_a_websocket_of_another_page_is_refused(studio, origin):
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
               "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    headers |= {"origin": origin} if origin else {}
    assert (
        httpx.get(f"{studio.url}/_nicegui_ws/socket.io/?EIO=4&transport=websocket", headers=headers).status_code == 403
    )


def test_the_token_is_typed_once_and_guesses_are_slowed_down(closed):
    origin = {"origin": closed.url}
    with httpx.Client(base_url=closed.url, headers=origin) as client:
        assert client.get("/", headers={"accept": "text/html"}).headers["location"] == "/login"
        assert client.post("/login", data={"token": KEY}).status_code == 303
        assert client.get("/train").status_code == 200
        assert KEY not in str(client.cookies)
    codes = [httpx.post(closed.url + "/login", data={"token": "guess"}, headers=origin).status_code for _ in range(7)]
    assert codes[:5] == [403] * 5 and codes[-1] == 429


def test_every_answer_has_its_headers(studio):
    headers = httpx.get(studio.url).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
