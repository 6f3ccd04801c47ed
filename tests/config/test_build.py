"""What `trueup data build` reads of a config, what unset keys mean there, and what it refuses."""

from __future__ import annotations

import re

import pytest
import yaml

from trueup.config.building import READ_WITH
from trueup.config.load import load_config
from trueup.config.schema import FIELDS
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "builtin:sql-tiny", "dataset": "d", "rule_min_chars": 3}


def build(**keys):
    return load_config({k: v for k, v in {**BASE, **keys}.items() if v is not None}, verb="build")


def problems(**keys) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**keys)
    return "\n".join(map(str, caught.value.problems))


def test_unset_keys_mean_four_plain_samples_ranked_by_what_is_there():
    cfg = build()
    assert (cfg.online.num_generations, cfg.generate.temperature, cfg.generate.top_k) == (4, 1.0, 0)
    assert (cfg.build.rank_by, cfg.train.output_dir) == ("scores", "saves/sql-tiny/build")
    assert build(rule_min_chars=None, judge_model="http://h/v1#m").build.rank_by == "judge"
    assert build(model_name_or_path=None, sample_from="http://h/v1#m").train.output_dir == "saves/m/build"


def test_keys_of_trainings_do_nothing_here():
    said = problems(learning_rate=1e-3, stage="sft", eval_dataset="e", ref_model="r")
    for key in ("learning_rate", "stage", "eval_dataset"):
        assert f"`{key}` does nothing in `trueup data build`" in said
    assert "`ref_model` has no effect with `rank_by: scores`" in said


def test_and_its_own_keys_do_nothing_in_a_training():
    with pytest.raises(ConfigError, match="`judge_mode` does nothing in training: it belongs to `trueup data build`"):
        load_config({"model_name_or_path": "m", "dataset": "d", "judge_mode": "scores"})


def test_unused_keys_can_be_let_pass(caplog):
    assert build(learning_rate=1e-3, on_unused_keys="warn")
    assert "`learning_rate` does nothing" in caplog.text


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"model_name_or_path": None}, "nobody answers"),
        ({"dataset": None}, "there are no prompts"),
        ({"rule_min_chars": None}, "nobody says which answer is better"),
        ({"rank_by": "judge", "rule_min_chars": None}, "needs a judge"),
        ({"rank_by": "scores", "rule_min_chars": None}, "needs something that scores"),
        ({"num_generations": 1}, "cannot be compared"),
        ({"temperature": 0}, "are the same"),
        ({"sample_from": "a"}, "`model_name_or_path` has no effect with `sample_from`"),
        ({"model_name_or_path": None, "sample_from": "a,a"}, "names a model twice"),
        ({"model_name_or_path": None, "sample_from": "http://h/v1"}, "without its model"),
        ({"request_tries": 3}, "no endpoint is asked"),
        ({"rule_max_chars": 2}, "no answer keeps both"),
        ({"rule_regex": "("}, "cannot be read"),
        ({"judge_mode": "scores"}, "has no effect with `rank_by: scores`"),
        ({"rule_sql_schema": "s.sql"}, "has no effect with no `rule_format`"),
        ({"max_length_ratio": 0.5}, "at least 1"),
        ({"quantization_bit": 5}, "in so many bits"),
        ({"model_name_or_path": None, "sample_from": "http://h#m", "template": "qwen"}, "only endpoints are asked"),
        ({"judge_model": "http://me:secret@h/v1#m", "rule_min_chars": None}, "a name or a password"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys, what):
    assert what in problems(**keys)


def test_every_key_read_is_a_key():
    assert set(READ_WITH) <= set(FIELDS)
    assert {other for needs in READ_WITH.values() for other in needs} <= set(FIELDS)


def test_the_page_on_building_shows_configs_that_load(root, monkeypatch):
    page = (root / "docs" / "build-preferences.md").read_text(encoding="utf-8")
    monkeypatch.setenv("JUDGE_API_KEY", "k")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert load_config(yaml.safe_load(block), verb="build").build.rank_by == "judge"
    first, second = (line.split()[1:] for line in re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines())
    assert first[:2] == ["data", "build"] and load_config(root / first[2], first[3:], verb="build")
    assert load_config(root / second[1], second[2:]).train.max_steps == 24
    named = set(
        re.findall(r"`((?:rule|judge|sample|request|reward|build|min|max|rank|register)_\w+)(?::[^`]*)?`", page)
    )
    assert named - {"rule_"} <= set(FIELDS)
