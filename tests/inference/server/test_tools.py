"""Tools from the request into the prompt, calls from the answer into the reply; and what fails in the middle."""

from __future__ import annotations

import json

import pytest

from tests.inference.server.conftest import MODEL, load, serving
from tests.inference.server.scripted import Scripted
from trueup.inference.server.settings import Settings

openai = pytest.importorskip("openai")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
ASK = [{"role": "user", "content": "Weather in Köln and Oslo?"}]
CALLS = "".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>\n'
    for city in ("Köln", "Oslo")
)


@pytest.fixture(scope="module")
def scripted():
    served = load(Settings(port=0), "template=qwen")
    served.engine.close()
    served.engine = Scripted()
    with serving(Settings(port=0), served=served) as (url, _):
        yield url, served
        served.close()


@pytest.fixture
def client(scripted):
    with openai.OpenAI(base_url=scripted[0], api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def engine(scripted) -> Scripted:
    scripted[1].engine.__init__()
    return scripted[1].engine


def ask(client, messages=ASK, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], **more)


def prompt(scripted) -> str:
    return scripted[1].tokenizer.decode(scripted[1].engine.prompts[-1])


def test_tools_are_in_the_prompt_and_calls_in_the_reply(client, engine, scripted):
    engine.text = "Let me look.\n" + CALLS
    choice = ask(client).choices[0]
    assert "weather" in prompt(scripted) and "Tells the weather." in prompt(scripted)
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    cities = [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls]
    assert cities == ["Köln", "Oslo"] and len({call.id for call in choice.message.tool_calls}) == 2
    engine.text = CALLS
    assert ask(client).choices[0].message.content is None
    assert len(ask(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_streamed_calls_are_the_same(client, engine, size):
    engine.text, engine.size = "Let me look.\n" + CALLS, size
    text, calls, reasons = "", {}, []
    for chunk in ask(client, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or ():
            calls.setdefault(call.index, ["", ""])
            calls[call.index][0] += call.function.name or ""
            calls[call.index][1] += call.function.arguments or ""
    assert text == "Let me look." and reasons == ["tool_calls"]
    assert [(name, json.loads(arguments)["city"]) for name, arguments in calls.values()] == [
        ("weather", "Köln"), ("weather", "Oslo"),
    ]  # fmt: skip


def test_results_of_tools_go_back_to_the_model(client, engine, scripted):
    engine.text = CALLS
    said = ask(client).choices[0].message
    engine.text = "Rain in both."
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"rain {i}"} for i, call in enumerate(said.tool_calls)
    ]
    done = ask(client, [*ASK, said.model_dump(exclude_none=True), *results]).choices[0]
    assert done.message.content == "Rain in both." and done.finish_reason == "stop" and not done.message.tool_calls
    assert "rain 0" in prompt(scripted) and "rain 1" in prompt(scripted) and '"Köln"' in prompt(scripted)


def test_without_tools_a_call_is_text(client, engine):
    engine.text = CALLS
    plain = client.chat.completions.create(model=MODEL, messages=ASK).choices[0]
    assert plain.message.content == CALLS and plain.finish_reason == "stop"
    assert ask(client, tool_choice="none").choices[0].message.content == CALLS


def test_langchain_binds_tools(scripted, engine):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    engine.text = CALLS
    model = chat_openai(base_url=scripted[0], api_key="none", model=MODEL).bind_tools([WEATHER])
    assert [call["args"]["city"] for call in model.invoke("Weather?").tool_calls] == ["Köln", "Oslo"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(client, engine, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, "tools": [WEATHER], **more})
    assert caught.value.param == param and not engine.prompts


def test_what_fails_in_the_middle_of_a_stream_is_one_event_and_the_last(client, engine, caplog):
    engine.text, engine.error = "some words", RuntimeError("out of memory at /secret/place")
    with pytest.raises(openai.APIError) as caught:
        for _ in ask(client, stream=True):
            pass
    assert caught.value.code == "internal_error" and "secret" not in str(caught.value)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert "secret" not in str(caught.value)
