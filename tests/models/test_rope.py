"""Stretched rotary positions: transformers is the judge of what a kind and a factor mean."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.config.schema import ModelSection
from trueup.errors import ConfigError, ModelError
from trueup.models.load import load_base, load_frozen
from trueup.models.rope import RECORD, context_of, fit_rope, rope_of, stretch_of, write_record
from trueup.rollout.engines import Engine
from trueup.types import Forest, Segment

CPU = torch.device("cpu")
CONTEXT = 32
#: what a person would write into config.json for four times 32 positions.
BY_HAND = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "ntk": {"rope_theta": 10000.0 * 13 ** (8 / 6)},  # heads of 8, 4² − 4 + 1
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": CONTEXT,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def saved(directory: Path, name: str = "llama", **config) -> str:
    tiny_model(name, **{"max_position_embeddings": CONTEXT, **config}).save_pretrained(directory)
    return str(directory)


def section(path: str, kind: str | None = None, length: int | None = None) -> ModelSection:
    keys = {"model_name_or_path": path, "rope_scaling": kind, "rope_scaling_length": length, "device": "cpu"}
    return ModelSection.model_validate(keys)


def by_hand(path: str, kind: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(path)
    config.rope_parameters = {**config.rope_parameters, **BY_HAND[kind]}
    if kind != "dynamic":
        config.max_position_embeddings = 4 * CONTEXT
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_are_those_of_plain_transformers_with_the_same_rope(tmp_path: Path, name: str, kind: str):
    path = saved(tmp_path / "base", name)
    base = load_base(path, section(path, kind, 100), CPU, torch.float32)
    plain = by_hand(path, kind)
    for length in (20, 100):
        assert torch.allclose(base(ids(length)).logits, plain(ids(length)).logits, atol=1e-5)
    stretch = stretch_of(base)
    assert str(stretch) == f"{kind}, factor 4: 32 → 128 positions" and context_of(base.config, 0) == 128
    base.save_pretrained(tmp_path / "saved")
    again = load_base(str(tmp_path / "saved"), section(path), CPU, torch.float32)
    assert rope_of(again.config) == rope_of(base.config)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(ids(100)).logits, fresh(ids(100)).logits)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
@torch.no_grad()
def test_a_shared_prompt_is_read_as_plain_transformers_reads_it(tmp_path: Path, kind: str):
    path = saved(tmp_path / "base")
    policy = load_frozen(section(path, kind, 100), path, [], CPU, torch.float32)
    assert policy.shared
    prompt, one, two = ids(60)[0], ids(40, 1)[0], ids(9, 2)[0]
    tokens = torch.cat([prompt, one, two])
    forest = Forest(
        tokens, torch.cat([torch.arange(100), torch.arange(60, 69)]),
        (Segment(0, 60, -1), Segment(60, 100, 0), Segment(100, 109, 0)),
        torch.cat([torch.arange(59, 99), torch.tensor([59]), torch.arange(100, 108)]), tokens[60:],
        torch.tensor([0] * 40 + [1] * 9), 2, ((0, 1), (0, 2)),
    )  # fmt: skip
    found = policy.token_logps(forest)
    plain = by_hand(path, kind)
    for answer, part in ((one, found[:40]), (two, found[40:])):
        logits = plain(torch.cat([prompt, answer])[None]).logits[0, 59:-1]
        expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        assert torch.allclose(part, expected, atol=1e-5)


def test_the_factor_is_the_length_over_the_context_rounded_up(tmp_path: Path):
    for length, factor in ((33, 2.0), (64, 2.0), (65, 3.0), (128, 4.0)):
        config = AutoConfig.from_pretrained(saved(tmp_path / "base"))
        fit_rope(config, section("", "linear", length), [], "m")
        assert (config.rope_parameters["factor"], config.max_position_embeddings) == (factor, 32 * factor)


def test_a_length_that_fits_already_stretches_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = AutoConfig.from_pretrained(saved(tmp_path / "base"))
    before = config.to_dict()
    with caplog.at_level(logging.WARNING, "trueup"):
        assert fit_rope(config, section("", "yarn", 32), [], "m") is None
    assert config.to_dict() == before and "rope_scaling_length says how far" in caplog.text


def test_a_model_that_is_stretched_so_already_stays_as_it_is_and_another_is_refused(tmp_path: Path):
    path = saved(tmp_path / "base")
    load_base(path, section(path, "yarn", 100), CPU, torch.float32).save_pretrained(tmp_path / "long")
    long = str(tmp_path / "long")
    same = load_base(long, section(long, "yarn", 100), CPU, torch.float32)
    assert stretch_of(same) is None and same.config.rope_parameters["factor"] == 4.0
    for kind, length in (("linear", 100), ("yarn", 200)):
        with pytest.raises(ModelError, match="stretched already"):
            load_base(long, section(long, kind, length), CPU, torch.float32)


@pytest.mark.parametrize(
    "config, why",
    [
        (lambda: GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=32), "no rotary positions"),
        (lambda: AutoConfig.for_model("gemma3_text"), "in 2 ways"),
        (lambda: AutoConfig.for_model("phi3", max_position_embeddings=4096), "must be one of"),
    ],
)
def test_a_model_without_one_rope_is_refused_with_words(config, why: str):
    with pytest.raises(ModelError, match=why) as caught:
        fit_rope(config(), section("", "yarn", 10**6), [], "m")
    assert "smaller cutoff_len" in str(caught.value)


def test_training_takes_for_dynamic_what_reads_every_row_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    keys = {"model_name_or_path": str(tmp_path), "dataset": "d", "rope_scaling": "dynamic", "cutoff_len": 100}
    with caplog.at_level(logging.WARNING, "trueup"):
        assert load_config(keys).model.rope_scaling == "ntk"
    assert "beside a longer one" in caplog.text
    for verb in ("infer", "eval", "generate"):
        assert load_config(keys, verb=verb).model.rope_scaling == "dynamic"


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm"])
@torch.no_grad()
def test_ntk_is_what_dynamic_has_for_the_longest_row_for_every_row(tmp_path: Path, name: str):
    """GLM turns half of a head's dimensions."""
    path = saved(tmp_path / "base", name)
    model = load_base(path, section(path, "ntk", 100), CPU, torch.float32)
    config = AutoConfig.from_pretrained(path)
    config.rope_parameters = {**config.rope_parameters, **BY_HAND["dynamic"]}
    dynamic = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()
    long, short = ids(128), ids(100, 1)
    torch.testing.assert_close(model(long).logits, dynamic(long).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(short).logits, dynamic(short).logits, atol=1e-5, rtol=0)  # after a longer one
    beside = model(torch.cat([long, torch.nn.functional.pad(short, (0, 28))])).logits[1:, :100]
    torch.testing.assert_close(beside, model(short).logits, atol=1e-5, rtol=0)


