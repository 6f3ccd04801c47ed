"""Chat and arena in a browser: a scripted model behind a URL (J5, J8), and real ones side by side with a vote."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlencode

import psutil
import pytest

pytest.importorskip("nicegui")

from playwright.sync_api import Page, expect  # noqa: E402

from tests.web.conftest import Studio  # noqa: E402
from trueup.errors import ConfigError  # noqa: E402
from trueup.web.labels import Project  # noqa: E402
from trueup.web.speakers import endpoint  # noqa: E402
from trueup.web.talks import Answer, Talk, Turn, segments  # noqa: E402
from trueup.web.turn_view import heat_class, whole_letters  # noqa: E402

EVIL = "<img src=x onerror=\"document.title='pwned'\"> **bold** [x](javascript:alert(1)) <script>alert(1)</script>"
QUESTION = "How many customers are there?"


class Script(BaseHTTPRequestHandler):
    """OpenAI's protocol, by rote: the question "for ever" is answered until nobody listens."""

    asked: list[dict] = []
    left = threading.Event()

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Script.asked.append(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            self._say(body["messages"][-1]["content"] == "for ever")
        except OSError:
            Script.left.set()

    def _say(self, endless: bool) -> None:
        pieces = ["again and again "] * 100_000 if endless else [EVIL, "\n```sql\nSELECT 1;\n```"]
        for text in pieces:
            self._send({"delta": {"content": text}, "finish_reason": None})
            time.sleep(0.02)
        self._send({"delta": {}, "finish_reason": "stop"})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, choice: dict) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture(scope="module")
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#scripted"
    server.shutdown()


def ask(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Ask something").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def test_an_answer_streams_and_is_stopped(studio, page, scripted):
    """J5."""
    page.goto(f"{studio.url}/chat?{urlencode({'endpoints': scripted, 'temperature': '0.1', 'seed': '5'})}")
    ask(page, "for ever")
    answer = page.get_by_role("article", name="scripted")
    expect(answer).to_contain_text("again and again again")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(answer).to_contain_text("stopped")
    assert Script.left.wait(30)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile("talk="))
    assert Script.asked[-1]["temperature"] == 0.1 and Script.asked[-1]["seed"] == 5
    page.reload()  # it was kept
    expect(page.get_by_role("article", name="scripted")).to_contain_text("again and again")


def test_what_a_model_writes_is_text(studio, page, scripted):
    """J8."""
    page.goto(f"{studio.url}/chat?{urlencode({'endpoints': scripted})}")
    ask(page, EVIL)
    answer = page.get_by_role("article", name="scripted")
    expect(answer.locator(".code-words")).to_have_text("SELECT 1;")
    expect(answer).to_contain_text(EVIL)
    expect(page.locator(".question")).to_contain_text(EVIL)
    assert answer.locator("img, script, strong, a").count() == 0
    expect(page).to_have_title("Chat & arena · trueup")
    ask(page, "and now?")
    expect(page.get_by_role("article", name="scripted")).to_have_count(2)
    expect(page.get_by_role("button", name="Once more")).to_have_count(1)
    assert [turn["role"] for turn in Script.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_who_does_not_answer_is_said_so(studio, make_page):
    page = make_page(language="zh")
    page.goto(f"{studio.url}/chat?{urlencode({'endpoints': 'http://127.0.0.1:9/v1#nobody'})}")
    page.get_by_role("textbox", name="输入问题").fill("有人吗？")
    page.get_by_role("button", name="发送", exact=True).click()
    expect(page.get_by_role("article", name="nobody").get_by_role("alert")).to_contain_text("没有回答")


def servers(studio: Studio) -> list[psutil.Process]:
    children = psutil.Process(studio.process.pid).children(recursive=True)
    return [one for one in children if one.is_running() and "serve" in one.cmdline()]


def test_base_and_adapter_answer_side_by_side_and_a_vote_is_a_label(arena, make_page, adapted):
    studio, page = arena, make_page(arena)
    page.goto(f"{studio.url}/chat?{urlencode({'run': 'tiny/dpo', 'temperature': '0', 'max_tokens': '12'})}")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_text("ready", exact=True)).to_be_visible(timeout=120_000)
    ask(page, QUESTION)
    base = page.get_by_role("article", name="sql-tiny", exact=False).first
    aligned = page.get_by_role("article", name="tiny/dpo")
    for one in (base, aligned):
        expect(one.locator(".reward-value")).to_be_visible()
    page.get_by_role("button", name="Token by token").click()
    expect(aligned.locator(".heat-token").first).to_be_visible()
    aligned.get_by_role("button", name="Better").click()
    expect(aligned.get_by_text("chosen", exact=True)).to_be_visible()
    (label,) = Project(adapted, "arena").labels.values()
    item = Project(adapted, "arena").items[label.item]
    assert item.provenance["answers"][label.choice]["model"] == "tiny/dpo"
    assert item.prompt == ({"role": "user", "content": QUESTION},)
    page.reload()
    expect(page.get_by_text("chosen", exact=True)).to_be_visible()

    (server,) = servers(studio)
    page.get_by_role("button", name="Unload").click()
    expect(page.get_by_role("button", name="Unload")).to_have_count(0)
    assert not server.is_running()


