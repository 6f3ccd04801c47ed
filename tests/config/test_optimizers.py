"""LLaMA-Factory's switches mean transformers' optimizers; a saved config means the same when it is read again."""

from __future__ import annotations

import pytest

from trueup.config.load import load_config
from trueup.config.optimizers import LORA_PLUS_EMBEDDINGS

BASE = {"model_name_or_path": "m", "dataset": "d", "stage": "sft"}
FULL = {**BASE, "finetuning_type": "full"}


@pytest.mark.parametrize(
    "keys, optim, said",
    [
        ({"use_galore": True, "galore_rank": 4}, "galore_adamw", "rank=4,"),
        ({"use_galore": True, "optim": "adafactor"}, "galore_adafactor", "rank=16,"),
        ({"use_apollo": True, "apollo_scale_front": True}, "apollo_adamw", "scale_front=true"),
        ({"use_muon": True}, "muon", None),
        ({"use_adam_mini": True, "optim": "adamw_torch"}, "adam_mini", None),
    ],
)
def test_a_switch_means_an_optimizer(keys, optim, said):
    cfg = load_config({**FULL, **keys})
    assert cfg.train.optim == optim
    assert (said in cfg.train.optim_args) if said else cfg.train.optim_args is None
    again = load_config(cfg.resolved())
    assert again.resolved() == cfg.resolved()


def test_a_schedule_free_optimizer_keeps_its_rate():
    assert load_config({**BASE, "optim": "schedule_free_adamw"}).train.lr_scheduler_type == "constant"


def test_lora_plus_is_a_rate_for_the_second_matrices():
    keys = {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-5, "learning_rate": 1e-4}
    cfg = load_config({**BASE, **keys})
    multipliers = cfg.train.lr_multipliers
    assert multipliers[r"\.lora_B\."] == 16 and multipliers[LORA_PLUS_EMBEDDINGS] == pytest.approx(0.1)
    assert load_config(cfg.resolved()).train.lr_multipliers == cfg.train.lr_multipliers
