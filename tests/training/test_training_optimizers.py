"""Every optimizer learns, and goes on from its checkpoint to the bit; its state is plain tensors and numbers."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_training_resume import fingerprint
from toy_program import ToyProgram, run_toy, settings

from trueup.config import optimizer_state
from trueup.config.load import load_config
from trueup.config.optimizers import OPTIMIZERS, read_arguments
from trueup.errors import ConfigError
from trueup.training.optim import MasterOptimizer
from trueup.training.optimizers import Wanted, check_optimizer, rate_factors, state_bytes

KEYS = dict(
    num_train_epochs=4, save_strategy="steps", save_steps=9, logging_steps=6, eval_strategy="steps", eval_steps=5
)
RATES = {"sgd": 0.1, "schedule_free_sgd": 0.5, "rmsprop": 3e-3, "lion": 3e-3, "paged_lion": 3e-3}
ARGUMENTS = {"galore": "rank=8,update_proj_gap=5,scale=1.0", "apollo": "rank=8,update_proj_gap=5,scale=8.0"}


def needs(name):
    package = OPTIMIZERS[name].package
    missing = package and importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{package} is not installed"))


def keys_of(name):
    arguments = next((text for kind, text in ARGUMENTS.items() if name.startswith(kind)), None)
    arguments = "min_8bit_size=64" if "8bit" in name else arguments  # the toy's tensors are small
    rate = next((rate for kind, rate in RATES.items() if name.startswith(kind)), 1e-2)
    schedule = "constant" if name.startswith("schedule_free") else "cosine"
    return dict(optim=name, optim_args=arguments, learning_rate=rate, lr_scheduler_type=schedule)


class Layered(ToyProgram):
    """The toy under the names of a decoder, and with the heads that Adam-mini asks for."""

    head_elements = 96 * 32

    def __init__(self, **given):
        super().__init__(**given)
        names = {"hidden.weight": "layers.0.q_proj.weight", "embed.weight": "embed_tokens.weight"}
        self.trainable = {names.get(name, name): p for name, p in self.model.named_parameters()}


@pytest.fixture(autouse=True)
def layered(monkeypatch):
    monkeypatch.setattr("toy_program.ToyProgram", Layered)


@pytest.mark.parametrize("name", [needs(name) for name in OPTIMIZERS])
def test_it_learns_and_resumes_to_the_bit(name, tmp_path):
    keys = {**KEYS, **keys_of(name)}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result, _ = run_toy(whole, program={"dropout": 0.0}, **keys)
    losses = [json.loads(line).get("loss") for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.9 * losses[0], losses
    shutil.copytree(whole, cut)
    for directory in cut.glob("checkpoint-*"):
        if int(directory.name.removeprefix("checkpoint-")) > 9:
            shutil.rmtree(directory)
    run_toy(cut, resume="auto", program={"dropout": 0.0}, **keys)
    assert fingerprint(cut, result.steps) == fingerprint(whole, result.steps)


@pytest.mark.parametrize("name", [needs(name) for name in ("galore_adamw", "adamw_8bit", "apollo_adamw")])
def test_its_state_is_small_and_plain(name, tmp_path):
    run_toy(tmp_path / "run", **{**KEYS, **keys_of(name), "max_steps": 2})
    stored = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    size = sum(t.numel() * t.itemsize for key, t in stored.items() if key.endswith("layers.0.q_proj.weight"))
    assert size < 2 * 4 * 96 * 256 / 3


def test_schedule_free_saves_its_average_and_goes_on_from_elsewhere(tmp_path):
    pytest.importorskip("schedulefree")
    run_toy(tmp_path / "run", **{**KEYS, **keys_of("schedule_free_adamw"), "max_steps": 6})
    directory = tmp_path / "run" / "checkpoint-6"
    saved, masters = load_file(directory / "model.safetensors"), load_file(directory / "masters.safetensors")
    state = load_file(directory / "optimizer.safetensors")
    name = "layers.0.q_proj.weight"
    averaged = torch.lerp(masters[name], state[f"z.{name}"], 1 - 1 / 0.9)
    assert torch.equal(saved[name], averaged)
    assert not torch.equal(saved[name], masters[name])


def test_moments_of_8_bits_are_a_quarter(tmp_path):
    pytest.importorskip("bitsandbytes")
    weights = {"w": torch.nn.Parameter(torch.randn(64, 1024))}
    sizes = {}
    for name in ("adamw_torch", "adamw_8bit"):
        optimizer = MasterOptimizer(weights, optim=name)
        optimizer.backward((weights["w"] ** 2).sum())
        optimizer.step(optimizer.gradient_norm(), 1)
        sizes[name] = state_bytes(optimizer.optimizer)
        optimizer.close()
    assert sizes["adamw_8bit"] == pytest.approx(sizes["adamw_torch"] / 4, rel=0.05)


OTHER_ARGUMENTS = [
    ("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.9,centered=true"), ("adamw_8bit", "min_8bit_size=64"),
    ("galore_adamw", "rank=8,proj_type=reverse_std"), ("galore_adamw", "rank=8,proj_type=full"),
    ("galore_adafactor", "rank=8,proj_type=left"), ("apollo_adamw", "rank=8,proj=svd"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, text",
    [pytest.param(*needs(name).values, None, marks=needs(name).marks, id=name) for name in OPTIMIZERS]
    + [pytest.param(name, text, marks=needs(name).marks, id=f"{name}-{text}") for name, text in OTHER_ARGUMENTS],
)
def test_its_state_is_foreseen_from_names_and_shapes(name, text):
    shapes = {
        "embed_tokens.weight": (512, 64), "layers.0.self_attn.q_proj.weight": (128, 64),
        "layers.0.self_attn.q_proj.bias": (128,), "layers.0.self_attn.o_proj.weight": (64, 128),
        "layers.0.mlp.up_proj.weight": (512, 64), "layers.1.mlp.down_proj.weight": (64, 512),
        "layers.1.input_layernorm.weight": (64,), "lm_head.weight": (512, 64),
    }  # fmt: skip
    weights = {key: torch.nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}
    arguments = read_arguments(name, text)
    optimizer = MasterOptimizer(weights, wanted=Wanted(name, 1e-3, arguments=arguments, head_elements=16 * 64))
    optimizer.backward(sum((weight**2).sum() for weight in weights.values()))
    optimizer.step(optimizer.gradient_norm(), 1)
    optimizer.close()
    foreseen = optimizer_state.state_bytes(shapes, name, arguments)
    tables = 2 * 256 * 4  # bitsandbytes' numbers of 8 bits, once for all weights
    assert foreseen == pytest.approx(state_bytes(optimizer.optimizer), rel=0.01, abs=tables + 4 * len(shapes))


SWITCHES = [
    (
        {"use_galore": True, "galore_rank": 4, "galore_update_interval": 7, "galore_scale": 0.5,
         "galore_proj_type": "right", "galore_target": "q_proj"},
        {"rank": 4, "update_proj_gap": 7, "scale": 0.5, "proj_type": "right"},
    ),
    (
        {"use_apollo": True, "apollo_rank": 2, "apollo_update_interval": 9, "apollo_scale": 2.0, "apollo_proj": "svd",
         "apollo_proj_type": "left", "apollo_scale_type": "tensor", "apollo_target": "q_proj",
         "apollo_scale_front": True},
        {"rank": 2, "update_proj_gap": 9, "scale": 2.0, "proj": "svd", "proj_type": "left", "scale_type": "tensor"},
    ),
    ({"use_muon": True}, {"momentum": 0.95}),
    ({"use_adam_mini": True}, {"name": "layers.0.q_proj.weight"}),
]  # fmt: skip


@pytest.mark.parametrize("keys, expected", SWITCHES, ids=lambda given: next(iter(given)))
def test_a_switch_and_its_keys_make_the_optimizer(keys, expected):
    name = next(iter(keys))
    optimizer = {"use_galore": "galore_adamw", "use_apollo": "apollo_adamw", "use_adam_mini": "adam_mini"}.get(name)
    pytest.importorskip(OPTIMIZERS[optimizer or "muon"].package or "torch")
    cfg = load_config({"model_name_or_path": "m", "dataset": "d", "stage": "sft", "finetuning_type": "full", **keys})
    shapes = {"layers.0.q_proj.weight": (16, 8), "layers.0.k_proj.weight": (16, 8), "norm.weight": (8,)}
    weights = {path: torch.nn.Parameter(torch.ones(shape)) for path, shape in shapes.items()}
    whole = MasterOptimizer.from_settings(weights, cfg.train, 5, 8)
    made, masters = whole.optimizer, whole.masters
    (group,) = (g for g in made.param_groups if any(p is masters["layers.0.q_proj.weight"] for p in g["params"]))
    assert {key: group[key] for key in expected} == expected
    if "galore" in name or "apollo" in name:
        assert len(group["params"]) == 1  # k_proj is not a target
    if "apollo" in name:
        assert made.scale_front


def test_learning_rates_differ_by_layer_and_name():
    names = ["embed_tokens.weight", "layers.0.a.weight", "layers.1.a.weight", "norm.weight", "lm_head.weight"]
    assert rate_factors(names, {"a.weight": 3.0}, 0.5) == {
        "embed_tokens.weight": 0.25, "layers.0.a.weight": 1.5, "layers.1.a.weight": 3.0
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no trained parameter"):
        rate_factors(names, {"q_proj": 2.0}, None)


def test_a_multiplied_rate_moves_a_weight_further():
    def moved(**keys):
        toy = Layered()
        before = toy.trainable["head.weight"].detach().clone()
        optimizer = MasterOptimizer.from_settings(toy.trainable, settings(optim="sgd", warmup_ratio=0, **keys), 5)
        rate = optimizer.learning_rate
        batch = toy.micro_batches(0, 0)[0]
        optimizer.backward(toy.loss(batch, {"rows": 2.0})[0])
        optimizer.step(optimizer.gradient_norm(), 1)
        optimizer.close()
        return toy.trainable["head.weight"].detach() - before, rate

    plain, rate = moved(weight_decay=0.0)
    tripled, same = moved(weight_decay=0.0, lr_multipliers={"head": 3.0})
    assert torch.allclose(tripled, 3 * plain, atol=1e-7)
    assert same == rate
    _, everywhere = moved(weight_decay=0.0, lr_multipliers={"": 3.0, "head": 2.0, "bias": 0})
    assert everywhere == pytest.approx(rate)


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="galore_torch") as error:
        check_optimizer(settings(optim="galore_adamw"))
    assert "pip install" in error.value.problems[0].fix


def test_arguments_an_optimizer_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="sgd takes momentum"):
        check_optimizer(settings(optim="sgd", optim_args="rank=3"))


@pytest.mark.parametrize("name", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_masters_on_the_host_step_to_the_same_bits(name, dtype):
    moved = {}
    for on_host in (False, True):
        torch.manual_seed(0)
        weights = {"layers.0.w": torch.nn.Parameter(torch.randn(8, 16).to(dtype))}
        optimizer = MasterOptimizer(weights, optim=name, learning_rate=1e-2, on_host=on_host)
        weight = weights["layers.0.w"]
        assert (optimizer.masters["layers.0.w"].data_ptr() == weight.data_ptr()) == (
            not on_host and dtype == torch.float32
        )
        for step in range(3):
            optimizer.backward((weight.float() ** 2).sum())
            optimizer.step(optimizer.gradient_norm(), step + 1)
        optimizer.close()
        moved[on_host] = weight.detach().clone(), optimizer.masters["layers.0.w"].clone()
    assert all(torch.equal(a, b) for a, b in zip(moved[False], moved[True], strict=True))


def moved_by(wanted: Wanted, shapes: dict, gradients: list[dict]) -> tuple[dict, dict]:
    """Weights before and after a step for each of the gradients, at the rate asked for."""
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = MasterOptimizer(weights, wanted=wanted, max_grad_norm=None, lr_scheduler_type="constant")
    for number, of_step in enumerate(gradients):
        optimizer.backward(sum((weights[name] * of_step[name]).sum() for name in weights))
        optimizer.step(optimizer.gradient_norm(), number + 1)
    optimizer.close()
    return before, {name: weight.detach() for name, weight in weights.items()}


GALORE = dict(rank=4, update_proj_gap=2, scale=0.5, proj_type="std")
SHAPES = {"layers.0.q_proj.weight": (16, 8), "layers.0.down_proj.weight": (8, 24), "embed_tokens.weight": (12, 8),
          "norm.weight": (8,)}  # fmt: skip


@pytest.fixture
def of_five_steps() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(5)]


def test_galore_moves_weights_as_the_published_optimizer_does(of_five_steps):
    published = pytest.importorskip("galore_torch").GaLoreAdamW
    wanted = Wanted("galore_adamw", 1e-2, weight_decay=0.1, arguments=GALORE)
    before, after = moved_by(wanted, SHAPES, of_five_steps)
    theirs = {name: torch.nn.Parameter(weight) for name, weight in before.items()}
    projected = [theirs[name] for name in SHAPES if name.startswith("layers")]
    groups = [
        {"params": projected, "weight_decay": 0.1, **GALORE}, {"params": [theirs["embed_tokens.weight"]],
         "weight_decay": 0.1}, {"params": [theirs["norm.weight"]], "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = published(groups, lr=1e-2, eps=1e-8, no_deprecation_warning=True)
    for of_step in of_five_steps:
        for name, weight in theirs.items():
            weight.grad = of_step[name].clone()
        optimizer.step()
    for name, weight in theirs.items():
        assert torch.allclose(after[name], weight, rtol=1e-5, atol=1e-6), name


def test_galore_is_its_papers_formula(of_five_steps):
    """Moments live in the projection and outlive a new one; the scale acts once; decay is of the whole weight (GaLore,
    arXiv 2403.03507, algorithm 2).
    """
    pytest.importorskip("galore_torch")
    name, rate, decay, eps = "layers.0.q_proj.weight", 1e-2, 0.1, 1e-8
    wanted = Wanted("galore_adamw", rate, weight_decay=decay, arguments=GALORE)
    before, after = moved_by(wanted, {name: SHAPES[name]}, of_five_steps)
    weight, first, second, basis = before[name], 0.0, 0.0, torch.empty(0)
    for number, of_step in enumerate(of_five_steps):
        if number % GALORE["update_proj_gap"] == 0:
            basis = torch.linalg.svd(of_step[name], full_matrices=False).Vh[: GALORE["rank"]]
        low = of_step[name] @ basis.T
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        step = rate * (1 - 0.999 ** (number + 1)) ** 0.5 / (1 - 0.9 ** (number + 1))
        weight = weight - step * GALORE["scale"] * (first / (second.sqrt() + eps)) @ basis
        weight = weight - rate * decay * weight
    assert torch.allclose(after[name], weight, rtol=1e-4, atol=1e-5)
