"""dataset_info.json as people have it, built-in samples, and datasets given as paths or hub ids."""

from __future__ import annotations

import json

import pytest

from trueup.data.load import load_examples
from trueup.data.registry import BUILTIN_DIR, known_names, registered, resolve_datasets
from trueup.errors import ConfigError, DataError

SAMPLES = {
    "dpo_en_demo": "pair",
    "dpo_zh_demo": "pair",
    "kto_en_demo": "feedback",
    "alpaca_en_demo": "chat",
    "alpaca_zh_demo": "chat",
    "identity": "chat",
    "pretrain_demo": "text",
}


def write_registry(tmp_path, text, name="dataset_info.json"):
    if not isinstance(text, str):
        text = json.dumps(text, indent=2)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def refuse(tmp_path, registry, name="mine") -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_datasets([name], write_registry(tmp_path, registry))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("name", "kind"), SAMPLES.items())
def test_built_in_samples_load_out_of_the_box_without_a_flaw(tmp_path, name, kind):
    data = load_examples([name], kind=kind, dataset_dir=tmp_path / "absent")
    assert 20 <= len(data.train) <= 40
    assert not list(data.report.warnings())


def test_built_in_samples_hold_no_placeholder():
    for path in BUILTIN_DIR.glob("*_demo.json*"):
        assert "{{" not in path.read_text(encoding="utf-8")


def test_the_users_registry_comes_before_the_samples(tmp_path):
    write_registry(tmp_path, {"identity": {"file_name": "mine.json"}})
    [spec] = resolve_datasets(["identity"], tmp_path)
    assert spec.source == tmp_path / "mine.json"
    assert known_names(tmp_path)[0] == "identity"


def test_an_entry_gives_every_documented_key(tmp_path):
    entry = {
        "hf_hub_url": "owner/name",
        "ms_hub_url": "Owner/name-ms",
        "formatting": "sharegpt",
        "ranking": True,
        "subset": "en",
        "split": "train_prefs",
        "folder": "data",
        "num_samples": 10,
        "columns": {"messages": "conv", "chosen": "good"},
        "tags": {"role_tag": "who"},
    }
    [spec] = resolve_datasets(["mine"], write_registry(tmp_path, {"mine": entry}))
    assert (spec.hub, spec.hub_id, spec.source) == ("huggingface", "owner/name", None)
    assert (spec.formatting, spec.ranking, spec.subset) == ("sharegpt", True, "en")
    assert (spec.split, spec.folder, spec.num_samples) == ("train_prefs", "data", 10)
    assert spec.columns == {"messages": "conv", "chosen": "good"}
    assert spec.tags == {"role_tag": "who"}
    assert spec.origin == f"{tmp_path / 'dataset_info.json'}:2"
    [spec] = resolve_datasets(["mine"], tmp_path, hub="modelscope")
    assert (spec.hub, spec.hub_id) == ("modelscope", "Owner/name-ms")


def test_a_yaml_registry_reads_alike(tmp_path):
    text = "mine:\n  file_name: a.jsonl\n  type: dpo\nother:\n  hf_hub_url: a/b\n"
    write_registry(tmp_path, text, "dataset_info.yaml")
    mine, other = resolve_datasets(["mine", "other"], tmp_path)
    assert (mine.source, mine.kind) == (tmp_path / "a.jsonl", "pair")
    assert other.origin.endswith("dataset_info.yaml:4")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("pretrain", "text"),
        ("sft", "chat"),
        ("rm", "ranking"),
        ("dpo", "pair"),
        ("kto", "feedback"),
    ],
)
def test_type_sets_the_kind(tmp_path, given, kind):
    entry = {"file_name": "a.json", "type": given}
    [spec] = resolve_datasets(["mine"], write_registry(tmp_path, {"mine": entry}))
    assert spec.kind == kind


def test_columns_take_the_names_of_the_guides(tmp_path):
    columns = {"instruction": "q", "input": "x", "output": "a", "label": "good", "text": "t"}
    entry = {"file_name": "a.json", "columns": columns}
    [spec] = resolve_datasets(["mine"], write_registry(tmp_path, {"mine": entry}))
    assert spec.columns == {
        "prompt": "q",
        "query": "x",
        "response": "a",
        "kto_tag": "good",
        "text": "t",
    }


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([], "is a list"),
        ({}, "has no source"),
        ({"file_nme": "a.json"}, "did you mean 'file_name'?"),
        ({"file_name": "a.json", "formating": "alpaca"}, "did you mean 'formatting'?"),
        ({"file_name": "a.json", "formatting": "sharegtp"}, "did you mean 'sharegpt'?"),
        ({"file_name": "a.json", "type": "dpoo"}, "did you mean 'dpo'?"),
        ({"file_name": "a.json", "ranking": "yes"}, "true or false"),
        ({"file_name": "a.json", "num_samples": 0}, "a whole number ≥ 1"),
        ({"file_name": "a.json", "columns": {"chosn": "a"}}, "did you mean 'chosen'?"),
        ({"file_name": "a.json", "columns": {"prompt": 3}}, "the name of a column"),
        ({"file_name": "a.json", "columns": {"prompt": "a", "instruction": "b"}}, "twice"),
        ({"file_name": "a.json", "columns": {"images": "pic"}}, "only text"),
        ({"file_name": "a.json", "tags": {"role": "from"}}, "did you mean 'role_tag'?"),
        ({"script_url": "owner/script"}, "would run a program"),
    ],
)
def test_d20_a_bad_entry_says_what_is_wrong_and_where(tmp_path, entry, words):
    message = refuse(tmp_path, {"mine": entry})
    assert words in message and "dataset_info.json:2" in message


