"""Completions as lm-eval's local-completions asks for them, tokens, calls of tools, the way to vLLM."""

from __future__ import annotations

import pytest

from tests.inference.server.conftest import MODEL
from trueup.config.load import load_config
from trueup.inference.server.settings import Settings
from trueup.inference.server.tool_calls import CallReader
from trueup.inference.server.vllm_server import command, environment

httpx = pytest.importorskip("httpx")


def post(url, path, **body):
    found = httpx.post(url + path, json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def test_likelihoods_as_lm_eval_reads_them(url, served):
    rows = [served.tokenizer(text)["input_ids"] for text in ("select name from users;", "How many?")]
    body = {"prompt": rows, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    found = post(url, "/completions", model=MODEL, **body)
    for choice, ids, scored in zip(found["choices"], rows, served.engine.score(rows, top=1), strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:-1] == pytest.approx([one.logp for one in scored.tokens], abs=1e-4)
        for one, logp, top in zip(
            scored.tokens, logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=False
        ):
            assert (logp == max(top.values())) == (one.id == one.top[0][0])


def test_tokens_there_and_back(url, served):
    root = url.removesuffix("/v1")
    tokens = post(root, "/tokenize", prompt="select 好;")["tokens"]
    assert post(root, "/detokenize", tokens=tokens)["prompt"] == "select 好;"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text_however_they_come(size):
    text = 'Let me look. \n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    reader = CallReader("tagged")
    said = "".join(reader.push(text[at : at + size]) for at in range(0, len(text), size))
    spoken = reader.finish()
    assert said == "Let me look." and spoken.content is None
    assert spoken.calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    broken = CallReader("tagged")
    assert broken.push("<tool_call>{") == "" and broken.finish().content == "<tool_call>{"


def test_vllm_gets_our_model_and_no_secret_in_its_words(tmp_path):
    cfg = load_config(None, [f"model_name_or_path={MODEL}", "vllm_maxlen=512"], verb="infer")
    settings = Settings(key="k" * 40, name="mine", adapters={"dpo": str(tmp_path)})
    words = command(cfg, settings)
    assert words[0] == "serve" and words[words.index("--served-model-name") + 1] == "mine"
    assert f"dpo={tmp_path}" in words and "k" * 40 not in " ".join(words)
    assert environment(cfg, settings)["VLLM_API_KEY"] == "k" * 40
