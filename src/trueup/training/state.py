"""Everything a run needs to go on to the bit: which tensors and which JSON a checkpoint holds.

    masters.safetensors     fp32 masters
    optimizer.safetensors   exp_avg, exp_avg_sq, step …
    program.safetensors     tensors of the program's own state, if it has any
    random.safetensors      torch's generators of every rank, metric sums in mid-interval (fp64)
    trainer_state.json      step, best metric, counters, Python's and numpy's generators, versions

No pickle. Floats that must return to the bit are tensors, or JSON written with Python's shortest
repr, which is exact.
"""

from __future__ import annotations

import logging
import platform
import random
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trueup.errors import CorruptStateError
from trueup.training import durable
from trueup.training.backend import Backend, HostMetrics
from trueup.training.checkpoint import POINT, STATE_FILE, verify
from trueup.training.metrics import MetricSums
from trueup.training.optim import MasterOptimizer

MASTERS_FILE = "masters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
PROGRAM_FILE = "program.safetensors"

_log = logging.getLogger("trueup")


@dataclass
class Progress:
    """Where a run is. JSON-able; all of it is in the checkpoint."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # tokens through the backbone so far, all ranks
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    early_stopped: bool = False
    evaluation_due: bool = False  # asked for after `step`, not finished yet
    evaluated_step: int = -1  # the last step that was evaluated
    loss_sum: float = 0.0  # over all steps, for train_loss
    pieces: int = 1  # each micro-batch is cut into so many, since memory ran out
    lines: dict[str, int] = field(default_factory=dict)  # lines of each log file at the save


@dataclass
class RankState:
    """What differs between ranks: generators and metric sums in mid-interval."""

    torch_cpu: Tensor
    torch_cuda: Tensor | None  # of this rank's device
    python: Any
    numpy: Any
    sums: HostMetrics

    @classmethod
    def capture(cls, sums: MetricSums) -> RankState:
        """This process's state now."""
        kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state(sums.device) if sums.device.type == "cuda" else None
        version, internal, gauss_next = random.getstate()
        return cls(
            torch.get_rng_state(),
            cuda,
            [version, list(internal), gauss_next],
            [str(kind), np.asarray(words).tolist(), int(position), int(has_gauss), float(gauss)],
            sums.read(),
        )

    def restore(self, sums: MetricSums) -> None:
        """Put it back into this process."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None and sums.device.type == "cuda":
            torch.cuda.set_rng_state(self.torch_cuda, sums.device)
        version, internal, gauss_next = self.python
        random.setstate((version, tuple(internal), gauss_next))
        kind, words, position, has_gauss, gauss = self.numpy
        np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
        sums.load(self.sums)

    def tensors(self) -> dict[str, Tensor]:
        """The exact part, as tensors."""
        generators = {"cpu": self.torch_cpu}
        if self.torch_cuda is not None:
            generators["cuda"] = self.torch_cuda
        sums = {f"metric.{name}": torch.tensor(pair, dtype=torch.float64) for name, pair in self.sums.items()}
        return {f"generator.{name}": state for name, state in generators.items()} | sums

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], generators: dict[str, Any]) -> RankState:
        """From `tensors()` and the JSON part."""
        sums = {
            name.removeprefix("metric."): (float(pair[0]), float(pair[1]))
            for name, pair in tensors.items()
            if name.startswith("metric.")
        }
        return cls(
            tensors["generator.cpu"],
            tensors.get("generator.cuda"),
            generators["python"],
            generators["numpy"],
            sums,
        )


def write_masters(directory: Path, optimizer: MasterOptimizer) -> None:
    """Write the fp32 masters into a staged directory. Rank 0 only."""
    _save(optimizer.masters, directory / MASTERS_FILE)


def write_state(
    directory: Path,
    optimizer: MasterOptimizer,
    progress: Progress,
    ranks: list[RankState],
    program_state: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Write what else a resume needs into a staged directory. Rank 0 only."""
    _save(optimizer.state_tensors(), directory / OPTIMIZER_FILE)
    _save(
        {f"{i}/{name}": t for i, rank in enumerate(ranks) for name, t in rank.tensors().items()},
        directory / RANDOM_FILE,
    )
    tensors = {name: value for name, value in program_state.items() if isinstance(value, Tensor)}
    if tensors:
        _save(tensors, directory / PROGRAM_FILE)
    state = {
        "global_step": progress.step,
        "progress": asdict(progress),
        "optimizer": optimizer.state_dict(),
        "program": {name: value for name, value in program_state.items() if name not in tensors},
        "generators": [{"python": rank.python, "numpy": rank.numpy} for rank in ranks],
        "circumstances": circumstances(len(ranks), _device_of(optimizer)),
        "config": config,
    }
    durable.write_json(directory / STATE_FILE, state, indent=None)