def test_d20_all_faults_of_an_entry_are_listed_together(tmp_path):
    message = refuse(tmp_path, {"mine": {"file_nme": "a", "type": "x", "columns": {"chosn": "a"}}})
    assert message.count("dataset_info.json:2") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "mine": {"file_name": "a.json",}\n}', "dataset_info.json:2"),
        ('{\n "mine": {"file_name": "a.json"}\n "b": {}}', "expecting ',' or '}'"),
        ('{\n "mine": {},\n "mine": {}}', "registered twice (first in line 2)"),
        ('{\n "mine": {"split": "a", "split": "b"}}', 'key "split" is given twice'),
        ("[]", "expecting an object"),
        ("", "expecting an object"),
    ],
)
def test_d20_a_broken_registry_names_file_and_line(tmp_path, text, words):
    message = refuse(tmp_path, text)
    assert words in message and "dataset_info.json:" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mine: {a: 1\n", "dataset_info.yaml:2"),
        ("mine:\n  split: a\n  split: b\n", "given twice"),
        ("a: &x {file_name: b}\nmine: *x\n", "anchors"),
        ("- a\n", "not a mapping"),
    ],
)
def test_d20_a_broken_yaml_registry_too(tmp_path, text, words):
    write_registry(tmp_path, text, "dataset_info.yaml")
    with pytest.raises(ConfigError) as caught:
        resolve_datasets(["mine"], tmp_path)
    assert words in str(caught.value)


def test_paths_folders_patterns_and_hub_ids_need_no_registry(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "folder" / name).write_text('{"text": "x"}\n', encoding="utf-8")
    folder = tmp_path / "folder"
    names = [str(folder / "a.jsonl"), str(folder), str(folder / "*.jsonl"), "owner/some-set"]
    file, whole, pattern, hub = resolve_datasets(names, tmp_path / "absent")
    assert (file.name, whole.name, pattern.name) == ("a", "folder", "*.jsonl")
    assert (hub.hub_id, hub.source) == ("owner/some-set", None)


def test_a_path_may_be_relative_to_the_dataset_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    [spec] = resolve_datasets(["a.jsonl"], tmp_path)
    assert spec.source == tmp_path / "a.jsonl"


def test_two_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    names = [str(tmp_path / folder / "train.jsonl") for folder in ("a", "b")]
    data = load_examples(names, kind="text")
    assert [e.row for e in data.train] == [f"{name}:0" for name in names]


def test_online_makes_every_name_a_hub_id():
    [spec] = resolve_datasets(["name"], "ONLINE", hub="modelscope")
    assert (spec.hub_id, spec.hub) == ("name", "modelscope")


def test_unknown_names_and_missing_files_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resolve_datasets(["nothing", "absent.jsonl", "dpo_en_dem"], tmp_path)
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError):
        resolve_datasets(["absent.jsonl"], tmp_path)


def test_entries_nobody_asks_for_are_not_judged(tmp_path):
    write_registry(tmp_path, {"odd": {"nonsense": 1}, "mine": {"file_name": "a.json"}})
    assert resolve_datasets(["mine"], tmp_path)[0].name == "mine"
    assert list(registered(tmp_path)) == ["odd", "mine"]


GUIDES = {
    "rankings without columns": (
        {"ranking": True},
        {"instruction": "q", "output": [{"content": "best"}, {"content": "worse"}]},
        "pair",
    ),
    "rankings for a reward model": (
        {"ranking": True},
        {"instruction": "q", "output": [{"content": "best"}, {"content": "worse"}]},
        "ranking",
    ),
    "pairs with columns": (
        {
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        "pair",
    ),
    "pre-training": ({"columns": {"text": "text"}, "type": "pretrain"}, {"text": "t"}, "text"),
    "sft": (
        {
            "columns": {"instruction": "instruction", "input": "input", "output": "output"},
            "type": "sft",
        },
        {"instruction": "q", "input": "", "output": "a"},
        "chat",
    ),
    "three ranked texts": (
        {
            "columns": {"instruction": "instruction", "input": "input", "output": "output"},
            "type": "rm",
        },
        {"instruction": "q", "input": "", "output": ["best", "second", "worst"]},
        "ranking",
    ),
    "dpo by type": (
        {
            "columns": {
                "instruction": "instruction",
                "input": "input",
                "chosen": "chosen",
                "rejected": "rejected",
            },
            "type": "dpo",
        },
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        "pair",
    ),
    "ppo prompts from sft data": (
        {"type": "sft"},
        {"instruction": "q", "input": "", "output": "a"},
        "prompt",
    ),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("style", ["array", "lines", "one after another"])
def test_registrations_of_published_guides_work_as_they_stand(tmp_path, name, style):
    entry, row, kind = GUIDES[name]
    rows = [json.loads(json.dumps(row).replace('"q"', f'"q{i}"')) for i in range(3)]
    text = {
        "array": json.dumps(rows),
        "lines": "\n".join(map(json.dumps, rows)),
        "one after another": "\n".join(json.dumps(r, indent=1) for r in rows),
    }[style]
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    write_registry(tmp_path, {"mine": {"file_name": "rows.json", **entry}})
    assert len(load_examples(["mine"], kind=kind, dataset_dir=tmp_path).train) == 3
