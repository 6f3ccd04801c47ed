"""Replies that have to be something: JSON by a schema, a call of a tool; and what cannot be kept to."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.inference.server.conftest import MODEL, load, serving
from trueup.inference.server.asking import AskChat
from trueup.inference.server.settings import Settings
from trueup.inference.server.structure import structure_of

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
openai = pytest.importorskip("openai")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Köln", "Oslo"]},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "maxItems": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "pets", "age"], "additionalProperties": False,
    "$defs": {"Pet": {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"],
                      "additionalProperties": False}},
}  # fmt: skip
ASK = [{"role": "user", "content": "Show all students."}]
TOOLS = [
    {"type": "function", "function": {"name": "person", "parameters": PERSON}},
    {"type": "function", "function": {"name": 'say "now"', "parameters": {
        "type": "object", "properties": {"loud": {"type": "boolean"}}, "required": ["loud"],
        "additionalProperties": False,
    }}},
]  # fmt: skip


def described(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def own():
    """(URL, what is served): calls in tags, as Qwen's template has them."""
    served = load(Settings(port=0), "template=qwen")
    with serving(Settings(port=0), served=served) as (url, _):
        yield url, served
        served.close()


@pytest.fixture
def client(own):
    with openai.OpenAI(base_url=own[0], api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, **more):
    words = {"model": MODEL, "messages": ASK, "temperature": 1.0, "max_tokens": 600, **more}
    return client.chat.completions.create(**words)


@pytest.mark.parametrize("seed", range(4))
def test_json_is_what_its_schema_says(client, seed):
    choice = ask(client, response_format=described(PERSON), seed=seed, presence_penalty=1.0).choices[0]
    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    jsonschema.validate(found, PERSON)
    assert list(found) == ["name", "pets", "age"]


def test_any_object_begins_as_one_and_rows_beside_it_are_free(client):
    plain = ask(client, temperature=0, max_tokens=40).choices[0].message.content
    bound = ask(client, response_format={"type": "json_object"}, max_tokens=40, n=2)
    assert all(choice.message.content.lstrip().startswith("{") for choice in bound.choices)
    assert ask(client, temperature=0, max_tokens=40).choices[0].message.content == plain


def test_a_stream_is_bound_too(client):
    chunks = ask(client, response_format=described(PERSON), seed=1, stream=True)
    jsonschema.validate(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), PERSON)


@pytest.mark.parametrize(
    "choice", ["required", *({"type": "function", "function": {"name": t["function"]["name"]}} for t in TOOLS)]
)
def test_a_call_that_is_asked_for_is_made(client, choice):
    said = ask(client, tools=TOOLS, tool_choice=choice, seed=3).choices[0]
    assert said.finish_reason == "tool_calls" and said.message.content is None
    (call,) = said.message.tool_calls
    wanted = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    if choice != "required":
        assert call.function.name == choice["function"]["name"]
    jsonschema.validate(json.loads(call.function.arguments), wanted[call.function.name])


@pytest.mark.parametrize("family", ["tagged", "bare"])
@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({"response_format": described({"const": 7}), "tool_choice": "none"}, {"json"}),
        ({"tool_choice": "required"}, {"first", "second"}),
        ({"tool_choice": {"type": "function", "function": TOOLS[1]["function"]}}, {"second"}),
        ({"response_format": described({"const": 7}), "tool_choice": "auto"}, {"json", "first", "second"}),
        ({"response_format": described({"type": ["integer", "array"]}), "tool_choice": "none"}, {"json", "list"}),
    ],
)
def test_a_reply_is_one_of_the_forms_asked_for(own, family, more, texts):
    """Walked token by token, whatever a model would say."""
    before, named, after = (
        ("<tool_call>\n", "arguments", "\n</tool_call>") if family == "tagged" else ("", "parameters", "")
    )
    loud = f'{before}{{"name": "say \\"now\\"", "{named}": {{"loud": true}}}}{after}'
    person = f'{before}{{"name": "person", "{named}": {{"name": "Oslo", "pets": [], "age": 7}}}}{after}'
    written = {"json": "7", "list": '[{"a": null}]', "first": person, "second": loud, "neither": "SELECT 7"}
    asked = AskChat(model=MODEL, messages=ASK, tools=TOOLS, **more)
    text, _ = structure_of(asked, [] if asked.tool_choice == "none" else TOOLS, family)
    compiled = own[1].engine.compile(text)
    assert {name for name, reply in written.items() if takes(compiled, own[1], reply)} == texts


