"""A small plain-torch program for the engine's tests.

An embedding, dropout and two layers (about 50 k parameters) learn to tell two made-up classes of
token rows apart; the loss is a sum over rows divided by the step's row count, as objectives of this
project are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "optim_args": None,
    "optim_target_modules": [],
    "lr_multipliers": {},
    "layer_lr_decay": None,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "offload_optimizer": False,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "warmup_ratio": 0.1,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "logging_strategy": "steps",
    "logging_steps": 3,
    "logging_first_step": False,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "eval_delay": 0,
    "save_strategy": "no",
    "save_steps": 500,
    "save_total_limit": None,
    "save_only_model": False,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "early_stopping_steps": None,
    "do_eval": False,
    "run_name": None,
    "report_to": [],
    "plot_loss": True,
    "profile": False,
    "project": "trueup",
    "disable_tqdm": None,
    "seed": 7,
}


def settings(**changes: Any) -> SimpleNamespace:
    """The train section's keys with small defaults."""
    assert changes.keys() <= SETTINGS.keys(), changes.keys() - SETTINGS.keys()
    return SimpleNamespace(**{**SETTINGS, **changes})


class ToyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 96)
        self.hidden = nn.Linear(96, 256)
        self.norm = nn.LayerNorm(256)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(256, 2)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        pooled = self.embed(tokens_BT).mean(1)
        return self.head(self.dropout(self.norm(torch.tanh(self.hidden(pooled))))).float()


@dataclass(frozen=True)
class Rows:
    ids: list[int]


class ToyProgram:
    """Rows of an epoch are a permutation from (seed, epoch), cut into steps, micro-batches and
    ranks.
    """

    def __init__(
        self,
        *,
        rows: int = 44,
        micro: int = 2,
        accumulate: int = 4,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.1,
        seed: int = 7,
        poison_row: int | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.model = ToyModel(dropout).to(dtype)
        self.trainable = dict(self.model.named_parameters())
        self.rows, self.micro, self.seed = rows, micro, seed
        self.rank, self.world_size = rank, world_size
        self.examples_per_step = micro * accumulate * world_size
        self.steps_per_epoch = -(-rows // self.examples_per_step)
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, 256, (rows + 16, 12), generator=generator)
        self.labels = (self.tokens.float().mean(1) > 127).long()
        self.poison_row = poison_row
        held_out = [Rows(list(range(i, i + 4))) for i in range(rows, rows + 16, 4)]
        self.eval_sets = {"eval": held_out[rank::world_size]}
        self.losses_seen = 0

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def micro_batches(self, epoch: int, step: int) -> list[Rows]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        size = self.examples_per_step
        of_step = order[step * size : (step + 1) * size]
        batches = [of_step[i : i + self.micro] for i in range(0, len(of_step), self.micro)]
        return [Rows(batch) for batch in batches[self.rank :: self.world_size]]

    def counts(self, batch: Rows) -> Mapping[str, float]:
        return {"rows": len(batch.ids)}

    def loss(self, batch: Rows, totals: dict[str, float]):
        logits = self.model(self.tokens[batch.ids])
        labels = self.labels[batch.ids]
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.poison_row in batch.ids:
            losses = losses * float("nan")
        right = (logits.detach().argmax(1) == labels).float()
        self.losses_seen += 1
        count = torch.tensor(float(len(batch.ids)))
        return losses.sum() / totals["rows"], {"rewards/accuracies": (right.sum(), count)}

    def describe(self, batch: Rows) -> Sequence[str]:
        return [f"toy:{row}" for row in batch.ids]

    def size(self, batch: Rows) -> int:
        return 12 * len(batch.ids)

    def save_model(self, directory: Path, masters: Mapping[str, Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().cpu() for n, t in masters.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "toy"}', encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {"losses_seen": self.losses_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses_seen = state["losses_seen"]


def run_toy(
    directory: str | Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    config: dict[str, Any] | None = None,
    observers: Sequence[Any] = (),
    program: dict[str, Any] | None = None,
    backend: Any = None,
    **changes: Any,
):
    """One whole run. Returns (FitResult, program)."""
    from trueup.training.backend import Single
    from trueup.training.loop import fit
    from trueup.training.run_directory import RunDirectory

    backend = backend or Single("cpu")
    keys = {**SETTINGS, **changes}
    flat = {"output_dir": str(directory), **keys, **(config or {})}
    toy = ToyProgram(**(program or {}))
    with RunDirectory.open(directory, flat, resume=resume, overwrite=overwrite, backend=backend) as run:
        result = fit(toy, settings(**changes), run, backend, observers, identity={"data_fingerprint": "toy"})
    return result, toy
