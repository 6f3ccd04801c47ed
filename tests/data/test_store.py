"""Well-known sets by short name, and the copies of what was fetched."""

from __future__ import annotations

import pytest

from trueup.data.catalog import ALIASES, CATALOG, find
from trueup.data.fetching import fetch_dataset
from trueup.data.inventory import inventory
from trueup.data.load import load_examples
from trueup.data.registry import resolve_datasets, well_known
from trueup.data.sources import read_rows
from trueup.data.store import find_copy
from trueup.errors import ConfigError, ModelError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
WORSE = [TURNS[0], {"role": "assistant", "content": "What?"}]
ULTRAFEEDBACK = {
    "prompt": "Hi",
    "prompt_id": "7",
    "chosen": TURNS,
    "rejected": WORSE,
    "messages": TURNS,
    "score_chosen": 9.0,
    "score_rejected": 2.0,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """A hub that has rows by (id, subset, split), and the requests it got."""
    from datasets import Dataset

    rows, asked = {}, []

    def load_dataset(path, *, name, split, **options):
        asked.append((path, name, split))
        if asked[-1] not in rows:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub")
        return Dataset.from_list(rows[asked[-1]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return rows, asked


def test_every_entry_of_the_catalogue_resolves_on_each_of_its_hubs():
    for name, known in CATALOG.items():
        assert known.hubs
        for hub in known.hubs:
            spec = well_known(name, hub)
            assert (spec.hub, spec.catalogue) == (hub, name) and spec.hub_id and spec.kind
    assert set(ALIASES.values()) <= CATALOG.keys() and not ALIASES.keys() & CATALOG.keys()


def test_a_well_known_set_is_found_by_its_name_another_name_and_its_id():
    for name in ("orca_dpo", "orca_pairs", "Intel/orca_dpo_pairs"):
        assert find(name)[0] == "orca_dpo"
    assert find("nothing_like_it") is None


def test_on_another_hub_a_set_may_have_another_shape():
    assert well_known("ultrafeedback").split == "train_prefs"
    there = well_known("ultrafeedback", "modelscope")
    assert (there.hub_id, there.split) == ("llamafactory/ultrafeedback_binarized", "train")
    assert there.columns["prompt"] == "instruction"


def test_what_was_fetched_is_used_by_name_without_a_hub(hub):
    rows, asked = hub
    rows["HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"] = [ULTRAFEEDBACK] * 3
    fetched = fetch_dataset("ultrafeedback", "huggingface", None, "data", force=False)
    assert fetched.new and fetched.copy.rows == 3 and fetched.copy.file.is_file()
    asked.clear()
    assert not fetch_dataset("ultrafeedback", "huggingface", None, "data", force=False).new
    (pair, *_) = load_examples(["ultrafeedback"], kind="pair").train
    assert [m.content for m in (*pair.prompt, *pair.chosen, *pair.rejected)] == ["Hi", "Hello!", "What?"]
    assert not asked
    item = next(item for item in inventory().items if item.name == "ultrafeedback")
    assert item.copy and item.kind == "pair"


def test_a_copy_from_one_hub_serves_a_config_of_another(hub):
    rows, _ = hub
    rows["HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"] = [ULTRAFEEDBACK]
    fetch_dataset("ultrafeedback", "huggingface", None, "data", force=False)
    (spec,) = resolve_datasets(["ultrafeedback"], "data", "modelscope")
    assert spec.hub == "huggingface" and len(read_rows(spec)) == 1


def test_two_subsets_are_read_one_after_the_other(hub):
    rows, _ = hub
    turn = {"conversations": [{"from": "human", "value": "Hi"}]}
    sides = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    for subset in ("en", "zh"):
        rows["hiyouga/DPO-En-Zh-20k", subset, "train"] = [{**turn, **sides, "lang": subset}]
    (spec,) = resolve_datasets(["dpo_en_zh"])
    assert [row["lang"] for row in read_rows(spec)] == ["en", "zh"]


def test_a_copy_may_lie_where_the_user_wants_it_and_is_missed_when_it_goes(hub, tmp_path):
    rows, _ = hub
    rows["owner/name", None, "train"] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    fetched = fetch_dataset("owner/name", "huggingface", tmp_path / "sets", "data", force=False)
    assert fetched.copy.file == tmp_path / "sets" / "name.parquet"
    (spec,) = resolve_datasets(["owner/name"])
    assert find_copy(spec) == fetched.copy
    fetched.copy.file.unlink()
    assert find_copy(spec) is None


def test_your_own_registry_wins_over_the_catalogue(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"ultrafeedback": {"file_name": "mine.json"}}')
    (spec,) = resolve_datasets(["ultrafeedback"])
    assert spec.source and spec.source.name == "mine.json"


def test_c17_offline_it_says_how_to_get_a_copy(hub):
    for act in (
        lambda: fetch_dataset("orca_dpo", "huggingface", None, "data", force=False),
        lambda: load_examples(["orca_dpo"], kind="pair"),
    ):
        with pytest.raises(ModelError) as caught:
            act()
        (problem,) = caught.value.problems
        assert "cannot be reached" in problem.what
        assert "trueup data get orca_dpo" in problem.fix


def test_a_hub_that_does_not_have_it_is_refused_when_it_was_asked_for():
    with pytest.raises(ConfigError, match="not known to be on modelscope"):
        fetch_dataset("orca_dpo", "modelscope", None, "data", force=False, asked=True)


def test_a_mistyped_name_is_told_the_near_one():
    with pytest.raises(ConfigError, match="did you mean 'ultrafeedback'"):
        resolve_datasets(["ultrafedback"])


def test_a_bundled_sample_is_on_no_hub():
    with pytest.raises(ConfigError, match="is on no hub"):
        fetch_dataset("dpo_en_demo", "huggingface", None, "data", force=False)


def test_a_broken_entry_does_not_hide_the_others(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        '{"bad": {"file": "x"},\n "gone": {"file_name": "no.json"},\n "good": {"file_name": "a.jsonl"}}'
    )
    (tmp_path / "data" / "a.jsonl").write_text('{"instruction": "a", "output": "b", "label": true}\n')
    bad, gone, good = (item for item in inventory().items if item.group == "registry")
    assert bad.problem and gone.problem and gone.origin.endswith("dataset_info.json:2")
    assert (good.kind, good.rows, good.problem) == ("feedback", 1, None)
