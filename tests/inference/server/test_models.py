"""Several models on one base: adapters by request, reward models, and what their ids tell."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.inference.server.conftest import load, serving
from trueup.builtin import builtin_path
from trueup.config.load import load_config
from trueup.errors import ConfigError, ModelError
from trueup.inference.model import Model
from trueup.inference.server.settings import Settings

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

BUILTIN = builtin_path("builtin:sql-tiny")
QUESTIONS = ["How many customers are there?", "List all orders.", "Show names of all customers."]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base in a directory of its own, two adapters that speak differently, and a reward model."""
    root = tmp_path_factory.mktemp("a-secret-place")
    shutil.copytree(BUILTIN, root / "tiny-base")
    for seed, name in enumerate(("dpo", "kto")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora)
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(root / name)
    torch.manual_seed(2)
    judge = AutoModelForSequenceClassification.from_pretrained(BUILTIN, num_labels=1, dtype=torch.float32)
    judge.save_pretrained(root / "judge")
    AutoTokenizer.from_pretrained(BUILTIN).save_pretrained(root / "judge")
    return root


@pytest.fixture(scope="module")
def several(places):
    settings = Settings(port=0, adapters={"kto": str(places / "kto")}, reward_models=[str(places / "judge")])
    words = (f"adapter_name_or_path={places / 'dpo'}",)
    served = load(settings, *words, model=str(places / "tiny-base"))
    with serving(settings, served=served) as (url, _):
        yield url
        served.close()


@pytest.fixture(scope="module")
def client(several):
    with openai.OpenAI(base_url=several, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def say(client, model: str, question: str) -> str:
    talk = [{"role": "user", "content": question}]
    done = client.chat.completions.create(model=model, messages=talk, temperature=0, max_tokens=16)
    return done.choices[0].message.content


def alone(places, adapter: str | None, question: str) -> str:
    words = [f"model_name_or_path={places / 'tiny-base'}", "bf16=false"]
    words += [f"adapter_name_or_path={places / adapter}"] if adapter else []
    model = Model(load_config(None, words, verb="infer"))
    return model.generate(question, max_new_tokens=16)


def test_aligned_models_and_their_base_are_listed_by_name(client):
    assert [model.id for model in client.models.list()] == ["dpo", "kto", "tiny-base", "judge"]
    assert client.models.retrieve("kto").id == "kto"


def test_each_id_speaks_with_its_own_adapter(client, places):
    ids = {"dpo": "dpo", "kto": "kto", "tiny-base": None}
    for model, adapter in ids.items():
        assert say(client, model, QUESTIONS[0]) == alone(places, adapter, QUESTIONS[0])
    assert len({say(client, model, QUESTIONS[0]) for model in ids}) == 3


def test_adapters_asked_at_the_same_time_do_not_mix(client):
    wanted = [(model, question) for question in QUESTIONS for model in ("dpo", "tiny-base", "kto")]
    expected = [say(client, *one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        assert list(pool.map(lambda one: say(client, *one), wanted)) == expected


def scores(url: str, model: str, messages: list, **more) -> dict:
    found = httpx.post(f"{url}/score", json={"model": model, "messages": messages, **more}, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def answered(answer: str) -> list[dict]:
    return [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": answer}]


def test_a_reward_model_scores_conversations(several, places):
    texts = ["SELECT count(*) FROM customers;", "no"]
    found = scores(several, "judge", [answered(text) for text in texts])
    judge = Model(load_config(None, [f"model_name_or_path={places / 'judge'}", "bf16=false"], verb="infer"))
    assert [one["score"] for one in found["data"]] == pytest.approx(judge.reward(QUESTIONS[0], texts), abs=1e-4)
    assert found["usage"]["prompt_tokens"] > 0 and found["model"] == "judge"
    assert scores(several, "judge", answered(texts[1]))["data"][0]["score"] == pytest.approx(
        found["data"][1]["score"], abs=1e-4
    )


def test_a_policy_scores_by_what_it_prefers_to_its_base(several, places):
    texts = ["SELECT count(*) FROM customers;", "no"]
    found = [one["score"] for one in scores(several, "dpo", [answered(text) for text in texts], beta=0.5)["data"]]
    words = [f"model_name_or_path={places / 'tiny-base'}", "bf16=false", f"adapter_name_or_path={places / 'dpo'}"]
    model = Model(load_config(None, words, verb="infer"))
    assert found == pytest.approx(model.reward(QUESTIONS[0], texts, beta=0.5), abs=1e-3)


def test_a_score_is_told_token_by_token(several):
    text = "SELECT count(*) FROM customers;"
    (whole,) = scores(several, "dpo", answered(text), logprobs=True)["data"]
    assert bytes(byte for token in whole["tokens"] if token["trained"] for byte in token["bytes"]).startswith(
        text.encode()
    )
    parts = [one["logprob"] - one["reference_logprob"] for one in whole["tokens"] if one["trained"]]
    assert whole["score"] == pytest.approx(0.1 * sum(parts), abs=1e-4)
    (cut,) = scores(several, "dpo", answered(text), logprobs=True, complete=False)["data"]
    assert len(cut["tokens"]) == len(whole["tokens"]) - 1
    (other,) = scores(several, "dpo", answered(text), reference="kto")["data"]
    (back,) = scores(several, "kto", answered(text), reference="dpo")["data"]
    assert other["score"] == pytest.approx(-back["score"], abs=1e-4)
    assert scores(several, "dpo", answered(text), reference="dpo")["data"][0]["score"] == 0


def test_who_cannot_score_or_write_says_so(several, client):
    body = {"model": "tiny-base", "messages": answered("no")}
    assert httpx.post(f"{several}/score", json=body).json()["error"]["code"] == "model_not_supported"
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, "judge", "x")
    assert caught.value.param == "model"
    unfinished = {"model": "judge", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    found = httpx.post(f"{several}/score", json=unfinished)
    assert found.status_code == 400 and found.json()["error"]["param"] == "messages"


def test_nothing_tells_where_files_are(several, places):
    root = several.removesuffix("/v1")
    wrong = {"model": str(places / "dpo"), "messages": []}
    seen = [
        httpx.get(f"{root}/v1/models"), httpx.get(f"{root}/v1/models/dpo"), httpx.get(f"{root}/health"),
        httpx.get(f"{root}/nowhere"), httpx.post(f"{root}/v1/chat/completions", json=wrong),
        httpx.post(f"{root}/v1/score", json={"model": "judge", "messages": [{"role": "user", "content": "a"}] * 2}),
        httpx.post(f"{root}/v1/chat/completions", json={"model": "dpo", "messages": [{"role": "tool"}]}),
    ]  # fmt: skip
    for one in seen:
        for secret in (str(places), places.name, "site-packages", "Traceback"):
            assert secret not in one.text and secret not in str(one.headers), one.url


def test_two_models_of_one_name_are_refused(places):
    twice = Settings(port=0, adapters={"dpo": str(places / "kto")})
    with pytest.raises(ConfigError, match="two models are called 'dpo'"):
        load(twice, f"adapter_name_or_path={places / 'dpo'}", model=str(places / "tiny-base"))


def test_an_adapter_that_is_not_there_is_told(places):
    settings = Settings(port=0, adapters={"gone": str(places / "gone")})
    with pytest.raises(ModelError, match="no such directory"):
        load(settings, model=str(places / "tiny-base"))
