"""Reward models that are encoders: told apart from decoders, read pair by pair, refused where they give no number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.config.schema import ModelSection
from trueup.errors import ModelError
from trueup.models.scorer import is_text_classifier, load_text_scorer

QUESTIONS = ["red or blue ?", "one", "one two three ?", "red or blue ?"]
ANSWERS = ["red", "two three red red red red red", "", "blue"]
CPU, FP32 = torch.device("cpu"), torch.float32


def save_encoder(directory: Path, **keys) -> Path:
    """A BERT of a few thousand parameters with a word-level tokenizer that marks pairs, as published ones do."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(["red or blue ? one two three"], trainers.WordLevelTrainer(special_tokens=special))
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=16, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.5, **{"num_labels": 1, **keys},
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def section() -> ModelSection:
    return load_config({"model_name_or_path": "builtin:sql-tiny", "device": "cpu"}, verb="infer").model


def test_scores_are_those_of_plain_transformers(encoder: Path, section: ModelSection) -> None:
    """Question and answer as a pair, one by one; batches of any size give the same."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    expected = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        with torch.no_grad():
            row = tokenizer([question], [answer], truncation=True, return_tensors="pt")
            expected.append(float(model(**row).logits[0, 0]))
    scorer = load_text_scorer(section, str(encoder), CPU, FP32)
    assert len(set(expected)) == 4
    for size in (1, 3, 32):
        assert scorer(QUESTIONS, ANSWERS, batch_size=size) == pytest.approx(expected, abs=1e-5)
    assert scorer([], []) == []


def test_which_side_a_text_is_on_matters(encoder: Path, section: ModelSection) -> None:
    scorer = load_text_scorer(section, str(encoder), CPU, FP32)
    assert scorer(["red"], ["blue"]) != pytest.approx(scorer(["blue"], ["red"]), abs=1e-3)


def test_what_is_too_long_is_cut_off(encoder: Path, section: ModelSection) -> None:
    scorer = load_text_scorer(section, str(encoder), CPU, FP32)
    long = "one two three " * 20
    (cut,), (longer,) = scorer(["one"], [long]), scorer(["one"], [long + "red"])
    assert cut == longer


def test_it_is_frozen_and_draws_no_dropout(encoder: Path, section: ModelSection) -> None:
    scorer = load_text_scorer(section, str(encoder), CPU, FP32)
    assert not scorer.model.training and not any(p.requires_grad for p in scorer.model.parameters())
    assert scorer(QUESTIONS, ANSWERS) == scorer(QUESTIONS, ANSWERS)


def test_encoders_are_told_apart_from_decoders_and_language_models(
    encoder: Path, section: ModelSection, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "language")
    decoder = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language", num_labels=1)
    decoder.save_pretrained(tmp_path / "decoder")
    assert is_text_classifier(section, str(encoder))
    assert not is_text_classifier(section, str(tmp_path / "decoder"))
    assert not is_text_classifier(section, str(tmp_path / "language"))


def test_a_classifier_of_several_classes_is_refused(section: ModelSection, tmp_path: Path) -> None:
    name = str(save_encoder(tmp_path / "three", num_labels=3))
    with pytest.raises(ModelError, match="3 labels"):
        load_text_scorer(section, name, CPU, FP32)
