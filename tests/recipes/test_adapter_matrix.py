"""Every adapter over every kind of base in every kind of stage: it starts as its reference, learns, goes on from a
checkpoint to the bit, and is folded into the model it was trained for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.recipes.test_equivalence import program_of, step
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.inference.model import Model
from trueup.models.load import load_base
from trueup.models.merging import Combination, load_beside
from trueup.models.policy import Policy
from trueup.models.quantise import is_quantised
from trueup.models.reward import RewardModel
from trueup.recipes.program import OfflineProgram
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
CPU = torch.device("cpu")
PLAIN = {"device": "cpu", "bf16": False}

KINDS: dict[str, dict] = {
    "lora": {"lora_dropout": 0.1},
    "rslora, all-linear by a pattern": {"use_rslora": True, "lora_target": r".*\.(q|v)_proj"},
    "lora+": {"loraplus_lr_ratio": 8.0},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "embeddings too": {"additional_target": "embed_tokens"},
    "new rows": {"add_tokens": "<new>,two", "resize_vocab": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True, "pissa_iter": 4},
    "loftq": {"loftq_init": True},
    "oft": {"finetuning_type": "oft", "lora_rank": None, "oft_block_size": 8, "module_dropout": 0.1},
    "ia3": {"finetuning_type": "ia3", "lora_rank": None},
}
BASES: dict[str, dict] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "4 bits": {"quantization_bit": 4},
    "8 bits": {"quantization_bit": 8},
}
STAGES: dict[str, dict] = {
    "sft": {"stage": "sft", "dataset": "chats"},
    "dpo": {"stage": "dpo"},
    "kto": {"stage": "kto", "dataset": "labels"},
    "rm": {"stage": "rm"},
}
#: How far a logit or a score of the merged model may be from that of base + adapter, in fp32.
FOLDED = 1e-4


def has_sense(kind: str, base: str) -> bool:
    """PiSSA changes weights, LoftQ wants quantised ones, and quantised embeddings cannot train whole."""
    quantised = "quantization_bit" in BASES[base]
    return {"pissa": not quantised, "loftq": quantised}.get(kind, True)


CELLS = [cell for cell in itertools.product(KINDS, BASES, STAGES) if has_sense(cell[0], cell[1])]
#: A few for every day.
FEW = [("dora", "4 bits", "dpo"), ("pissa", "bf16", "kto"), ("oft", "8 bits", "rm")]


@pytest.mark.parametrize("kind, base, stage", FEW)
def test_an_adapter_starts_as_its_reference_learns_resumes_and_merges(kind, base, stage, config, tmp_path, monkeypatch):
    check(kind, base, stage, config, tmp_path, monkeypatch)


@pytest.mark.prove
@pytest.mark.parametrize("kind, base, stage", CELLS)
def test_every_adapter_over_every_base_in_every_stage(kind, base, stage, config, tmp_path, monkeypatch):
    check(kind, base, stage, config, tmp_path, monkeypatch)


def check(kind: str, base: str, stage: str, config: Config, tmp_path: Path, monkeypatch) -> None:
    if "quantization_bit" in BASES[base]:
        pytest.importorskip("bitsandbytes")
    rate = {"ia3": 3e-2, "oft": 3e-3}.get(kind, 3e-3)
    keys = {
        **STAGES[stage], **BASES[base], **KINDS[kind], "per_device_train_batch_size": 24, "max_steps": 4,
        "learning_rate": rate, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    starts_as_its_reference(config(**keys))
    first, again = tmp_path / "first", tmp_path / "again"
    trained = spied(monkeypatch)
    run(config(**keys, output_dir=str(first)))
    acts_as_it_was_trained(config(**keys), first, trained["logits"])
    losses = [row["loss"] for row in read_lines(first / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0], losses  # each step sees every row
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=str(first / "checkpoint-2")))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    is_folded_into_its_base(config(**keys), first, tmp_path / "merged")


def starts_as_its_reference(cfg: RunConfig) -> None:
    """The trained model before its first step is what it is measured against."""
    program = program_of(cfg)
    assert program.adapters is not None
    if cfg.objective.stage in ("dpo", "kto"):
        _, metrics, _ = step(program)
        rewards = {
            metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margins") if f"rewards/{name}" in metrics
        }
        assert rewards and max(map(abs, rewards)) < 1e-6, metrics
        return
    trained = logits_of(program.policy)
    with program.adapters.as_reference():
        torch.testing.assert_close(logits_of(program.policy), trained, atol=1e-6, rtol=0)


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the policy in memory answers when it was saved last."""
    seen, save = {}, OfflineProgram.save_model

    def spy(self: OfflineProgram, directory: Path, masters) -> None:
        save(self, directory, masters)
        seen["logits"] = logits_of(self.policy)

    monkeypatch.setattr(OfflineProgram, "save_model", spy)
    return seen


@torch.no_grad()
def logits_of(policy: Policy) -> torch.Tensor:
    """Of every token of a text; of a reward model the score of one."""
    before = policy.model.training
    policy.model.eval()
    with policy.generating():
        if isinstance(policy, RewardModel):
            found = policy([range(3, 20)], [range(20, 40)])
        else:
            found = policy.model(input_ids=torch.arange(3, 40)[None]).logits
    policy.model.train(before)
    return found.float().cpu()


def acts_as_it_was_trained(cfg: RunConfig, adapter: Path, trained: torch.Tensor) -> None:
    """What was saved, on the base it was trained on, is the policy that was in memory."""
    loaded = loaded_with(cfg, adapter, bf16=cfg.train.bf16, quantization_bit=cfg.model.quantization_bit)
    found = logits_of(loaded.policy)
    exactness = 0.05 if cfg.train.bf16 else 1e-4
    torch.testing.assert_close(found, trained, atol=exactness * float(trained.abs().max()), rtol=0)


def loaded_with(cfg: RunConfig, adapter: Path, **keys) -> Model:
    base = {"model_name_or_path": str(cfg.model.model_name_or_path), "adapter_name_or_path": str(adapter)}
    return Model(load_config({**PLAIN, **base, **keys}, verb="infer"))


def is_folded_into_its_base(cfg: RunConfig, adapter: Path, target: Path) -> None:
    """Also where it was trained over a quantised base: into the weights that were quantised."""
    base, model = str(cfg.model.model_name_or_path), loaded_with(cfg, adapter)
    model.merge(target, torch.float32)
    kind, section = type(model.policy), model.cfg.model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = load_base(str(target), section, CPU, torch.float32, kind=kind)(input_ids=ids).logits
        beside = load_beside(section, base, base, [str(adapter)], Combination(), CPU, kind)(input_ids=ids).logits
    assert (merged - beside).abs().max() < FOLDED
    assert not is_quantised(load_base(str(target), section, CPU, torch.float32, kind=kind))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
