"""The reference's log-probabilities: live, or from a table computed once.

The reference is the policy as it stands before the first step: base plus starting adapters (adapters off, or a frozen
copy of the one being continued), a frozen copy for full training, or a model of its own (`ref_model`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueup import __version__
from trueup.cache import cache_root
from trueup.models.adapters import TRAINED, Adapters, belongs_to
from trueup.models.distributions import projection
from trueup.models.policy import Policy
from trueup.models.quantise import tensors_of
from trueup.types import Forest
from trueup.waiting import waiting

log = logging.getLogger("trueup")

#: Fields of a model's config that name things and change no value.
_NO_VALUE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")
#: Fields of adapters' configs that change values.
_OF_ADAPTERS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms",
}  # fmt: skip
_ABANDONED_SECONDS = 24 * 3600.0  # an older stage was left by a process that was killed


class LiveReference:
    """Runs the reference on the batch it is asked about."""

    def __init__(self, policy: Policy, switch: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self.policy = policy
        self.switch = switch

    @classmethod
    def of(cls, policy: Policy, adapters: Adapters | None) -> LiveReference:
        """The policy's own past: adapters switched, or (full training) weights copied now, before any step."""
        if adapters is not None:
            return cls(policy, adapters.as_reference)
        frozen = Policy(copy.deepcopy(policy.base).requires_grad_(False).eval())
        frozen.plain_attention, frozen.shared = policy.plain_attention, policy.shared
        frozen.gathered = policy.gathered
        return cls(frozen)

    @classmethod
    def before_training(cls, policy: Policy, adapters: Adapters | None) -> LiveReference:
        """As `of`, for use before the first step only: needs no copy, because nothing has moved yet."""
        return cls(policy, adapters.as_reference if adapters is not None else nullcontext)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Its policy is the reference, without gradient and without dropout."""
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with torch.no_grad(), self.switch():
                yield
        finally:
            self.policy.model.train(training)

    def token_logps(self, forest: Forest) -> Tensor:
        """[N] fp32 log-probabilities under the reference."""
        with self.running():
            return self.policy.token_logps(forest)

    def project(self, hidden: Tensor) -> Tensor:
        """The reference's logits [n, V] of its hidden states [n, H], fp32."""
        with self.running():
            return projection(self.policy.head)(hidden)

    def fingerprint(self) -> str:
        """sha256 over every parameter that acts in the reference, and all that turns parameters into values."""
        policy = self.policy
        config = {k: v for k, v in policy.base.config.to_diff_dict().items() if k not in _NO_VALUE}
        peft_configs = getattr(policy.model, "peft_config", {})
        adapters = {name: _shape_of(config) for name, config in peft_configs.items() if name != TRAINED}
        facts = [str(policy.dtype), policy.shared, policy.plain_attention, transformers.__version__, config, adapters]
        facts += [] if policy.boosted else ["transformers' own layers"]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        tensors = dict(tensors_of(self.policy.base))
        if self.switch is not nullcontext:  # the adapter being trained is off
            tensors = {name: tensor for name, tensor in tensors.items() if not belongs_to(name, TRAINED)}
        megabytes = sum(tensor.nbytes for tensor in tensors.values()) >> 20
        done = 0
        with waiting("hashing the reference", megabytes, "MB") as tell:
            for name, tensor in sorted(tensors.items()):
                digest.update(name.encode())
                digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
                done += tensor.nbytes
                tell(done >> 20)
        return digest.hexdigest()


def _shape_of(config: PeftConfig) -> dict[str, Any]:
    """What of an adapter's config decides its values, beside its weights."""
    said = config.to_dict()
    return {name: said[name] for name in sorted(_OF_ADAPTERS.intersection(said))}


