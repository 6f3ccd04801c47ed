"""A value head: hidden states of the policy → the reward that is still to come. No second model, no logits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

VALUE_HEAD_FILE = "value_head.safetensors"


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
        save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()},
                  directory / VALUE_HEAD_FILE, {"format": "pt"})  # fmt: skip
