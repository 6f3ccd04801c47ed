"""Every key of LLaMA-Factory acts, which a test shows, or is refused with its reason; the page on them is current."""

from __future__ import annotations

import ast
import functools

import pytest
from tests.config import llamafactory
from tests.conftest import ROOT

from trueup.config.load import load_config
from trueup.config.methods import OTHER_VERBS
from trueup.config.names import SWITCHES, SYNONYMS
from trueup.config.schema import FIELDS, is_flag
from trueup.config.standing import standing
from trueup.errors import ConfigError

KEYS = llamafactory.defaults()
TEXT = [name for name in KEYS if llamafactory.of_text(name)]
ACTING = [name for name in TEXT if standing(name).state == "acts"]
REFUSED = [name for name in KEYS if standing(name).state == "refused"]


@functools.cache
def source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def functions_of(path: str) -> set[str]:
    return {node.name for node in ast.parse(source(path)).body if isinstance(node, ast.FunctionDef)}


def test_the_page_is_current():
    assert (ROOT / "docs/llamafactory.md").read_text(encoding="utf-8") == llamafactory.page()


@pytest.mark.parametrize("name", ACTING)
def test_a_key_that_acts_has_a_test_that_names_it(name):
    path, _, test = llamafactory.proofs()[name].partition("::")
    ours = SYNONYMS.get(name, SWITCHES.get(name, (name,))[0])
    assert test in functions_of(path)
    assert name in source(path) or ours in source(path)


def test_what_holds_anyway_says_why():
    silent = [name for name in TEXT if standing(name).state == "holds anyway" and not standing(name).words]
    assert not silent


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_key_stops_the_run_and_says_why(name):
    with pytest.raises(ConfigError) as caught:
        load_config({"model_name_or_path": "m", "dataset": "d", name: another_value(name)}, verb=verb_of(name))
    said = [problem for problem in caught.value.problems if f"`{name}`" in problem.what]
    assert said and all(problem.fix or ": " in problem.what for problem in said)


def verb_of(name: str) -> str:
    return "infer" if name in OTHER_VERBS and name != "length_penalty" else "train"


def another_value(name: str):
    """One that is not LLaMA-Factory's default."""
    default = KEYS[name]
    if default in ("True", "False") or (name in FIELDS and is_flag(name)):
        return default != "True"
    special = {
        "rope_scaling": "yarn", "infer_dtype": "float16", "init_special_tokens": "desc_init",
        "galore_proj_type": "left", "apollo_proj": "svd", "apollo_proj_type": "left", "apollo_scale_type": "tensor",
        "oft_target": "q_proj", "galore_target": "q_proj", "apollo_target": "q_proj",
        "quantization_device_map": "auto", "ray_init_kwargs": {"a": 1}, "module_dropout": 0.5,
    }  # fmt: skip
    if name in special:
        return special[name]
    try:
        return type(ast.literal_eval(default))(ast.literal_eval(default) + 1)
    except (ValueError, SyntaxError, TypeError):
        return 2
