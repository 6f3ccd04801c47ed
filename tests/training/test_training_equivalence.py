"""The same step, however it is cut: micro-batches, processes, precisions."""

from __future__ import annotations

import pytest
import torch
from processes import needs_fork, run_ranks
from safetensors.torch import load_file
from toy_program import ToyProgram, run_toy, settings

from trueup.errors import ConfigError, DivergenceError
from trueup.training.backend import Single, make_backend
from trueup.training.evaluation import evaluate
from trueup.training.metrics import MetricSums
from trueup.training.optim import LossScale, MasterOptimizer
from trueup.training.optimizers import is_decayed
from trueup.training.run_directory import read_metrics
from trueup.training.step import train_step


def first_gradients(**program):
    """Loss and fp32 gradient sums of the first step."""
    toy = ToyProgram(dropout=0.0, **program)
    optimizer = MasterOptimizer(toy.trainable, max_grad_norm=None)
    seen = {}
    zero = optimizer.gradients.zero

    def keep():
        seen.update({name: view.clone() for name, view in optimizer.gradients.views.items()})
        zero()

    optimizer.gradients.zero = keep
    result = train_step(toy, optimizer, Single(), 0, MetricSums())
    return result.loss, seen


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("micro", "accumulate"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_micro_batches_do_not_change_loss_and_gradients(micro, accumulate):
    rows = 8 if micro * accumulate == 8 else 9
    loss, gradients = first_gradients(rows=rows, micro=micro, accumulate=accumulate)
    whole_loss, whole = first_gradients(rows=rows, micro=rows, accumulate=1)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    floor = 0.1 * max(gradient.norm() for gradient in whole.values())  # of a bias, sums that cancel may be all there is
    for name, gradient in whole.items():
        assert (gradients[name] - gradient).norm() < 1e-6 * max(gradient.norm(), floor), name


@needs_fork
def test_two_processes_are_one_even_when_a_rank_has_no_micro_batch(tmp_path):
    # 9 rows at 8 a step: the last step has one micro-batch, so one of the ranks has none
    keys = dict(optim="sgd", learning_rate=1.0, max_grad_norm=None, logging_steps=1)
    keys |= dict(eval_strategy="epoch", lr_scheduler_type="constant")
    program = dict(rows=9, micro=2, dropout=0.0)

    def one_rank():
        backend = make_backend("cpu", 60)
        mine = program | dict(accumulate=2, rank=backend.rank, world_size=backend.world_size)
        run_toy(tmp_path / "two", backend=backend, program=mine, **keys)
        backend.close()

    assert run_ranks(one_rank) == [0, 0]
    run_toy(tmp_path / "one", program=program | dict(accumulate=4), **keys)
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    start = ToyProgram(**program).trainable
    for name in one:  # plain SGD: what the weights moved is the summed gradients
        moved = one[name] - start[name].detach()
        assert relative(two[name] - start[name].detach(), moved) < 1e-5, name
    rows_two, rows_one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for of_two, of_one in zip(rows_two, rows_one, strict=True):
        for key in ("loss", "grad_norm", "rewards/accuracies", "num_tokens", "eval_loss"):
            if key in of_one:
                assert of_two[key] == pytest.approx(of_one[key], rel=1e-5), key


@needs_fork
def test_a_failure_on_the_first_rank_ends_the_others(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something.txt").write_text("mine", encoding="utf-8")

    def one_rank():
        backend = make_backend("cpu", 60)
        run_toy(tmp_path / "run", backend=backend)

    assert run_ranks(one_rank) == [2, 2]  # whichever is heard first, the code is the cause's


def test_masters_keep_what_bf16_weights_lose():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer(
        {"w": weight}, optim="sgd", learning_rate=1e-3, max_grad_norm=None, total_steps=100,
        lr_scheduler_type="constant",
    )  # fmt: skip
    for step in range(10):
        optimizer.backward(weight.sum())
        assert weight.grad is None  # freed as soon as it was added up
        optimizer.step(optimizer.gradient_norm(), step + 1)
    assert optimizer.masters["w"].tolist() == pytest.approx([0.99] * 4)
    assert torch.equal(weight.detach(), optimizer.masters["w"].bfloat16())


def test_gradients_of_bf16_weights_are_added_up_in_fp32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": weight})
    for share in [1.0] + [2.0**-9] * 64:
        optimizer.backward((weight * share).sum())
    assert optimizer.gradients.views["w"].item() == 1.0 + 64 * 2.0**-9


def test_fp32_parameters_are_their_own_masters():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = MasterOptimizer({"w": weight})
    assert optimizer.masters["w"].data_ptr() == weight.data_ptr()


def test_a_parameter_out_of_reach_has_gradient_zero():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = MasterOptimizer({"used": used, "unused": unused}, learning_rate=0.1)
    optimizer.backward(used.sum())
    optimizer.step(optimizer.gradient_norm(), 1)
    assert unused.tolist() == [1.0, 1.0]
    assert used.tolist() != [1.0, 1.0]


def test_clipping_is_by_the_global_norm():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = MasterOptimizer({"a": a, "b": b}, optim="sgd", learning_rate=1.0, max_grad_norm=1.0)
    optimizer.backward((3 * a + 4 * b).sum())
    norm = optimizer.gradient_norm()
    optimizer.step(norm, 1)
    assert norm.item() == 5.0
    assert [a.item(), b.item()] == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_matches_torch_adamw_with_transformers_schedule():
    from transformers.optimization import get_scheduler

    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = MasterOptimizer(
        {"layer.weight": ours}, learning_rate=0.1, weight_decay=0.1, lr_scheduler_type="cosine",
        num_warmup_steps=2, total_steps=8,
    )  # fmt: skip
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    schedule = get_scheduler("cosine", reference, num_warmup_steps=2, num_training_steps=8)
    for step in range(8):
        optimizer.backward((ours**3).sum())
        optimizer.step(optimizer.gradient_norm(), step + 1)
        reference.zero_grad()
        (theirs**3).sum().backward()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
        schedule.step()
        assert optimizer.learning_rate == pytest.approx(schedule.get_last_lr()[0])
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bias_and_normalisation_are_not_decayed():
    decayed = ["layers.0.q_proj.lora_A.weight", "model.embed_tokens.weight", "lm_head.weight"]
    spared = ["h.0.ln_1.weight", "norm.weight", "layers.0.input_layernorm.weight", "q_proj.bias"]
    assert [is_decayed(name) for name in decayed + spared] == [True] * 3 + [False] * 4


def test_all_schedules_of_transformers_can_be_made():
    kinds = {"cosine_with_min_lr": {"min_lr": 1e-6}, "cosine_warmup_with_min_lr": {"min_lr": 1e-6}}
    kinds |= {"warmup_stable_decay": {"num_decay_steps": 2}, "polynomial": {"power": 2.0}}
    kinds |= dict.fromkeys(("linear", "cosine", "cosine_with_restarts", "constant"), None)
    kinds |= dict.fromkeys(("constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"), None)
    for kind, kwargs in kinds.items():
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = MasterOptimizer(
            {"w": weight}, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, total_steps=9,
            num_warmup_steps=1,
        )  # fmt: skip
        optimizer.backward(weight.sum())
        optimizer.step(optimizer.gradient_norm(), 1)
        optimizer.schedule.see(1.0)
        assert optimizer.learning_rate >= 0, kind


def test_bad_schedule_arguments_and_optimizers_are_the_users_error():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="cosine_with_min_lr"):
        MasterOptimizer({"w": weight}, lr_scheduler_type="cosine_with_min_lr")
    with pytest.raises(ConfigError, match="adafactor"):
        MasterOptimizer({"w": weight}, optim="lomo")


def test_not_finite_loss_stops_before_the_weights_move(tmp_path):
    program = dict(rows=16, micro=2, accumulate=2, poison_row=5)
    with pytest.raises(DivergenceError) as caught:
        run_toy(tmp_path / "run", program=program, save_strategy="steps", save_steps=1)
    assert caught.value.exit_code == 5
    assert "toy:5" in str(caught.value)
    import json

    record = json.loads((tmp_path / "run" / "divergence.json").read_text(encoding="utf-8"))
    assert "toy:5" in record["rows"] and len(record["rows"]) == 4
    step = record["step"]
    if step > 1:
        assert record["last_good_checkpoint"] == f"checkpoint-{step - 1}"
        assert f"checkpoint-{step - 1}" in str(caught.value)
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("failed", 5)


def test_not_finite_gradient_leaves_weights_and_moments_alone():
    toy = ToyProgram(rows=8, micro=8, accumulate=1, poison_row=3)
    optimizer = MasterOptimizer.from_settings(toy.trainable, settings(), 5)
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    with pytest.raises(DivergenceError):
        train_step(toy, optimizer, Single(), 0, MetricSums())
    assert all(torch.equal(before[name], m) for name, m in optimizer.masters.items())
    assert optimizer.state_tensors() == {}


def test_loss_scale_halves_on_overflow_and_grows_after_good_steps():
    scale = LossScale(scale=8.0, interval=2)
    assert scale.overflowed() and scale.scale == 4.0
    scale.succeeded()
    scale.succeeded()
    assert (scale.scale, scale.good_steps) == (8.0, 0)
    assert not LossScale(scale=2.0**-14).overflowed()


def test_fp16_overflow_skips_the_step_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = MasterOptimizer({"w": weight}, learning_rate=0.1)
    assert optimizer.loss_scale is not None
    optimizer.backward((weight * 100).sum().float())  # 65536 * 100 is no fp16
    assert not torch.isfinite(optimizer.gradient_norm())
    assert optimizer.shrink_loss_scale()
    optimizer.skip(1)
    optimizer.backward(weight.sum().float() * 0.5)
    assert optimizer.gradient_norm().item() == pytest.approx(0.5 * 2**0.5)
    restored = MasterOptimizer({"w": weight})
    restored.load_state_dict(optimizer.state_dict(), 1)
    assert restored.loss_scale is not None and restored.loss_scale.scale == 2.0**15


def test_evaluation_is_the_mean_over_the_set_and_leaves_no_trace():
    toy = ToyProgram(dropout=0.5)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    metrics = evaluate(toy, toy.eval_sets["eval"], Single())
    assert metrics is not None
    assert torch.equal(state, torch.get_rng_state())
    assert toy.model.training
    toy.model.eval()
    ids = [row for batch in toy.eval_sets["eval"] for row in batch.ids]
    expected = torch.nn.functional.cross_entropy(toy.model(toy.tokens[ids]), toy.labels[ids])
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in toy.trainable.values())
