"""What `trueup data preview` shows is what the trainer reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.config.load import load_config
from trueup.data.encode import prepare
from trueup.data.pieces import pieces, visible
from trueup.data.preview import ShownRow
from trueup.data.template_safety import examine
from trueup.data.templates import TEMPLATES, load_template, own_source
from trueup.errors import ConfigError
from trueup.models.load import load_tokenizer
from trueup.recipes.dataset_views import preview_datasets

MODEL = "model_name_or_path=builtin:sql-tiny"


def tokens(row: ShownRow, roles=("masked", "trained", "truncated")) -> dict[str, list[int]]:
    return {
        part.name: [token for run in part.runs if run.role in roles for piece in run.pieces for token in piece.ids]
        for part in row.parts
    }


@pytest.mark.parametrize("more", [[], ["cutoff_len=60"], ["cutoff_len=60", "truncation=keep_end"]])
def test_it_shows_the_trainers_own_tokens(more: list[str]):
    shown = preview_datasets(["dpo_en_demo"], None, [MODEL, *more], count=4)
    cfg = load_config(None, ["stage=dpo", "dataset=dpo_en_demo", "max_samples=4", MODEL, *more])
    train = prepare(cfg, load_tokenizer(cfg.model)).train
    assert [row.row for row in shown.rows] == train.rows
    for row, example in zip(shown.rows, train, strict=True):
        kept, trained = tokens(row, ("masked", "trained")), tokens(row, ("trained",))
        assert kept["prompt"] == example.prompt.tolist()
        for name, answer in zip(("chosen", "rejected"), example.answers, strict=True):
            assert kept[name] == answer.ids.tolist()
            assert trained[name] == answer.ids[answer.mask].tolist()


def test_what_was_cut_is_shown_too():
    whole = preview_datasets(["dpo_en_demo"], None, [MODEL], count=1).rows[0]
    for truncation in ("keep_start", "keep_end"):
        words = [MODEL, "cutoff_len=60", f"truncation={truncation}"]
        cut = preview_datasets(["dpo_en_demo"], None, words, count=1).rows[0]
        assert tokens(cut) == tokens(whole)
        assert tokens(cut, ("truncated",))["chosen"]


def test_every_sort_of_row_is_shown(tmp_path):
    rows = {
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "text": {"text": "a document"},
        "pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "ranking": {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 3, 2]},
        "feedback": {"prompt": "a", "completion": "b", "label": False},
    }
    for kind, row in rows.items():
        file = tmp_path / f"{kind}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        (shown,) = preview_datasets([str(file)], None, [MODEL]).rows
        assert shown.kind == kind and any(part.count("trained") for part in shown.parts)


def test_the_first_token_of_a_text_is_in_no_loss(tmp_path):
    (tmp_path / "a.txt").write_text("one document\n")
    (row,) = preview_datasets([str(tmp_path / "a.txt")], None, [MODEL]).rows
    assert row.parts[0].runs[0].role == "masked" and row.parts[0].runs[0].tokens == 1


def test_a_row_that_is_left_out_says_why(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a " * 90, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    equal, long, good = preview_datasets([str(file)], None, [MODEL, "cutoff_len=40"]).rows
    assert equal.dropped.startswith("equal pair")
    assert long.dropped.startswith("prompt too long") and tokens(long, ("truncated",))["prompt"]
    assert good.dropped is None


def test_one_row_by_number_or_id():
    for row in ("5", "dpo_en_demo:5"):
        (shown,) = preview_datasets(["dpo_en_demo"], None, [MODEL], row=row).rows
        assert shown.row == "dpo_en_demo:5"
    for row in ("x", "5000"):
        with pytest.raises(ConfigError, match="there is no row"):
            preview_datasets(["dpo_en_demo"], None, [MODEL], row=row)


def test_the_page_holds_what_the_data_say_as_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "<script>alert(1)</script>", "chosen": "b", "rejected": "c"}\n')
    html = preview_datasets([str(tmp_path / "x.jsonl")], None, [MODEL]).page()
    assert "<script" not in html and "&lt;" in html
    assert 'class="trained"' in html and "http:" not in html and "https:" not in html


# ---- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_pieces_join_to_the_text(kind: str):
    tokenizer = make_tokenizer("llama2", kind)
    text = "Hello  there, 你好 🎉👨‍👩‍👧 é\n\n  indented"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(piece.text for piece in found).lstrip(" ") == text
    assert [token for piece in found for token in piece.ids] == ids


def test_a_character_cut_in_its_middle_is_still_shown():
    tokenizer = make_tokenizer("qwen")
    ids = tokenizer("🎉", add_special_tokens=False)["input_ids"]
    assert [token for piece in pieces(tokenizer, ids[:2]) for token in piece.ids] == ids[:2]


def test_nothing_a_row_says_steers_a_terminal():
    assert visible("a\x1b[31m\u202eb\nc\t你 好") == "a␛[31m\\u202eb↵\nc␉你 好"


# ---- template safety -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_train_their_stop_token_and_double_nothing(name: str):
    tokenizer = make_tokenizer(name)
    safety = examine(load_template(tokenizer, name), None)
    assert safety.stop_trained and not safety.bos_doubled and not safety.eos_doubled
    assert not list(safety.warnings())


def test_c7_the_difference_from_the_tokenizers_own_is_shown():
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = load_template(make_tokenizer("chatml"), "chatml").jinja
    safety = examine(load_template(tokenizer, "qwen"), own_source(tokenizer))
    assert safety.own == "different"
    assert any(line.startswith("+") and "You are Qwen" in line for line in safety.difference)
    assert examine(load_template(tokenizer, "chatml"), own_source(tokenizer)).own in ("same", "is used")


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ END }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_c7_a_template_file_is_compared_too(tmp_path, caplog):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = load_template(make_tokenizer("chatml"), "chatml").jinja
    (tmp_path / "mine.jinja").write_text(tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> "))
    load_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert "is not the tokenizer's own" in caplog.text


def test_a_doubled_bos_or_eos_is_said(tmp_path, caplog):
    tokenizer = make_tokenizer("llama2")
    file = tmp_path / "doubled.jinja"
    file.write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST] ' if "
        "m['role'] == 'user' else m['content'] + eos_token + eos_token }}{% endfor %}"
    )
    safety = examine(load_template(tokenizer, str(file)), None)
    assert safety.bos_doubled
    assert "writes BOS twice" in caplog.text


def test_masks_and_texts_of_a_preview_are_json(tmp_path):
    shown = preview_datasets(["dpo_zh_demo"], None, [MODEL], count=1).to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert np.sum([run["role"] == "trained" for part in shown["rows"][0]["parts"] for run in part["runs"]]) == 2
