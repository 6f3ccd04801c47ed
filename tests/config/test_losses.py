"""The table of losses agrees with the registered objectives, with the docs, and with what a config makes of it."""

from __future__ import annotations

import pytest
from tests.conftest import ROOT

from trueup.config import tables
from trueup.config.load import dump_yaml, load_config
from trueup.config.losses import LOSSES_OF_KEY, PREF_LOSSES, STAGE_LOSSES, pref_losses
from trueup.config.methods import needs_reference
from trueup.config.values import words
from trueup.errors import ConfigError
from trueup.objectives import OBJECTIVES

BASE = {"model_name_or_path": "m", "dataset": "d"}
KNOWN = [name for name, loss in PREF_LOSSES.items() if not loss.instead]


def stage_of(loss: str) -> str:
    return "kto" if loss in STAGE_LOSSES["kto"] else "dpo"


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "sft"])
def test_a_loss_reads_the_keys_that_its_row_says(name):
    objective = OBJECTIVES[name]
    assert sorted(objective.parameters.values()) == sorted(words(PREF_LOSSES[name].keys))
    assert objective.needs_reference == PREF_LOSSES[name].reference


def test_the_page_of_keys_is_current():
    assert (ROOT / "docs/objectives/keys.md").read_text(encoding="utf-8") == tables.page()


@pytest.mark.parametrize("name", KNOWN)
def test_every_loss_has_its_place_in_the_docs(name):
    pages = (ROOT / "docs/objectives").glob("*.md")
    assert any(f"### {name}\n" in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("name", KNOWN)
def test_a_loss_loads_with_its_papers_values_and_again_from_what_it_resolved_to(name, tmp_path):
    cfg = load_config({**BASE, "stage": stage_of(name), "pref_loss": name})
    for key, value in PREF_LOSSES[name].defaults.items():
        assert cfg[key] == value
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(cfg), encoding="utf-8")
    assert load_config(file).resolved() == cfg.resolved()


@pytest.mark.parametrize("stage", STAGE_LOSSES)
def test_a_stage_trains_its_own_loss(stage):
    cfg = load_config({**BASE, "stage": stage})
    assert pref_losses(cfg) == [STAGE_LOSSES[stage][0]]
    assert needs_reference(cfg) == PREF_LOSSES[STAGE_LOSSES[stage][0]].reference


def test_what_the_user_sets_wins_over_a_papers_value():
    assert load_config({**BASE, "stage": "simpo", "beta": 0.7}).objective.pref_beta == 0.7
    assert load_config({**BASE, "stage": "cpo", "cpo_alpha": 0.0}).objective.pref_ftx == 0.0


@pytest.mark.parametrize(
    "written", ["sigmoid,bco_pair,sft", "[sigmoid, bco_pair, sft]", ["sigmoid", "bco_pair", "sft"]]
)
def test_several_losses_however_they_are_written(written):
    cfg = load_config({**BASE, "stage": "dpo", "loss_type": written, "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1})
    assert pref_losses(cfg) == ["sigmoid", "bco_pair", "sft"]
    assert cfg.objective.loss_weights == [0.8, 0.2, 1.0]


@pytest.mark.parametrize("key", LOSSES_OF_KEY)
def test_a_key_of_single_losses_is_refused_with_the_others(key):
    others = [name for name in KNOWN if name not in LOSSES_OF_KEY[key] and name != "sft"]
    value = "js_divergence" if key == "f_divergence_type" else 0.3
    for name in others:
        with pytest.raises(ConfigError, match=f"`{key}` has no effect"):
            load_config({**BASE, "stage": stage_of(name), "pref_loss": name, key: value})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stage": "orpo", "pref_loss": "sigmoid"}, "does not train this `pref_loss`"),
        ({"stage": "kto", "pref_loss": "ipo"}, "does not train this `pref_loss`"),
        ({"stage": "dpo", "pref_loss": "kto"}, "does not train this `pref_loss`"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, "not supported"),
        ({"stage": "dpo", "pref_loss": "sigmoid,sigmoid"}, "names a loss twice"),
        ({"stage": "kto", "pref_loss": "kto,bco"}, "only `stage: dpo` adds up"),
        ({"stage": "dpo", "pref_loss": "sigmoid,sft", "loss_weights": 1}, "one number for each loss"),
        ({"stage": "dpo", "pref_loss": "sigmoid,sft", "loss_weights": "0,1"}, "first loss counts"),
        ({"stage": "dpo", "pref_loss": "exo_pair", "dpo_label_smoothing": 0}, "takes the logarithm"),
        ({"stage": "dpo", "pref_loss": "bco_pair", "pref_bco_weight": 1}, "has it already"),
        ({"stage": "dpo", "pref_loss": "sigmoid,sft", "pref_ftx": 1}, "has it already"),
        ({"stage": "dpo", "pref_loss": "sigmoid,robust"}, "set pref_beta"),
        ({"stage": "dpo", "pref_loss": "sigmoid,exo_pair"}, "set dpo_label_smoothing"),
        ({"stage": "dpo", "pref_loss": "simpo,alphapo", "pref_beta": 2}, "set simpo_gamma"),
        ({"stage": "dpo", "pref_loss": "sft", "use_weighting": True}, "`use_weighting` has no effect"),
        ({"stage": "dpo", "pref_loss": "ipo,sigmoid", "ld_alpha": 0.5}, "means per token"),
        ({"stage": "dpo", "sync_ref_model": True, "ref_model": "r"}, "another model"),
        ({"stage": "dpo", "sync_ref_model": True, "precompute_ref_log_probs": True}, "run in every step"),
        ({"stage": "dpo", "pref_loss": "tdpo2", "precompute_ref_log_probs": True}, "run in every step"),
        ({"stage": "dpo", "pref_loss": "ipo", "ld_alpha": 0.5}, "`ld_alpha` has no effect"),
        ({"stage": "dpo", "ld_reference": False}, "`ld_reference` has no effect"),
        ({"stage": "simpo", "ref_model": "r"}, "`ref_model` has no effect"),
        ({"stage": "dpo", "pref_loss": "sigmoyd"}, "is unknown"),
        ({"stage": "dpo", "pref_loss": "sigmoid,sigmoyd"}, "is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        load_config({**BASE, **keys})


def test_losses_that_agree_keep_their_papers_values_in_any_order():
    for names in ("cpo,sigmoid", "sigmoid,cpo"):
        assert load_config({**BASE, "stage": "dpo", "pref_loss": names}).objective.pref_ftx == 1.0
    assert load_config({**BASE, "stage": "dpo", "pref_loss": "cpo,sft"}).objective.pref_ftx == 0.0
    assert load_config({**BASE, "stage": "dpo", "pref_loss": "nca_pair,bco_pair"}).objective.pref_beta == 0.01


def test_a_reference_that_moves_or_is_compared_whole_runs_in_every_step():
    for keys in ({"sync_ref_model": True}, {"pref_loss": "tdpo1"}):
        assert not load_config({**BASE, "stage": "dpo", **keys}).objective.precompute_ref_log_probs
    assert load_config({**BASE, "stage": "dpo", "sync_ref_model": True}).objective.pref_beta == 0.05