def test_a_schema_without_words_is_any_json(own):
    asked = AskChat(model=MODEL, messages=ASK, response_format=described({}))
    compiled = own[1].engine.compile(structure_of(asked, [], None)[0])
    assert takes(compiled, own[1], "[1, {}]") and takes(compiled, own[1], '"x"') and not takes(compiled, own[1], "x")


def takes(compiled, served, reply: str) -> bool:
    """Whether a reply's tokens and an end behind them may come."""
    guide = compiled.guide()
    for token in [*served.tokenizer(reply, add_special_tokens=False)["input_ids"], served.engine.stop_ids[0]]:
        if guide.allow(torch.zeros(len(served.tokenizer)))[token] < 0:
            return False
        guide.said(token)
    return True


def test_a_call_that_is_cut_off_is_no_text(client):
    for stream in (False, True):
        said = ask(client, tools=TOOLS, tool_choice="required", max_tokens=12, stream=stream)
        choices = [chunk.choices[0] for chunk in said] if stream else [said.choices[0]]
        assert choices[-1].finish_reason == "length"
        assert not any((c.delta if stream else c.message).content for c in choices)


def test_who_waits_for_a_grammar_holds_up_nobody(own, client, monkeypatch):
    compiling, go_on = threading.Event(), threading.Event()
    compile_it = own[1].engine.compile

    def slowly(text):
        compiling.set()
        assert go_on.wait(60)
        return compile_it(text)

    monkeypatch.setattr(own[1].engine, "compile", slowly)
    with ThreadPoolExecutor(1) as other:
        bound = other.submit(ask, client, response_format=described({"const": 7}))
        assert compiling.wait(60)
        assert ask(client, max_tokens=3).usage.completion_tokens
        assert not bound.done()
        go_on.set()
        assert bound.result(60).choices[0].message.content == "7"


def test_log_probabilities_are_the_models_own(client):
    free = ask(client, max_tokens=1, logprobs=True, top_logprobs=20).choices[0].logprobs.content[0]
    bound = ask(client, max_tokens=1, logprobs=True, top_logprobs=20, response_format=described({"const": 7})).choices
    assert [top.token for top in bound[0].logprobs.content[0].top_logprobs] == [t.token for t in free.top_logprobs]


def test_langchain_gets_its_structure(client):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(base_url=str(client.base_url), api_key="none", model=MODEL, max_tokens=600, seed=2)
    schema = {"title": "person", "description": "x", **PERSON}
    for method in ("json_schema", "function_calling"):
        jsonschema.validate(model.with_structured_output(schema, method=method).invoke("Who?"), PERSON)


WIDE = {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(900)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"}, {"$ref": "#/nowhere"}, {"$ref": "https://example.com/x.json"}, {"$ref": "#"},
        WIDE, {**WIDE, "description": "x" * 100_000},
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_kept_to_is_refused(client, schema):
    """At once, or where its parser gives up: never an answer that only looks whole."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=described(schema), max_tokens=40)
    assert "assertion" not in str(caught.value)


def test_a_completion_has_no_response_format(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", extra_body={"response_format": {"type": "json_object"}})
    assert caught.value.param == "response_format"


def test_without_the_library_it_is_said(client, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(openai.BadRequestError, match="trueup\\[serve\\]"):
        ask(client, response_format=described({"const": "never compiled before"}))
