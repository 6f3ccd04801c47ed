"""Starts `trueup train` once per process, under torch's launcher. Words travel as a list.

Who sees several GPUs and says nothing gets a process on each; `NPROC_PER_NODE=1` keeps to one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from trueup.config.names import is_on
from trueup.errors import ConfigError

_SHUTDOWN_SECONDS = "600"  # for workers to finish the step and save


def is_worker(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher (this one, torchrun …) has started this process."""
    return "LOCAL_RANK" in environment


def is_requested(num_gpus: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether FORCE_TORCHRUN, more than one node or process, or several GPUs ask for a launch."""
    if is_worker(environment):
        return False
    forced = environment.get("FORCE_TORCHRUN", "")
    if is_on(forced) or number(environment, "NNODES", 1) > 1:
        return True
    return number(environment, "NPROC_PER_NODE", 1 if forced else num_gpus) > 1


def num_processes(num_gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """How many processes `trueup train` would have, on all nodes."""
    if is_worker(environment):
        return number(environment, "WORLD_SIZE", 1)
    if not is_requested(num_gpus, environment):
        return 1
    return number(environment, "NPROC_PER_NODE", max(num_gpus, 1)) * number(environment, "NNODES", 1)


def count_gpus(device: str) -> int:
    """The GPUs a run with `device` may take: all that are visible, unless it names one or the CPU."""
    if device not in ("auto", "cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """An integer variable. ConfigError if it is none."""
    value = environment.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} is no number", where=f"environment variable {name}")
    return int(value)


def launcher_words(words: Sequence[str], num_gpus: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Arguments of `torch.distributed.run` for `trueup train WORDS` on this node."""
    processes = number(environment, "NPROC_PER_NODE", max(num_gpus, 1))
    nodes = number(environment, "NNODES", 1)
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    port = number(environment, "MASTER_PORT", 29500)
    if "RDZV_ID" in environment:
        least = number(environment, "MIN_NNODES", nodes)
        most = number(environment, "MAX_NNODES", nodes)
        where = [
            f"--nnodes={least}:{most}",
            f"--max-restarts={number(environment, 'MAX_RESTARTS', 0)}",
            f"--rdzv-id={environment['RDZV_ID']}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={address}:{port}",
        ]
    elif nodes > 1 or "MASTER_PORT" in environment:
        rank = number(environment, "NODE_RANK", 0)
        where = [
            f"--nnodes={nodes}",
            f"--node-rank={rank}",
            f"--master-addr={address}",
            f"--master-port={port}",
        ]
    else:
        where = ["--standalone"]  # one node, a free port
    return [*where, f"--nproc-per-node={processes}", "--module", "trueup", "train", *words]


def launch(words: Sequence[str], num_gpus: int) -> int:
    """Run `trueup train WORDS` in all processes of this node. The first failure's exit code."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the workers say what happened
    arguments = torchrun.parse_args(launcher_words(words, num_gpus))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    # The launcher would give each process one thread; give each its share of the cores instead.
    cores = (os.cpu_count() or 1) // int(arguments.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _exit_code(min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code  # a negative code is the signal that ended the process
