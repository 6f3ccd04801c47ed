"""Chat completions as OpenAI's own client and LangChain's see them (A1–A4, A6)."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.inference.server.conftest import MODEL
from trueup.builtin import builtin_path

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "How many customers are there?"}]
OTHERS = ["List all orders.", "Which products cost more than 20?", "客户有多少？", "Show names of all customers."]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, messages=ASK, **more):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24, **more}
    return client.chat.completions.create(messages=messages, **options)


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "trueup"


def test_a_chat_is_what_the_engine_says(client, served):
    done = ask(client)
    prompt = served.template.encode_prompt(served_messages())
    from trueup.rollout.engines import Sampling

    alone = served.engine.submit(prompt, Sampling(max_new_tokens=24)).result(60)
    choice = done.choices[0]
    assert choice.message.content == alone.text and choice.message.role == "assistant"
    assert choice.message.refusal is None and choice.message.tool_calls is None
    assert choice.finish_reason == alone.finish_reason
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == len(alone.ids)
    assert done.usage.total_tokens == len(prompt) + len(alone.ids)
    assert done.object == "chat.completion" and done.model == MODEL and done.system_fingerprint


def served_messages():
    from trueup.data.examples import Message

    return [Message("user", ASK[0]["content"])]


def test_a_stream_says_the_same_in_order(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason and not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_same_seed_draws_the_same_in_one_piece_and_in_many(client):
    hot = {"temperature": 1.0, "seed": 7}
    whole = ask(client, **hot).choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in ask(client, stream=True, **hot)) == whole
    assert ask(client, **hot).choices[0].message.content == whole


def test_several_choices_whole_and_interleaved(client):
    three = ask(client, n=3, temperature=1.0, seed=3, max_tokens=8).choices
    assert [choice.index for choice in three] == [0, 1, 2]
    texts = ["", ""]
    for chunk in ask(client, n=2, temperature=1.0, seed=3, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in three[:2]]


def test_stop_texts_end_an_answer_wherever_tokens_begin(client):
    whole = ask(client).choices[0].message.content
    stop = whole[5:9]
    cut = ask(client, stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    stream = "".join(c.choices[0].delta.content or "" for c in ask(client, stop=[stop, "zzz"], stream=True))
    assert stream == cut.message.content


def test_the_limit_of_length_is_named(client):
    for limit in ({"max_tokens": 2}, {"max_tokens": None, "max_completion_tokens": 2}):
        choice = ask(client, **limit).choices[0]
        assert choice.finish_reason == "length"
    *_, last = ask(client, max_tokens=2, stream=True)
    assert last.choices[0].finish_reason == "length"


def test_characters_of_several_tokens_come_whole(client, served):
    """A bias towards the bytes of an emoji and of a Chinese character; what is no character is so in both."""
    ids = served.tokenizer("🙂好", add_special_tokens=False)["input_ids"]
    drawn = {"temperature": 1.0, "seed": 1, "logit_bias": {str(token): 30 for token in ids}, "max_tokens": 40}
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **drawn)]
    assert "".join(pieces) == ask(client, **drawn).choices[0].message.content
    assert len(pieces) > 3


def test_log_probabilities_are_those_of_a_forward_pass(client, served):
    choice = ask(client, logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    prompt = served.template.encode_prompt(served_messages())
    content = choice.logprobs.content
    assert "".join(one.token for one in content) == choice.message.content
    assert bytes(byte for one in content for byte in one.bytes).decode() == choice.message.content
    ids = [served.tokenizer.convert_tokens_to_ids(served.tokenizer.tokenize(one.token))[0] for one in content]
    plain = AutoModelForCausalLM.from_pretrained(builtin_path(MODEL), dtype=served.main.policy.dtype)
    with torch.no_grad():
        logits = plain(torch.tensor([[*prompt, *ids]])).logits[0].float()
    logps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    expected = sum(float(row[token]) for row, token in zip(logps, ids, strict=True))
    assert sum(one.logprob for one in content) == pytest.approx(expected, abs=1e-4)
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob for one in content)
    streamed = [
        one for c in ask(client, logprobs=True, top_logprobs=3, max_tokens=8, stream=True)
        for one in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])
    ]  # fmt: skip
    assert [one.token for one in streamed] == [one.token for one in content]


def test_roles_and_parts_of_today(client):
    talk = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "How many "}, {"type": "text", "text": "orders?"}]},
    ]
    old = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "How many orders?"}]
    assert ask(client, talk).choices[0].message.content == ask(client, old).choices[0].message.content


def test_what_clients_send_beside_is_ignored(client):
    extra = {"metadata": {"a": "b"}, "store": False, "user": "u", "service_tier": "auto"}
    more = {"extra_body": {"something": 1, "logit_bias": None, "modalities": ["text"]}}
    assert ask(client, **extra, **more).choices[0].message.content == ask(client).choices[0].message.content


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"extra_body": {"guided_json": {"type": "object"}}}, "guided_json"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"n": 17}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": ASK * 513}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "messages[0].content[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused_before_headers(client, more, param, stream):
    if stream and param == "stream_options":
        return
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"stream": stream, **more})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error" and caught.value.request_id


def test_other_errors_have_their_types(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [{"role": "user", "content": "words " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


def free_again(served, seconds=1.0):
    until = time.monotonic() + seconds
    while served.engine.stats.active + served.engine.stats.queued and time.monotonic() < until:
        time.sleep(0.01)
    return served.engine.stats.active + served.engine.stats.queued == 0


def test_a_closed_stream_frees_its_slot_within_a_second(client, served):
    for _ in range(5):
        stream = ask(client, stream=True, temperature=2.0, max_tokens=1500, logit_bias={}, extra_body={"min_p": 0})
        for _, _ in zip(range(2), stream, strict=False):
            pass
        stream.close()
        assert free_again(served)


def test_a_client_that_gives_up_waiting_frees_its_slot(url, served):
    impatient = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=0.3)
    bias = {str(stop): -100 for stop in served.engine.stop_ids}
    with pytest.raises(openai.APITimeoutError):
        ask(impatient, n=4, temperature=1.0, max_tokens=1500, logit_bias=bias)
    assert free_again(served)


def test_eight_clients_get_what_each_gets_alone(client):
    talks = [[{"role": "user", "content": text}] for text in OTHERS * 2]
    alone = [ask(client, talk).choices[0].message.content for talk in talks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda talk: ask(client, talk).choices[0].message.content, talks))
    assert together == alone


def test_the_asynchronous_client_as_well(url, client):
    async def talk():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as other:
            stream = await other.chat.completions.create(
                model=MODEL, messages=ASK, temperature=0, max_tokens=24, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(talk()) == ask(client).choices[0].message.content


def test_langchain_invokes_streams_and_batches(url, client):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(base_url=url, api_key="none", model=MODEL, temperature=0, max_tokens=24, stream_usage=True)
    expected = ask(client).choices[0].message.content
    text = ASK[0]["content"]
    said = model.invoke(text)
    assert said.content == expected and said.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream(text))
    assert "".join(chunk.content for chunk in chunks) == expected
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) > 0
    assert [one.content for one in model.batch([text, text])] == [expected] * 2
