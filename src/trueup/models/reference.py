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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueup.models.adapters import Adapters
from trueup.models.policy import Policy
from trueup.types import Forest

log = logging.getLogger("trueup")


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
        """sha256 over every parameter that acts in the reference, and its dtype and layout path."""
        digest = hashlib.sha256(f"{self.policy.dtype} shared={self.policy.shared}".encode())
        with self.switch():
            for name, tensor in sorted(self.policy.base.state_dict().items()):
                if ".default." in name and self.switch is not nullcontext:
                    continue  # the adapter being trained is off
                digest.update(name.encode())
                digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class ReferenceTable:
    """Per-token reference log-probabilities of a dataset, on disk and in memory.

    A flat fp32 array holds example after example; NaN marks what has not been computed. The file's name is the
    fingerprint of (reference, data), so another run with the same two finds it.

    Args:
        sizes: [n] predictions of each example.
        path: the table's file; read when it exists.
    """

    def __init__(self, sizes: Sequence[int], path: Path) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.path = path
        self.values = torch.full((int(self.offsets[-1]),), float("nan"))
        if path.is_file():
            with safe_open(path, "pt") as file:
                stored = file.get_tensor("logps")
            if stored.shape == self.values.shape:
                self.values = stored

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
            # A value already there stays: it may be in use by a run in another layout.
            if torch.isnan(self.values[self.offsets[i] : self.offsets[i + 1]]).any():
                self.values[self.offsets[i] : self.offsets[i + 1]] = values[cursor : cursor + size]
            cursor += size

    def save(self) -> None:
        """Write the file whole or not at all; a cache that cannot be written costs time, never the run."""
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": self.values}, staged)
            os.replace(staged, self.path)
        except OSError as error:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
            log.warning("the reference's log-probabilities could not be cached at %s: %s", self.path, error)


def table_path(reference: str, data: str) -> Path:
    """Where the table of (reference fingerprint, data fingerprint) lives: `TRUEUP_CACHE` or ~/.cache/trueup."""
    root = os.environ.get("TRUEUP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "trueup")
    key = hashlib.sha256(json.dumps(["v1", reference, data]).encode()).hexdigest()
    return Path(root) / "reference" / f"{key}.safetensors"