class MovingReference(LiveReference):
    """The policy's own past, some steps ago: a copy of what is trained, put in its place while the reference runs.

    The past is kept in fp32, where small steps towards the present add up; what runs is rounded from it.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, self._in_place)
        self.trained = policy.trainable()
        self.running_past = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.past = {name: tensor.float() for name, tensor in self.running_past.items()}  # no copy where it is fp32

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            self.running_past[name], parameter.data = parameter.data, self.running_past[name]

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """past ← share · present + (1 − share) · past (TR-DPO, arXiv 2404.09656)."""
        for name, parameter in self.trained.items():
            self.past[name].lerp_(parameter.data.float(), share)
        self._publish()

    def load(self, past: Mapping[str, Tensor]) -> None:
        """Go on from a copy saved before."""
        for name, tensor in self.past.items():
            tensor.copy_(past[name])
        self._publish()

    def _publish(self) -> None:
        for name, tensor in self.past.items():
            self.running_past[name].copy_(tensor)


class ReferenceTable:
    """Per-token reference log-probabilities of a dataset, on disk and in memory.

    A flat fp32 array holds example after example; NaN marks what has not been computed. The file's name says all that
    decides the values to the bit (`table_path`), so that whoever finds a value there would have computed the same: runs
    that fill one table at a time may take each other's. A file that cannot be read, or is not what was written, is said
    and computed again.

    Args:
        sizes: [n] predictions of each example.
        path: the table's file; read when it exists.
    """

    def __init__(self, sizes: Sequence[int], path: Path) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.path = path
        self.values = torch.full((int(self.offsets[-1]),), float("nan"))
        self.values = self._with_file()

    def _with_file(self) -> Tensor:
        """The values, their gaps filled with what the file holds."""
        if not self.path.is_file():
            return self.values
        try:
            found = _read(self.path, self.values.shape)
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("cached reference log-probabilities are computed again: %s: %s", self.path, error)
            return self.values
        return torch.where(torch.isnan(self.values), found, self.values)

    def get(self, indices: Iterable[int]) -> Tensor:
        """[N] values of these examples, in order."""
        return torch.cat([self.values[self.offsets[i] : self.offsets[i + 1]] for i in indices])

    def missing(self, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
        """The batches with at least one example that is not in the table."""
        gaps = np.concatenate([[0], np.cumsum(torch.isnan(self.values).numpy())])
        lacks = gaps[self.offsets[1:]] > gaps[self.offsets[:-1]]
        return [batch for batch in batches if lacks[batch].any()]

    def put(self, indices: np.ndarray, values: Tensor) -> None:
        """Write the values of these examples, given in order."""
        parts = torch.split(values.float().cpu(), [int(self.offsets[i + 1] - self.offsets[i]) for i in indices])
        for i, part in zip(indices, parts, strict=True):
            self.values[self.offsets[i] : self.offsets[i + 1]] = part

    def save(self) -> None:
        """Write the file whole or not at all, with what others have put there meanwhile; a cache that cannot be
        written costs time, never the run.
        """
        values = self._with_file()
        staged = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")  # ours alone, on any machine
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.path)
            save_file({"logps": values}, staged, {"sha256": _digest(values)})
            os.replace(staged, self.path)
        except (OSError, SafetensorError) as error:
            log.warning("the reference's log-probabilities could not be cached at %s: %s", self.path, error)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)


def _read(path: Path, shape: torch.Size) -> Tensor:
    """A table's values. Raises ValueError when they are not the ones that were written."""
    with safe_open(path, "pt") as file:
        values, written = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
    if values.shape != shape:
        raise ValueError(f"it holds {tuple(values.shape)} values, expected {tuple(shape)}")
    if (found := _digest(values)) != written:
        raise ValueError(f"its values have sha256 {found}, written were {written}")
    return values


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().data).hexdigest()


def _remove_abandoned(path: Path) -> None:
    """Stages of this table that a killed process left long ago."""
    for stage in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError):
            if time.time() - stage.stat().st_mtime > _ABANDONED_SECONDS:
                stage.unlink()


def table_path(reference: str, data: str, layout: str) -> Path:
    """Where a table lives: below `TRUEUP_CACHE`, or ~/.cache/trueup.

    The last bits of a value depend on the rows that shared its forward pass and on the kernels, so these are part of
    the name: a run must not end otherwise because another one filled the cache first.

    Args:
        reference: fingerprint of the model, its dtype and layout path.
        data: fingerprint of the encoded examples.
        layout: which rows shared a forward pass, and what computed it.
    """
    key = hashlib.sha256(json.dumps(["v3", __version__, reference, data, layout]).encode()).hexdigest()
    return cache_root() / "reference" / f"{key}.safetensors"
