"""Replies that have to be something: JSON by a schema, a call of a tool; and what cannot be kept to."""

from __future__ import annotations

import json

import pytest

from tests.inference.server.conftest import MODEL, load, serving
from trueup.inference.server.settings import Settings
from trueup.rollout import grammar
from trueup.rollout.engines import Sampling
from trueup.rollout.grammar import Form, NoGrammar, json_grammar

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


@pytest.fixture(scope="module")
def client():
    served = load(Settings(port=0), "template=qwen")
    with serving(Settings(port=0), served=served) as (url, _):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client
        served.close()


def ask(client, **more):
    words = {"model": MODEL, "messages": ASK, "temperature": 1.0, "max_tokens": 600, **more}
    return client.chat.completions.create(**words)


def described(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


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


def test_json_or_a_call_where_both_may_be(client):
    said = ask(client, tools=TOOLS, response_format=described(PERSON), seed=5).choices[0].message
    assert said.tool_calls or jsonschema.validate(json.loads(said.content), PERSON) is None


def test_langchain_gets_its_structure(client):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(base_url=str(client.base_url), api_key="none", model=MODEL, max_tokens=600, seed=2)
    schema = {"title": "person", "description": "x", **PERSON}
    for method in ("json_schema", "function_calling"):
        jsonschema.validate(model.with_structured_output(schema, method=method).invoke("Who?"), PERSON)


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"$ref": "#/nowhere"}, {"$ref": "https://example.com/x.json"}])
def test_a_schema_that_cannot_be_kept_to_is_refused(client, schema):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=described(schema))
    assert caught.value.param == "response_format"


def test_without_the_library_it_is_said(served, monkeypatch):
    monkeypatch.setattr(grammar, "available", lambda: False)
    with pytest.raises(NoGrammar, match="trueup\\[serve\\]"):
        served.engine.submit([5], Sampling(grammar=json_grammar([Form({"type": "null"}, "never compiled before ")])))
