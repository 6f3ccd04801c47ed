"""A value head: hidden states of the policy → the reward that is still to come. No second model, no logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trueup.errors import ModelError

log = logging.getLogger("trueup")

VALUE_HEAD_FILE = "value_head.safetensors"
_STANDARD = "v_head.summary."  # TRL's module, and so LLaMA-Factory's file of this name


class ValueHead(nn.Module):
    """One linear map in fp32, zero at the start: before the first step every value is 0, whatever the model says."""

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] hidden states → [N] values, fp32."""
        return self.linear(hidden.float()).squeeze(-1)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Its parameters under the names that checkpoints know them by."""
        return {f"value_head.{name}": parameter for name, parameter in self.named_parameters()}

    def save(self, directory: Path) -> None:
        """Write it beside the model, for those who want to go on with it; an answering model needs none."""
        tensors = {f"{_STANDARD}{name}": t.detach().cpu().contiguous() for name, t in self.linear.state_dict().items()}
        save_file(tensors, directory / VALUE_HEAD_FILE, {"format": "pt"})

    def start_from(self, places: Sequence[str | Path]) -> None:
        """Go on with the head of the last of these directories that has one, and say so.

        Raises:
            ModelError: its file is broken, or of a model of another width.
        """
        files = [Path(place) / VALUE_HEAD_FILE for place in places]
        found = next((file for file in reversed(files) if file.is_file()), None)
        if found is None:
            return
        try:
            tensors = {name.removeprefix(_STANDARD): tensor.float() for name, tensor in load_file(found).items()}
            self.linear.load_state_dict(tensors)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"the value head does not fit: {error}", where=str(found),
                expected=f"{_STANDARD}weight of {self.linear.in_features} numbers and {_STANDARD}bias",
                fix="move the file away, and the head starts at 0",
            ) from error  # fmt: skip
        log.info("the value head goes on from %s", found)
