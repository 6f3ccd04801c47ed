"""What goes over the wire, to the letter, as curl shows it; completions in pieces, several at a time (A1, A2, A6)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.inference.server.conftest import MODEL, load, serving
from tests.inference.server.scripted import Scripted
from trueup.inference.server.settings import Settings

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

KEY = "k" * 40
HEAD = (
    '"id":"chatcmpl-ID","object":"chat.completion.chunk","created":TIME,"model":"builtin:sql-tiny",'
    '"system_fingerprint":"fp_ID"'
)


def chunk(delta: str, reason: str = "null") -> str:
    choice = f'{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{reason}}}'
    return f'data: {{{HEAD},"choices":[{choice}],"usage":null}}\n\n'


GOLDEN = "".join(
    [
        "HTTP/1.1 200 OK\ncache-control: no-cache\ncontent-type: text/event-stream; charset=utf-8\n",
        "x-request-id: mine-1\n\n",
        chunk('"role":"assistant","content":"","refusal":null'),
        chunk('"content":"好 🙂"'),
        chunk('"content":" no"'),
        chunk("", '"stop"'),
        f'data: {{{HEAD},"choices":[],"usage":{{"prompt_tokens":N,"completion_tokens":2,"total_tokens":N}}}}\n\n',
        "data: [DONE]\n\n",
    ]
)


@pytest.fixture(scope="module")
def locked():
    served = load(Settings(port=0, key=KEY))
    served.engine.close()
    served.engine = Scripted("好 🙂 no")
    with serving(served.settings, served=served) as (url, _):
        yield url
        served.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_stream_as_curl_shows_it(locked):
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = ["content-type: application/json", f"authorization: Bearer {KEY}", "x-request-id: mine-1"]
    words = ["curl", "-sNi", f"{locked}/chat/completions", "-d", json.dumps(body)]
    found = subprocess.run(
        [*words, *(word for header in headers for word in ("-H", header))], capture_output=True, check=True
    )
    text = found.stdout.decode().replace("\r\n", "\n")
    for pattern, name in (
        (r"(chatcmpl-|fp_)[0-9a-f]+", r"\1ID"), (r'"created":\d+', '"created":TIME'),
        (r'"(prompt_tokens|total_tokens)":\d+', r'"\1":N'),
        (r"(?i:date|connection|transfer-encoding|x-content-type-options): .*\n", ""),
    ):  # fmt: skip
        text = re.sub(pattern, name, text)
    assert text == GOLDEN


def test_openais_client_is_told_by_its_own_errors(locked):
    stranger = openai.OpenAI(base_url=locked, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key" and caught.value.request_id and KEY not in str(caught.value)
    assert openai.OpenAI(base_url=locked, api_key=KEY).models.list().data


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client, **more):
    asked = {"model": MODEL, "prompt": ["select name", "How many"], "n": 2, "temperature": 1.0, "seed": 5}
    return client.completions.create(**{**asked, "max_tokens": 8, **more})


def test_completions_of_several_texts_come_in_order_and_in_pieces(client):
    whole = complete(client)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts, reasons = [""] * 4, [None] * 4
    *chunks, usage = complete(client, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.usage == whole.usage


def test_a_completions_echo_comes_first(client, served):
    whole = complete(client, echo=True, n=1)
    assert [choice.text[:11] for choice in whole.choices][0] == "select name"
    texts = ["", ""]
    for chunk in complete(client, echo=True, n=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    ids = served.tokenizer("select name")["input_ids"]
    only = client.completions.create(model=MODEL, prompt=ids, echo=True, max_tokens=0, logprobs=0).choices[0]
    assert only.text == "select name" and len(only.logprobs.tokens) == len(ids)


def test_log_probabilities_of_completions_are_where_their_text_is(client):
    whole = complete(client, logprobs=2, n=1, prompt="select name").choices[0]
    found = whole.logprobs
    assert "".join(found.tokens).startswith(whole.text) or "bytes:" in "".join(found.tokens)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert all(logp <= 0 for logp in found.token_logprobs) and all(len(top) >= 2 for top in found.top_logprobs)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "x"}, "suffix"), ({"best_of": 4}, "best_of"), ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"), ({"logprobs": 21}, "logprobs"),
        ({"stream": True, "echo": True, "logprobs": 1}, "stream"),
    ],
)  # fmt: skip
def test_what_completions_cannot_do_is_named(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **more)
    assert caught.value.param == param