@pytest.mark.prove
def test_a_model_that_cannot_be_loaded_says_why(arena, make_page):
    page = make_page(arena)
    page.goto(arena.url + "/chat")
    model = page.get_by_role("combobox", name="Model", exact=True)
    model.fill("./models/broken")
    model.press("Enter")
    page.get_by_role("button", name="Load", exact=True).click()
    failed = page.locator(".loaded").get_by_role("alert")
    expect(failed).to_be_visible(timeout=120_000)
    expect(failed).to_contain_text("broken")


@pytest.mark.prove
def test_a_loaded_model_ends_with_the_studio(make_studio, make_page, tmp_path):
    studio = make_studio(tmp_path)
    page = make_page(studio)
    page.goto(f"{studio.url}/chat?model=builtin:sql-tiny")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_text("ready", exact=True)).to_be_visible(timeout=120_000)
    (server,) = servers(studio)
    page.close()
    studio.stop(kill=True)
    server.wait(30)


# --- without a browser ------------------------------------------------------------------------------


def turn(question: str, *said: tuple[str, str], chosen=None) -> Turn:
    return Turn(question, [Answer(voice, voice, text, "stop") for voice, text in said], chosen)


def test_every_voice_goes_on_with_its_own_answer_until_one_is_chosen():
    talk = Talk("x", "be brief", [turn("a?", ("base", "A1"), ("dpo", "A2")), turn("b?", ("base", "B"), ("dpo", "B"))])
    assert [one["content"] for one in talk.messages("dpo", 1)] == ["be brief", "a?", "A2", "b?"]
    assert talk.shared(0) and not talk.shared(1)
    talk.turns[0].chosen = 0
    assert [one["content"] for one in talk.messages("dpo", 1)] == ["be brief", "a?", "A1", "b?"]
    assert talk.shared(1)


def test_a_question_that_nobody_answered_is_left_out():
    talk = Talk("x", "", [Turn("a?", [Answer("base", "base", "", "failed", "gone")]), Turn("b?")])
    assert talk.messages("base", 1) == [{"role": "user", "content": "b?"}]


def test_code_stands_between_fences():
    assert segments("Try\n```sql\nSELECT 1;\n```\nnow") == [("text", "Try"), ("code", "SELECT 1;"), ("text", "now")]
    assert segments("```\nstill com") == [("code", "still com")]
    assert segments("") == []


def test_tokens_of_one_letter_are_taken_together():
    def token(part: bytes, own: float, trained: bool = True) -> dict:
        return {"bytes": list(part), "logprob": own, "reference_logprob": -1.0, "trained": trained}

    told = whole_letters([token("好".encode()[:2], -1.0), token("好".encode()[2:], -2.0), token(b"\n", -9.0, False)])
    assert told == [("好", -3.0, -2.0)]
    assert [heat_class(x) for x in (0.0, 0.2, -5.0)] == ["heat-0", "heat-p1", "heat-m5"]


@pytest.mark.parametrize("name", ["", "qwen", "ftp://x#y", "http://x/v1", "file:///etc/passwd#x"])
def test_endpoints_are_urls_with_a_model(name: str):
    with pytest.raises(ConfigError):
        endpoint(name)


@pytest.mark.parametrize("variable", ["API_KEY", "HOME", "AWS_SECRET_ACCESS_KEY", "A B_API_KEY"])
def test_only_keys_of_endpoints_are_sent_to_endpoints(monkeypatch, variable: str):
    monkeypatch.setenv(variable, "secret")
    with pytest.raises(ConfigError):
        endpoint("http://127.0.0.1:1/v1#m", variable)
