"""Drafts: written down as a command and as YAML they are the same run; ids and paths stay inside."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from trueup.config.load import load_config  # noqa: E402
from trueup.config.methods import STAGES  # noqa: E402
from trueup.config.schema import FIELDS  # noqa: E402
from trueup.errors import ConfigError  # noqa: E402
from trueup.rollout.worker import BUILT_IN  # noqa: E402
from trueup.web import forms  # noqa: E402
from trueup.web.draft import Draft, word_of  # noqa: E402
from trueup.web.found import BUILT_IN_REWARDS, found_here  # noqa: E402
from trueup.web.workspace import Workspace, check_id, inside  # noqa: E402

OUTWARD = [
    "..", "../x", "a/../../x", "/etc/passwd", "%2e%2e/x", "%252e%252e/x", "a\\..\\x", "a\0b", "C:/x", "．．/x", "a／b",
    "", "a//b", ".hidden", "a/.", "x\n", "x.", "a/ /b", "\u202ex",
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_command_and_yaml_are_the_same_run(stage: str, tmp_path: Path):
    draft = Draft.new(stage, "builtin:sql-tiny")
    words = shlex.split(draft.command().replace("\\\n", " "))
    assert words[:2] == ["trueup", "train"]
    file = tmp_path / "run.yaml"
    file.write_text(draft.yaml(), encoding="utf-8")
    assert load_config(None, words[2:]).resolved() == load_config(file).resolved()
    assert Draft.unpack(draft.pack()).values == draft.values


@pytest.mark.parametrize("value", [True, 1e-5, ["a", "b"], ["a,b"], {"a": 1}, "--x", "$(touch pwned)", "a b", "; ls"])
def test_any_value_survives_a_shell(value):
    draft = Draft({"run_name": word_of(value)})
    assert shlex.split(draft.command().replace("\\\n", " "))[2:] == draft.words()


def test_every_key_of_the_schema_can_be_reached_and_a_new_one_too(monkeypatch: pytest.MonkeyPatch):
    def reachable() -> set[str]:
        return {key.name for keys in forms.others().values() for key in keys} | forms._FRONT_KEYS

    assert reachable() == set(FIELDS)
    for table in (FIELDS, forms.SECTION_OF, forms._SCHEMA):
        monkeypatch.setitem(table, "brand_new_key", table["run_name"])
    assert "brand_new_key" in reachable()


def test_rope_scaling_stands_in_front_and_offers_its_kinds():
    (key,) = (key for key in forms.front("model", Draft.new("dpo", "m").lenient()) if key.name == "rope_scaling")
    assert key.kind == "choice" and {"linear", "yarn", "llama3"} <= set(key.choices)


def test_problems_are_told_at_their_key(tmp_path: Path):
    draft = Draft({**Draft.new("dpo", "builtin:sql-tiny").values, "learning_rate": "-1", "pref_beta": "x"})
    checked = draft.check(Workspace(tmp_path))
    assert checked.cfg is None
    assert "greater than 0" in checked.of("learning_rate") and checked.of("pref_beta")
    assert not checked.of("lora_rank")


@pytest.mark.parametrize("path", ["/etc", "../x", "~/x", "file:///etc/passwd", "a/../../x", "%2e%2e/x"])
def test_configs_name_nothing_outside(tmp_path: Path, path: str):
    values = Draft.new("dpo", "builtin:sql-tiny").values
    for key in ("dataset", "model_name_or_path", "output_dir"):
        assert Draft({**values, key: path}).check(Workspace(tmp_path)).cfg is None, key


def test_reward_functions_are_those_of_files_that_are_there(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("def score(prompts, completions):\n    return []\n", encoding="utf-8")
    place = Workspace(tmp_path)
    draft = Draft.new("grpo", "builtin:sql-tiny")
    assert draft.check(place).cfg is not None
    draft.values["reward_funcs"] = "rewards.py:other"
    assert "no function" in draft.check(place).of("reward_funcs")
    assert set(BUILT_IN_REWARDS) == set(BUILT_IN)
    assert found_here("reward_funcs", place, {}) == ["rewards.py:score", *BUILT_IN_REWARDS]


@pytest.mark.parametrize("name", OUTWARD)
def test_ids_lead_nowhere_else(tmp_path: Path, name: str):
    with pytest.raises(ConfigError):
        inside(tmp_path, name)


def test_links_lead_nowhere_else_and_what_is_removed_is_kept(tmp_path: Path):
    area = tmp_path / "saves"
    area.mkdir()
    (area / "out").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        inside(area, "out/x")
    check_id("模型/lora/dpo-2")
    place = Workspace(tmp_path)
    (area / "run").mkdir()
    gone = place.trash(area / "run")
    assert gone.is_dir() and not (area / "run").exists()
    with pytest.raises(ConfigError):
        place.trash(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("stage: dpo\nlerning_rate: 1\n", "mine:2: unknown key"), ("stage: [dpo\n", "mine:2"), ("", "sets no key")],
)
def test_a_file_that_is_brought_loses_nothing_without_a_word(tmp_path: Path, text: str, said: str):
    file = tmp_path / "brought.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        Draft.read(file, "mine")
    file.write_text(text + "on_unused_keys: warn\n" if "lerning" in text else "lr: 1e-4\n", encoding="utf-8")
    assert Draft.read(file).values
