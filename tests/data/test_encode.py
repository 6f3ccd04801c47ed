"""From examples to ids: what is trained, cut, dropped, and what is said about it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.config.load import load_config
from trueup.data.encode import Answer, Encoded, EncodedDataset, encode_dataset, prepare
from trueup.data.examples import Chat, Feedback, Message, Pair, Prompt, Ranking, Text
from trueup.data.report import DataReport
from trueup.data.templates import load_template
from trueup.errors import ConfigError, CorruptStateError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def u(text):
    return Message("user", text)


def a(text):
    return Message("assistant", text)


def pair(chosen="yes", rejected="no", row="d:0", prompt="question", **options):
    return Pair((u(prompt),), (a(chosen),), (a(rejected),), row, **options)


def plain_pair(chosen, rejected, prompt=(), row="d:0"):
    return Pair(prompt, (a(chosen),), (a(rejected),), row, plain=True)


@pytest.fixture(name="template")
def chatml():
    return load_template(make_tokenizer("chatml"), "chatml")


def encode(examples, template, cutoff_len=4096, report=None, **options):
    return encode_dataset(examples, template, cutoff_len=cutoff_len, report=report, **options)


def counted(examples):
    """A report that has read these examples."""
    report = DataReport()
    report.dataset("d").read = report.dataset("d").available = len(examples)
    return report


def text_of(template, ids):
    return template.tokenizer.decode(ids)


# --- kinds ------------------------------------------------------------------------------


def test_a_pair_shares_its_prompt_and_its_sides_end_with_the_turn(template):
    (example,) = encode([pair("good", "bad")], template)
    assert example.row == "d:0"
    assert example.prompt.tolist() == template.encode_prompt((u("question"),))
    assert [text_of(template, s.ids) for s in example.answers] == [
        "good<|im_end|>",
        "bad<|im_end|>",
    ]
    assert all(side.mask.all() for side in example.answers)
    assert example.prompt.dtype == example.answers[0].ids.dtype == np.int32


def test_a_chat_begins_its_answer_at_the_first_trained_token(template):
    chat = Chat((u("a"), a("b"), u("c"), a("d")), "d:0")
    (example,) = encode([chat], template)
    assert text_of(template, example.prompt).endswith("assistant\n")
    (rest,) = example.answers
    assert text_of(template, rest.ids[rest.mask]) == "b<|im_end|>d<|im_end|>"
    assert rest.mask[0] and not rest.mask.all()


def test_mask_history_and_train_on_prompt(template):
    chat = Chat((u("a"), a("b"), u("c"), a("d")), "d:0")
    (last,) = encode([chat], template, mask_history=True)
    assert text_of(template, last.answers[0].ids) == "d<|im_end|>"
    assert "b<|im_end|>" in text_of(template, last.prompt)
    (whole,) = encode([chat], template, train_on_prompt=True)
    assert len(whole.prompt) == 0 and whole.answers[0].mask.all()
    assert text_of(template, whole.answers[0].ids).startswith("<|im_start|>user\na")


def test_a_chat_whose_turns_the_template_rewrites_becomes_one_example_each(caplog):
    template = load_template(make_tokenizer("qwen3"), "qwen3")
    chat = Chat((u("a"), a("b"), u("c"), a("d")), "d:0")
    report = counted([chat])
    with caplog.at_level(logging.WARNING, "trueup"):
        dataset = encode([chat], template, report=report)
    assert [example.row for example in dataset] == ["d:0", "d:0"]
    assert "one example per answer" in caplog.text and "empty <think> block" in caplog.text
    assert any("1 conversation became" in note for note in report.notes)


def test_rankings_feedback_and_prompts(template):
    ranking = Ranking((u("q"),), ((a("1"),), (a("2"),), (a("3"),)), "d:0", (3.0, 2.0, 1.0))
    feedback = Feedback((u("q"),), (a("no"),), False, "d:1")
    dataset = encode([ranking, feedback, Prompt((u("q"),), "d:2")], template)
    assert [len(example.answers) for example in dataset] == [3, 1, 0]
    assert dataset[0].scores == (3.0, 2.0, 1.0) and dataset[1].scores == (0.0,)
    assert dataset[2].prompt.tolist() == template.encode_prompt((u("q"),))


def test_common_turns_of_a_pair_belong_to_its_prompt(template):
    common = (a("same"), u("and then?"))
    example = Pair((u("q"),), (*common, a("good")), (*common, a("bad"), u("oh"), a("more")), "d:0")
    (encoded,) = encode([example], template)
    assert encoded.prompt.tolist() == template.encode_prompt((u("q"), *common))
    chosen, rejected = encoded.answers
    assert text_of(template, chosen.ids) == "good<|im_end|>"
    assert text_of(template, rejected.ids[rejected.mask]) == "bad<|im_end|>more<|im_end|>"


def test_tools_without_a_place_in_the_template_drop_the_row(template):
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    report = counted([0, 0])
    dataset = encode([pair(tools=(tool,)), pair(row="d:1")], template, report=report)
    assert [example.row for example in dataset] == ["d:1"]
    assert report.dataset("d").dropped["the chat template has no tools"].ids == ["d:0"]


# --- plain text -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_plain_pairs_are_opened_and_closed_as_the_tokenizer_does(kind):
    tokenizer = make_tokenizer("llama2", kind)
    template = load_template(tokenizer, "empty")
    (example,) = encode([plain_pair(" yes", " no", (u("Is it?"),))], template)
    assert example.prompt.tolist() == tokenizer("Is it?")["input_ids"]
    for side, text in zip(example.answers, ("Is it? yes", "Is it? no"), strict=True):
        whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        assert [*example.prompt, *side.ids] == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: how? A: fine today", "Q: how? A: fineness", "Q: how? A:"),
        ("same start\nyes", "same start\nno", "same start\n"),
        ("你好，世界。今天", "你好，世界。我们", "你好，世界。"),
        ("abc", "xyz", ""),
        ("one two", "one two three", "one two"),
    ],
)
def test_a_plain_pair_without_prompt_splits_at_a_token_where_a_word_ends(kind, chosen, rejected, prompt):
    tokenizer = make_tokenizer("llama2", kind)
    template = load_template(tokenizer, "empty")
    (example,) = encode([plain_pair(chosen, rejected)], template)
    found = tokenizer.decode(example.prompt, skip_special_tokens=True)
    assert prompt.startswith(found.strip(" ")) and len(found) <= len(prompt)
    if kind == "byte_level" and prompt.isascii():
        assert found == prompt
    for side, text in zip(example.answers, (chosen, rejected), strict=True):
        expected = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        assert [*example.prompt, *side.ids] == expected
    assert all(len(side.ids) for side in example.answers)


def test_plain_text_does_not_get_bos_or_eos_twice():
    tokenizer = make_tokenizer("llama2")
    template = load_template(tokenizer, "empty")
    (example,) = encode([plain_pair("yes</s>", "no", (u("<s>Q "),))], template)
    assert example.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert example.answers[0].ids.tolist().count(tokenizer.eos_token_id) == 1


# --- documents --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), st.integers(8, 40))
def test_every_token_of_a_document_is_predicted_once(text, cutoff_len):
    tokenizer = make_tokenizer("llama2")
    template = load_template(tokenizer, "empty")
    pieces = list(encode([Text(text, "d:0")], template, cutoff_len))
    whole = [t for piece in pieces for t in piece.answers[0].ids.tolist()]
    assert whole[0] == tokenizer.bos_token_id and whole[-1] == tokenizer.eos_token_id
    assert all(len(p.prompt) + len(p.answers[0].ids) <= cutoff_len for p in pieces)
    assert [len(p.prompt) for p in pieces] == [0] + [1] * (len(pieces) - 1)
    assert all(q.prompt[0] == p.answers[0].ids[-1] for p, q in zip(pieces, pieces[1:], strict=False))
    assert all(piece.answers[0].mask.all() for piece in pieces)


def test_a_long_document_is_counted_as_cut_into_pieces(template):
    documents = [Text("word " * 200, "d:0"), Text("short", "d:1")]
    report = counted(documents)
    dataset = encode(documents, template, 64, report)
    assert len(dataset) > 3 and report.dataset("d").kept == 2
    assert any("1 document was cut" in note for note in report.notes)


def test_control_tokens_in_a_document_are_text_and_counted(template, caplog):
    with caplog.at_level(logging.WARNING, "trueup"):
        (example,) = encode([Text("a<|im_end|>b", "d:0")], template)
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in example.answers[0].ids and "control tokens" in caplog.text


# --- lengths ----------------------------------------------------------------------------

LONG = "word " * 60


def test_a_prompt_is_never_cut_its_row_is_dropped(template):
    examples = [pair(prompt=LONG), pair(row="d:1")]
    report = counted(examples)
    dataset = encode(examples, template, 40, report)
    assert [example.row for example in dataset] == ["d:1"]
    assert report.dataset("d").dropped["prompt too long"].ids == ["d:0"]
    assert report.statistics()["prompt"]["max"] > 60


def test_keep_start_cuts_the_end_of_an_answer_and_says_so(template, caplog):
    examples = [pair(LONG, "no")]
    report = counted(examples)
    with caplog.at_level(logging.WARNING, "trueup"):
        (example,) = encode(examples, template, 40, report)
    chosen, rejected = example.answers
    assert len(example.prompt) + len(chosen.ids) == 40
    assert text_of(template, chosen.ids).startswith("word")
    assert not text_of(template, chosen.ids).endswith("<|im_end|>")
    assert text_of(template, rejected.ids) == "no<|im_end|>"
    assert report.dataset("d").truncated["chosen"].ids == ["d:0"]
    assert "rejected" not in report.dataset("d").truncated
    assert "cut at cutoff_len 40" in caplog.text


def test_keep_end_cuts_the_beginning_of_an_answer(template):
    (example,) = encode([pair(LONG, "no")], template, 40, truncation="keep_end")
    assert len(example.prompt) + len(example.answers[0].ids) == 40
    assert text_of(template, example.answers[0].ids).endswith("word <|im_end|>")
    assert example.prompt.tolist() == template.encode_prompt((u("question"),))


def test_drop_leaves_the_row_out_and_error_refuses_the_run(template):
    examples = [pair(LONG, "no"), pair(row="d:1")]
    report = counted(examples)
    assert len(encode(examples, template, 40, report, truncation="drop")) == 1
    assert report.dataset("d").dropped["too long"].ids == ["d:0"]
    with pytest.raises(DataError, match="d:0"):
        encode(examples, template, 40, truncation="error")


def test_on_bad_rows_error_refuses(template):
    examples = [pair(prompt=LONG), pair(row="d:1")]
    with pytest.raises(DataError, match="prompt too long"):
        encode(examples, template, 40, counted(examples), on_bad_rows="error")


def test_no_usable_row_left_is_an_error_with_the_arithmetic(template):
    examples = [pair(prompt=LONG)]
    with pytest.raises(DataError, match="0 of 1 rows usable: 1 prompt too long"):
        encode(examples, template, 40, counted(examples))


def test_pairs_that_are_equal_after_truncation_are_dropped(template):
    examples = [pair(LONG + "a", LONG + "b"), pair("x", "x", "d:1"), pair(row="d:2")]
    report = counted(examples)
    dataset = encode(examples, template, 40, report)
    assert [example.row for example in dataset] == ["d:2"]
    assert set(report.dataset("d").dropped) == {"equal after truncation", "equal answers"}


def test_a_long_chat_loses_its_tail_and_a_rewritten_one_its_last_answers(template):
    turns = tuple(m for _ in range(10) for m in (u("some question"), a("some answer")))
    report = counted([0])
    (example,) = encode([Chat(turns, "d:0")], template, 60, report)
    assert len(example.prompt) + len(example.answers[0].ids) == 60
    assert report.dataset("d").truncated["answer"].ids == ["d:0"]
    qwen3 = load_template(make_tokenizer("qwen3"), "qwen3", enable_thinking=False)
    report = counted([0])
    dataset = encode([Chat(turns, "d:0")], qwen3, 80, report)
    assert 1 <= len(dataset) < 10 and report.dataset("d").truncated["answer"].count == 1
    assert report.dataset("d").kept == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc d\n你😀", min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(8, 80),
    st.sampled_from(["keep_start", "keep_end", "drop"]),
)
def test_whatever_is_kept_fits_and_trains_something(texts, cutoff_len, truncation):
    template = load_template(make_tokenizer("chatml"), "chatml")
    turns = tuple(m for text in texts for m in (u(text), a(text + "!")))
    examples = [Chat(turns, "d:0"), Pair(turns[:1], turns[1:2], (a(texts[-1]),), "d:1")]
    report = counted([*examples, 0])
    dataset = encode([*examples, pair("1", "2", "d:2", "q")], template, 4096, report)
    assert len(dataset) >= 1
    report = counted([*examples, 0])
    try:
        dataset = encode(examples, template, cutoff_len, report, truncation=truncation)
    except DataError:
        dataset = []
    for example in dataset:
        for answer in example.answers:
            assert len(example.prompt) + len(answer.ids) <= cutoff_len
            assert answer.mask.any()


# --- the dataset ------------------------------------------------------------------------


def small_dataset(template):
    chat = Chat((u("a"), a("b")), "d:1")
    ranking = Ranking((u("q"),), ((a("1"),), (a("2"),), (a("3"),)), "d:2", (3.0, 2.0, 1.0))
    return encode([pair(), chat, ranking, Prompt((u("q"),), "d:3")], template)


def test_lengths_count_a_shared_prompt_once(template):
    dataset = small_dataset(template)
    for i, example in enumerate(dataset):
        sizes = [len(answer.ids) for answer in example.answers]
        assert dataset.lengths[i] == len(example.prompt) + sum(sizes)
        assert dataset.answer_lengths[i].tolist() == sizes + [0] * (3 - len(sizes))
        assert dataset.prompt_lengths[i] == len(example.prompt)


def test_slices_and_negative_indices(template):
    dataset = small_dataset(template)
    assert dataset[-1].row == "d:3" and [e.row for e in dataset[1:3]] == ["d:1", "d:2"]
    with pytest.raises(IndexError):
        dataset[4]


def test_the_fingerprint_sees_ids_masks_borders_and_scores():
    def one(ids=(1, 2), mask=(True, True), prompt=(7,), scores=()):
        answer = Answer(np.array(ids, np.int32), np.array(mask))
        encoded = Encoded("d:0", np.array(prompt, np.int32), (answer,), scores)
        return EncodedDataset.of([encoded]).fingerprint

    prints = {
        one(), one(ids=(1, 3)), one(mask=(True, False)), one(ids=(2,), mask=(True,), prompt=(7, 1)),
        one(scores=(1.0,)),
    }  # fmt: skip
    assert len(prints) == 5 and one() == one()


def test_a_dataset_is_saved_and_read_back_whole(template, tmp_path):
    dataset = small_dataset(template)
    dataset.save(tmp_path / "x" / "train", {"a": 1})
    again, about = EncodedDataset.load(tmp_path / "x" / "train")
    assert again.fingerprint == dataset.fingerprint and about == {"a": 1}
    for one, other in zip(dataset, again, strict=True):
        assert one.row == other.row and one.scores == other.scores
        assert all(np.array_equal(x.mask, y.mask) for x, y in zip(one.answers, other.answers, strict=True))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["train"]


def test_changed_bytes_are_noticed(template, tmp_path):
    small_dataset(template).save(tmp_path / "train")
    path = tmp_path / "train" / "tokens.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStateError, match="fingerprint|cannot be read"):
        EncodedDataset.load(tmp_path / "train")


# --- the whole data half ----------------------------------------------------------------


@pytest.fixture(name="rows")
def preference_file(tmp_path):
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    rows.append({"prompt": LONG * 2, "chosen": "a", "rejected": "b"})
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def config(rows, tmp_path, **options):
    return load_config(
        {
            "model_name_or_path": "x",
            "stage": "dpo",
            "dataset": str(rows),
            "template": "chatml",
            "cutoff_len": 64,
            "output_dir": str(tmp_path / "out"),
            **options,
        }
    )


def test_prepare_reads_splits_encodes_and_reports(rows, tmp_path):
    prepared = prepare(config(rows, tmp_path, val_size=0.2), make_tokenizer("chatml"))
    assert set(prepared.eval) == {"eval"}
    assert len(prepared.train) + len(prepared.eval["eval"]) == 20
    (dataset,) = prepared.report.datasets.values()
    assert dataset.read == 21 and dataset.dropped["prompt too long"].count == 1
    assert prepared.report.splits["train"] == len(prepared.train)
    assert prepared.template.name == "chatml"
    assert json.dumps(prepared.report.to_dict())


def test_the_same_run_gives_the_same_tokens(rows, tmp_path):
    cfg = config(rows, tmp_path)
    prints = {prepare(cfg, make_tokenizer("chatml")).train.fingerprint for _ in range(2)}
    assert len(prints) == 1


def test_the_tokenised_copy_is_used_again_and_refused_for_another_run(rows, tmp_path, monkeypatch):
    folder = tmp_path / "tokens"
    tokenizer = make_tokenizer("chatml")
    cfg = config(rows, tmp_path, tokenized_path=str(folder), val_size=0.2)
    first = prepare(cfg, tokenizer)
    assert (folder / "train" / "tokens.safetensors").is_file()

    def never(*_):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("trueup.data.encode.encode_examples", never)
        again = prepare(cfg, tokenizer)
    assert again.train.fingerprint == first.train.fingerprint
    assert again.report.to_dict() == first.report.to_dict()

    shorter = config(rows, tmp_path, tokenized_path=str(folder), val_size=0.2, cutoff_len=32)
    with pytest.raises(ConfigError, match=r"cutoff_len \(64 → 32\)"):
        prepare(shorter, tokenizer)
    other = config(rows, tmp_path, tokenized_path=str(folder), val_size=0.2, template="default")
    with pytest.raises(ConfigError, match="another template"):
        prepare(other, tokenizer)
    rows.write_text(rows.read_text(encoding="utf-8").replace("good 1", "fine 1"), encoding="utf-8")
    with pytest.raises(ConfigError, match="another data"):
        prepare(cfg, tokenizer)
    fresh = config(rows, tmp_path, tokenized_path=str(folder), val_size=0.2, overwrite_cache=True)
    assert prepare(fresh, tokenizer).train.fingerprint != first.train.fingerprint


def test_the_tokenised_copy_alone_is_enough(rows, tmp_path):
    folder = str(tmp_path / "tokens")
    tokenizer = make_tokenizer("chatml")
    cfg = config(rows, tmp_path, tokenized_path=folder, val_size=0.2)
    first = prepare(cfg, tokenizer)
    alone = prepare(cfg.replace(dataset=[], val_size=0.0), tokenizer)
    assert alone.train.fingerprint == first.train.fingerprint
    assert alone.eval["eval"].fingerprint == first.eval["eval"].fingerprint


def test_a_copy_without_evaluation_data_is_refused_when_they_are_wanted(rows, tmp_path):
    folder = str(tmp_path / "tokens")
    cfg = config(rows, tmp_path, tokenized_path=folder, max_samples=10)
    prepare(cfg, make_tokenizer("chatml"))
    cfg = cfg.replace(eval_dataset=cfg.data.dataset)
    with pytest.raises(ConfigError, match="made without eval"):
        prepare(cfg, make_tokenizer("chatml"))


def test_evaluation_alone_needs_no_training_data(rows, tmp_path):
    cfg = config(rows, tmp_path).replace(dataset=[], eval_dataset=[str(rows)])
    prepared = prepare(cfg, make_tokenizer("chatml"))
    assert len(prepared.train) == 0 and len(prepared.eval["eval"]) == 20


def test_documents_need_no_template_and_say_nothing_about_one(tmp_path, caplog):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "hello world"}\n{"text": "again"}\n', encoding="utf-8")
    cfg = config(path, tmp_path, stage="pt", template=None)
    tokenizer = make_tokenizer("default")
    with caplog.at_level(logging.WARNING, "trueup"):
        prepared = prepare(cfg, tokenizer)
    assert not caplog.records
    assert text_of(prepared.template, prepared.train[0].answers[0].ids) == "hello world<|endoftext|>"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data are not at {SHARED}")
@pytest.mark.parametrize(
    ("name", "stage"),
    [("dpo_en_demo", "dpo"), ("hh_harmless", "dpo"), ("alpaca_zh_demo", "sft"), ("c4_demo", "pt")],
)
def test_every_row_of_real_data_is_accounted_for(name, stage, tmp_path):
    cfg = config(name, tmp_path, stage=stage, dataset_dir=str(SHARED), cutoff_len=1024)
    prepared = prepare(cfg, make_tokenizer("chatml"))
    report = prepared.report.dataset(name)
    kept = {example.row for example in prepared.train}
    assert report.kept == len(kept) and report.read == report.available
    if name == "hh_harmless":
        empty = [rows for reason, rows in report.dropped.items() if "empty" in reason]
        assert sum(rows.count for rows in empty) == 4