def read_progress(directory: Path) -> Progress:
    """Where the run of a checkpoint was."""
    stored = read_json_state(directory)["progress"]
    known = {f.name for f in fields(Progress)}
    return Progress(**{name: value for name, value in stored.items() if name in known})


def read_json_state(directory: Path) -> dict[str, Any]:
    """`trainer_state.json` of a verified checkpoint."""
    return durable.read_json(directory / STATE_FILE)


def restore(
    directory: Path, optimizer: MasterOptimizer, sums: MetricSums, backend: Backend
) -> tuple[Progress, dict[str, Any]]:
    """Put a verified checkpoint back into optimizer, module, generators and metric sums.

    Returns the progress and the program's state. Says so when going on cannot be exact to the bit.
    Raises CorruptStateError when the trained parameters are not those of the checkpoint.
    """
    state = read_json_state(directory)
    masters = load_file(directory / MASTERS_FILE)
    _check_same_parameters(directory, masters, optimizer.masters)
    optimizer.load_masters(masters)
    optimizer.load_state_tensors(load_file(directory / OPTIMIZER_FILE), state["optimizer"].get("numbers"))
    progress = read_progress(directory)
    optimizer.load_state_dict(state["optimizer"], progress.step)
    _restore_rank(directory, state["generators"], sums, backend)
    now = circumstances(backend.world_size, _device_of(optimizer))
    if backend.rank == 0:
        _say_inexact(state["circumstances"], now)
    tensors = load_file(directory / PROGRAM_FILE) if (directory / PROGRAM_FILE).is_file() else {}
    return progress, {**state["program"], **tensors}


def load_best_masters(directory: Path, optimizer: MasterOptimizer) -> None:
    """Set only the weights; and the optimizer, where weights are averaged with its help.

    Raises CorruptStateError if the checkpoint's bytes have changed since it was saved.
    """
    verify(directory)
    optimizer.load_masters(load_file(directory / MASTERS_FILE))
    if optimizer.averages:
        numbers = read_json_state(directory)["optimizer"].get("numbers")
        optimizer.load_state_tensors(load_file(directory / OPTIMIZER_FILE), numbers)


def circumstances(world_size: int, device: str) -> dict[str, Any]:
    """What besides the state decides the bits of a step."""
    names = ("trueup", "torch", "transformers", "peft", "numpy")
    return {
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "device": device,
        "deterministic": device == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in names},
    }


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _say_inexact(then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now if then.get(k) != now[k]]
    if not now["deterministic"]:
        changed.append(f"{now['device']} runs without deterministic kernels (full_determinism: true)")
    if changed:
        _log.warning("resuming is sound, but not exact to the bit: %s", "; ".join(changed))


def _restore_rank(directory: Path, generators: list[dict[str, Any]], sums: MetricSums, backend: Backend) -> None:
    tensors = load_file(directory / RANDOM_FILE)

    def of(rank: int) -> RankState:
        prefix = f"{rank}/"
        mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return RankState.from_parts(mine, generators[rank])

    if len(generators) == backend.world_size:
        of(backend.rank).restore(sums)
    elif backend.rank == 0:  # another number of ranks: the sums so far all go to rank 0
        first = of(0)
        for rank in range(1, len(generators)):
            for name, (value, count) in of(rank).sums.items():
                old = first.sums.get(name, (0.0, 0.0))
                first.sums[name] = (old[0] + value, old[1] + count)
        first.restore(sums)


def _check_same_parameters(directory: Path, stored: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    def shape(tensors: dict[str, Tensor], name: str) -> list[int] | None:
        return list(tensors[name].shape) if name in tensors else None

    names = sorted(stored.keys() | here.keys())
    wrong = [name for name in names if shape(stored, name) != shape(here, name)]
    if wrong:
        name = wrong[0]
        raise CorruptStateError(
            f"{len(wrong)} trained parameters differ from the checkpoint's, first {name}: "
            f"{shape(stored, name)} there, {shape(here, name)} here",
            where=str(directory / MASTERS_FILE),
            expected="the same model, finetuning_type and lora settings",
            fix="resume with the run's own run.yaml, or start a new run",
        )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    durable.boundary(POINT)
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)


def _device_of(optimizer: MasterOptimizer) -> str:
    return next(iter(optimizer.masters.values())).device.type