def test_an_ntk_adapter_takes_the_dynamic_of_its_training_file_and_no_other_kind(tmp_path: Path):
    path = saved(tmp_path / "base")
    base = load_base(path, section(path, "ntk", 100), CPU, torch.float32)
    write_record(tmp_path, base)
    for kind in (None, "ntk", "dynamic"):
        config = AutoConfig.from_pretrained(path)
        assert fit_rope(config, section("", kind, 100), [str(tmp_path)], "m") == stretch_of(base)
        assert config.rope_parameters == base.config.rope_parameters
    for kind, length in (("yarn", 100), ("ntk", 200), ("dynamic", 200)):
        with pytest.raises(ModelError, match="stretched already .ntk, factor 4, 128 positions"):
            fit_rope(AutoConfig.from_pretrained(path), section("", kind, length), [str(tmp_path)], "m")


def test_the_length_is_cutoff_len_unless_it_is_given_with_every_verb():
    keys = {"model_name_or_path": "m", "dataset": "d", "rope_scaling": "yarn", "cutoff_len": 100}
    for verb in ("train", "infer", "eval", "generate"):
        assert load_config(keys, verb=verb).model.rope_scaling_length == 100
        assert load_config({**keys, "rope_scaling_length": 200}, verb=verb).model.rope_scaling_length == 200
    with pytest.raises(ConfigError, match="rope_scaling"):
        load_config({"model_name_or_path": "m", "dataset": "d", "rope_scaling_length": 100})


def test_a_dynamic_rope_answers_as_long_as_its_factor_says(tmp_path: Path):
    from tests.data.tiny_tokenizers import make_tokenizer

    path = saved(tmp_path / "base")
    policy = load_frozen(section(path, "dynamic", 100), path, [], CPU, torch.float32)
    assert Engine(policy, make_tokenizer("qwen"), [2]).context == 128


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path):
    (tmp_path / RECORD).write_text(json.dumps({"before": {}}), encoding="utf-8")
    with pytest.raises(ModelError, match="does not say how"):
        fit_rope(tiny_model().config, section(""), [str(tmp_path)], "m")
