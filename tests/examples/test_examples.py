"""Every example is read, fits the card it is written for, and trains on a tiny model of its architecture.

A model's name is a directory of that name in the working directory: nothing of a file is changed but sizes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.examples.models import MODELS, shape_of, tiny
from trueup.config.load import load_config
from trueup.config.methods import stage_kind
from trueup.errors import ModelError
from trueup.models import logprobs
from trueup.models.adapters import attach_trained
from trueup.models.estimate import without_weights
from trueup.models.load import unfreeze
from trueup.models.memory import head_bytes, layer_costs, optimizer_bytes
from trueup.models.policy import Policy
from trueup.models.quantise import expected_bytes
from trueup.models.tuners import adapter_config
from trueup.recipes.run import run

FILES = {path.stem: path for folder in ("cards", "guides") for path in (ROOT / "examples" / folder).glob("*.yaml")}
#: one of each kind of architecture, of method and of base; the others with `make prove`.
TRIED = (
    "8gb_qwen3_4b_qlora_dpo", "16gb_chatglm3_6b_qlora_sft", "24gb_baichuan2_7b_lora_sft", "24gb_llama3.1_8b_lora_dpo",
    "80gb_deepseek_v2_lite_lora_sft", "pipeline_2_sft",
)  # fmt: skip
SMALLER = {
    "max_steps": 2, "cutoff_len": 512, "max_samples": 8, "per_device_train_batch_size": 1, "device": "cpu",
    "gradient_accumulation_steps": 1, "plot_loss": False,
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUEUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def train(path: Path):
    """Two steps of an example, after two of each that it stands on."""
    cfg = load_config(path)
    for name in (cfg.model.model_name_or_path, *cfg.model.adapter_name_or_path, cfg.online.reward_model):
        if name and name.startswith("saves/"):
            if not Path(name).exists():
                train(next(p for p in FILES.values() if load_config(p).train.output_dir == name))
        elif name:
            tiny(name, Path(name))
    keys = SMALLER | ({"max_new_tokens": 4} if cfg.objective.stage == "ppo" else {})
    keys |= (
        {}
        if cfg.objective.stage in ("pt", "sft", "rm", "kto") or not cfg.train.do_train
        else {"regression_report": False}
    )
    return run(load_config(path, keys=keys if cfg.train.do_train else {"cutoff_len": 512, "device": "cpu"}))


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_an_example_says_nothing_that_has_no_effect(path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "trueup"):
        cfg = load_config(path)
    assert caplog.messages == []
    assert cfg.model.model_name_or_path in MODELS or cfg.model.model_name_or_path.startswith("saves/")
    assert cfg.model.trust_remote_code == bool(MODELS.get(cfg.model.model_name_or_path) and
                                               MODELS[cfg.model.model_name_or_path].remote)  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_an_example_trains_on_a_tiny_model_of_its_architecture(work: Path, name: str):
    trains(name)


@pytest.mark.prove
@pytest.mark.parametrize("name", sorted(FILES.keys() - set(TRIED)))
def test_so_do_all_others(work: Path, name: str):
    trains(name)


def trains(name: str) -> None:
    if "qlora" in name or "unsloth" in name:
        pytest.importorskip("bitsandbytes")
    result = train(FILES[name])
    assert (result.output_dir / "status.json").is_file()
    numbers = [value for key, value in result.metrics.items() if key.endswith("loss")]
    assert numbers and all(torch.tensor(numbers).isfinite())


# --- sizes -----------------------------------------------------------------------------------------

CARDS = {name: path for name, path in FILES.items() if path.parent.name == "cards"}
CONTEXT = 0.6e9  # bytes that CUDA itself takes


@pytest.mark.parametrize("name", ["80gb_qwen2.5_3b_full_dpo", "24gb_llama3.1_8b_lora_dpo", "8gb_phi4_mini_qlora_sft"])
def test_an_example_fits_its_card_with_prompts_and_answers_as_long_as_it_allows(name: str, tmp_path, monkeypatch):
    fits(name, tmp_path, monkeypatch)


@pytest.mark.prove
@pytest.mark.parametrize("name", CARDS)
def test_so_does_every_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fits(name, tmp_path, monkeypatch)


def fits(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimate that `trueup check` prints: micro-batches of `cutoff_len`, all layers recomputing if need be."""
    cfg = load_config(FILES[name])
    card = int(name.split("gb")[0]) * 2**30 if "gb" in name else 16 * 2**30
    monkeypatch.setattr(logprobs, "total_memory", lambda device: card)
    device = torch.device("cuda" if "gb" in name else "cpu")
    base = without_weights(shape_of(str(cfg.model.model_name_or_path), directory), cfg.model).requires_grad_(False)
    weights = expected_bytes(base, cfg.model, torch.bfloat16)
    if cfg.tuning.finetuning_type == "lora":
        attach_trained(base, adapter_config(cfg.tuning, base, Policy), [], "shapes")
    else:
        unfreeze(base, cfg.tuning)
    answers = 1.6 if stage_kind(cfg) == "pair" else 1.0  # two, beside one prompt
    costs = layer_costs(base, cfg.tuning, torch.bfloat16, device)
    tokens = int(answers * cfg.data.cutoff_len * cfg.train.per_device_train_batch_size)
    kept = optimizer_bytes(base, cfg.train, torch.bfloat16, device) + head_bytes(base, torch.bfloat16, device)
    assert weights + kept + costs.needed(tokens, costs.layers) <= 0.85 * (card - CONTEXT)


def test_code_of_a_repository_runs_only_after_consent(work: Path):
    tiny("zai-org/chatglm3-6b", Path("zai-org/chatglm3-6b"))
    with pytest.raises(ModelError, match="code"):
        run(load_config(FILES["16gb_chatglm3_6b_qlora_sft"], keys=SMALLER | {"trust_remote_code": False}))
