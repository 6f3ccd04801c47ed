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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueup.models.adapters import TRAINED, Adapters
from trueup.models.policy import Policy
from trueup.types import Forest

log = logging.getLogger("trueup")

#: Fields of a model's config that name things and change no value.
_NO_VALUE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")
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
        return cls(frozen)

    @classmethod
    def before_training(cls, policy: Policy, adapters: Adapters | None) -> LiveReference:
        """As `of`, for use before the first step only: needs no copy, because nothing has moved yet."""
        return cls(policy, adapters.as_reference if adapters is not None else nullcontext)

    @torch.no_grad()
    def token_logps(self, forest: Forest) -> Tensor:
        """[N] fp32 log-probabilities under the reference, dropout off."""
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with self.switch():
                return self.policy.token_logps(forest)
        finally:
            self.policy.model.train(training)

    def fingerprint(self) -> str:
        """sha256 over every parameter that acts in the reference, and all that turns parameters into values."""
        policy = self.policy
        config = {k: v for k, v in policy.base.config.to_diff_dict().items() if k not in _NO_VALUE}
        peft_configs = getattr(policy.model, "peft_config", {})
        adapters = {name: _shape_of(config) for name, config in peft_configs.items() if name != TRAINED}
        facts = [str(policy.dtype), policy.shared, policy.plain_attention, transformers.__version__, config, adapters]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        with self.switch():
            for name, tensor in sorted(self.policy.base.state_dict().items()):
                if f".{TRAINED}." in name and self.switch is not nullcontext:
                    continue  # the adapter being trained is off
                digest.update(name.encode())
                digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _shape_of(config: LoraConfig) -> list:
    """What of an adapter's config decides its values, beside its weights."""
    patterns = sorted(config.rank_pattern.items()), sorted(config.alpha_pattern.items())
    return [config.r, config.lora_alpha, config.use_rslora, config.use_dora, *patterns]


class ReferenceTable:
    """Per-token reference log-probabilities of a dataset, on disk and in memory.

    A flat fp32 array holds example after example; NaN marks what has not been computed. The file's name says all that
    decides the values to the bit (`table_path`), so that whoever finds a value there would have computed the same. A
    file that cannot be read, or is not what was written, is said and computed again.

    Args:
        sizes: [n] predictions of each example.
        path: the table's file; read when it exists.
    """

    def __init__(self, sizes: Sequence[int], path: Path) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.path = path
        self.values = torch.full((int(self.offsets[-1]),), float("nan"))
        if path.is_file():
            try:
                self.values = _read(path, self.values.shape)
            except (OSError, SafetensorError, ValueError) as error:
                log.warning("cached reference log-probabilities are computed again: %s: %s", path, error)

    def get(self, indices: Iterable[int]) -> Tensor:
        """[N] values of these examples, in order."""
        return torch.cat([self.values[self.offsets[i] : self.offsets[i + 1]] for i in indices])

    def missing(self, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
        """The batches with at least one example not in the table, each example asked for once."""
        known = ~np.array(
            [bool(torch.isnan(self.values[a:b]).any()) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        )
        todo = []
        for batch in batches:
            if not known[batch].all():
                todo.append(batch)
                known[batch] = True
        return todo

    def positions(self, indices: Iterable[int]) -> Tensor:
        """Bool mask over `values` of these examples' places."""
        mask = torch.zeros(len(self.values), dtype=torch.bool)
        for i in indices:
            mask[self.offsets[i] : self.offsets[i + 1]] = True
        return mask

    def put(self, indices: np.ndarray, values: Tensor) -> None:
        cursor = 0
        values = values.float().cpu()
        for i in indices:
            size = int(self.offsets[i + 1] - self.offsets[i])
            # A value already there stays: it is in use.
            if torch.isnan(self.values[self.offsets[i] : self.offsets[i + 1]]).any():
                self.values[self.offsets[i] : self.offsets[i + 1]] = values[cursor : cursor + size]
            cursor += size

    def save(self) -> None:
        """Write the file whole or not at all; a cache that cannot be written costs time, never the run."""
        staged = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")  # ours alone, on any machine
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.path)
            save_file({"logps": self.values}, staged, {"sha256": _digest(self.values)})
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


def table_path(reference: str, data: str, layout: str = "") -> Path:
    """Where a table lives: below `TRUEUP_CACHE`, or ~/.cache/trueup.

    The last bits of a value depend on the rows that shared its batch and on the kernels, so these are part of the name:
    a run must not end otherwise because another one filled the cache first.

    Args:
        reference: fingerprint of the model, its dtype and layout path.
        data: fingerprint of the encoded examples.
        layout: what decides which rows share a batch.
    """
    root = os.environ.get("TRUEUP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "trueup")
    key = hashlib.sha256(json.dumps(["v2", reference, data, layout]).encode()).hexdigest()
    return Path(root) / "reference" / f"{key}.safetensors"
