"""A few texts that a model is asked about before and after it is written, and how far its answers are apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Message
from trueup.data.rendering import TemplateRefusal

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and 12 others follow it.",
    "你好，今天我们来写一个查询：按年龄排列所有用户。",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
_LONGEST = 64  # tokens of a row
_ANY = 48  # tokens drawn from the whole vocabulary, so that every kind of row of the embeddings is met

Rows = list[Tensor]


def probe_rows(tokenizer: Any, template: ChatTemplate | None, vocabulary: int) -> Rows:
    """Token ids of a few texts, of a chat, and of a row of any tokens of `vocabulary`."""
    rows = [tokenizer(text, add_special_tokens=True).input_ids[:_LONGEST] for text in _TEXTS]
    if template is not None:
        with suppress(TemplateRefusal):  # one that wants a system turn, say: the other rows do
            rows.append(template.encode_prompt((Message("user", _TEXTS[0]),))[:_LONGEST])
    generator = torch.Generator().manual_seed(0)
    rows.append(torch.randint(vocabulary, (_ANY,), generator=generator).tolist())
    return [torch.tensor(row) for row in rows if row]


@torch.inference_mode()
def ask(model: nn.Module, rows: Rows) -> list[Tensor]:
    """Logits [T, V] of each row (of a reward model its score [1]), in fp32 on the CPU, one row at a time."""
    device = next(model.parameters()).device
    answers = [model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in rows]
    return [answer.float().cpu() for answer in answers]


@dataclass(frozen=True)
class Difference:
    """How far two models' answers to the probe are apart.

    Attributes:
        largest: of |a − b| over all logits.
        scale: of |a|, the largest, for comparison.
        agreement: share of positions whose likeliest token is the same; None of a reward model.
    """

    largest: float
    scale: float
    agreement: float | None

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-12)

    def within(self, tolerance: float) -> bool:
        """Whether it is at most this share of the scale. What is not finite is not."""
        return self.relative <= tolerance

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", likeliest token the same at {self.agreement:.1%} of positions"
        return f"{self.largest:.3g} (logits reach {self.scale:.3g}{same})"


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """Of two models' answers to the same rows."""
    largest = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    scale = max(float(a.abs().max()) for a in before)
    if before[0].dim() < 2:
        return Difference(largest, scale, None)
    same = [(a.argmax(-1) == b.argmax(-1)) for a, b in zip(before, after, strict=True)]
    return Difference(largest, scale, float(torch.cat(same).float().mean()))
