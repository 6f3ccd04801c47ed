"""What a preference run costs elsewhere: its model against the one it started from, in a few bounded measurements.

The start is measured before the first step, while the policy still is the start, so that no second model is needed. Its
answers are drawn at temperature 1; KL(start ‖ now) is then the mean over their tokens of r − 1 − log r, r = π_now /
π_start: unbiased, and never negative (Schulman 2020, k3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trueup.builtin import BUILTIN_DATA
from trueup.config.losses import STAGE_LOSSES
from trueup.config.methods import ONLINE
from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared
from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import build_forest
from trueup.data.templates import ChatTemplate
from trueup.models.policy import Policy
from trueup.recipes.evaluation.fluency import distinct, refuses, repetition
from trueup.recipes.pairs import without_dropout
from trueup.rollout.engines import Engine, Sampling
from trueup.training.backend import Backend
from trueup.training.run_directory import RunDirectory

PROMPTS, LONGEST_PROMPT, ANSWER_TOKENS = 16, 512, 64
TEXT_TOKENS = 1024
PLAIN_TEXT = BUILTIN_DATA / "plain_text.txt"
_ROWS = 8  # that go through the model together

#: figure → what it is.
_LINES = {
    "perplexity": "perplexity of plain text",
    "tokens": f"tokens of an answer (at most {ANSWER_TOKENS})",
    "distinct_2": "different pairs of words",
    "repetition": "4-grams said again",
    "refusals": "refusals",
}


@dataclass(frozen=True)
class Snapshot:
    """A policy at one moment: its figures, and its log-probabilities of the start's answers [N]."""

    figures: dict[str, float]
    logps: Tensor


class Regression:
    """Measures a run's policy at its start and at its end. Only the first process does; nothing random moves."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, seed: int) -> None:
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.engine = Engine(policy, tokenizer, prepared.template.stop_ids)
        self.texts = plain_texts(tokenizer, prepared.template)
        self.prompts = pick_prompts(prepared)
        self.said: list[Encoded] = []  # the start's own answers
        self.start = self._measure()

    def compare(self) -> dict[str, float]:
        """The figures now and at the start, under the names of the run's results."""
        now = self._measure()
        found: dict[str, float] = {}
        for name, value in now.figures.items():
            found |= {f"regression_{name}": value, f"regression_{name}_start": self.start.figures[name]}
        if len(self.start.logps):
            d = now.logps - self.start.logps
            found["regression_kl"] = float((torch.expm1(d) - d).mean())
        return found

    def _measure(self) -> Snapshot:
        figures: dict[str, float] = {}
        if self.texts:
            logps = self._logps(self.texts)
            figures["perplexity"] = math.exp(min(-float(logps.double().mean()), 700.0))
        if self.prompts:
            figures |= self._speak()
        return Snapshot(figures, self._logps(self.said))

    def _speak(self) -> dict[str, float]:
        seeds = [self.seed + i for i in range(len(self.prompts))]
        sampling = Sampling(temperature=1.0, max_new_tokens=ANSWER_TOKENS)
        drawn = [group[0] for group in self.engine.sample(self.prompts, sampling, 1, seeds)]
        if not self.said:
            self.said = [
                Encoded(str(i), prompt, (Answer(answer.ids, np.ones(len(answer.ids), bool)),))
                for i, (prompt, answer) in enumerate(zip(self.prompts, drawn, strict=True))
            ]
        texts = [self.tokenizer.decode(a.ids[: len(a.ids) - a.ended], skip_special_tokens=True) for a in drawn]
        return {
            "tokens": float(np.mean([len(answer.ids) for answer in drawn])),
            "distinct_2": distinct(texts, 2),
            "repetition": float(np.mean([repetition(text) for text in texts])),
            "refusals": float(np.mean([refuses(text) for text in texts])),
        }

    @torch.no_grad()
    def _logps(self, examples: Sequence[Encoded]) -> Tensor:
        parts = [torch.zeros(0)]
        with without_dropout(self.policy):
            for start in range(0, len(examples), _ROWS):
                parts.append(self.policy.token_logps(build_forest(examples[start : start + _ROWS])).float().cpu())
        return torch.cat(parts)


def begin(
    cfg: RunConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, backend: Backend
) -> Regression | None:
    """Measure the start of a preference run; None for other runs, other processes, and where it is turned off."""
    prefers = cfg.objective.stage in (*STAGE_LOSSES, *ONLINE)
    if not (cfg.train.regression_report and prefers) or backend.rank or not policy.base.can_generate():
        return None
    return Regression(policy, tokenizer, prepared, cfg.train.seed)


def end(regression: Regression | None, run: RunDirectory, console: Console) -> dict[str, float]:
    """Measure the end, write regression_results.json, and say it in a few lines."""
    if regression is None:
        return {}
    found = regression.compare()
    if not found:
        return {}
    run.write_results("regression", found)
    console.print(render(found, len(regression.prompts)), markup=False, highlight=False)
    for text in warnings_of(found):
        run.warn(text)
    return found


def render(found: dict[str, float], prompts: int) -> str:
    """The report: one line a figure, from the start to now."""
    lines = [f"against the start, on {prompts} prompts of the data and some plain text:"]
    for name, label in _LINES.items():
        if f"regression_{name}" in found:
            lines.append(f"  {label:<38}{found[f'regression_{name}_start']:>8.4g} → {found[f'regression_{name}']:.4g}")
    if "regression_kl" in found:
        lines.append(f"  {'KL to the start, nats a token':<38}{found['regression_kl']:>8.4g}")
    return "\n".join(lines)


def warnings_of(found: dict[str, float]) -> list[str]:
    """What of it a user should look at."""

    def both(name: str) -> tuple[float, float]:
        return found.get(f"regression_{name}_start", 0.0), found.get(f"regression_{name}", 0.0)

    checks: list[tuple[str, Callable[[float, float], Any], str]] = [
        ("perplexity", lambda a, b: b > 1.25 * a > 0, "plain text is less likely (perplexity {0:.4g} → {1:.4g})"),
        ("repetition", lambda a, b: b > a + 0.15, "answers repeat themselves more ({0:.0%} → {1:.0%} of 4-grams)"),
        ("refusals", lambda a, b: b > a + 0.25, "more answers refuse ({0:.0%} → {1:.0%})"),
        ("distinct_2", lambda a, b: b < 0.6 * a, "answers have become uniform (distinct-2 {0:.2f} → {1:.2f})"),
    ]  # fmt: skip
    return [
        f"{text.format(*both(name))}: the run may have cost more than it won. Compare with `trueup eval`; lower "
        "learning_rate or raise pref_beta for less"
        for name, worse, text in checks
        if worse(*both(name))
    ]


def plain_texts(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[Encoded]:
    """The built-in plain text, paragraph by paragraph, as far as it is to be read."""
    found = []
    prefix = np.array(template.plain_prefix, dtype=np.int32)
    paragraphs = PLAIN_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    share = TEXT_TOKENS // len(paragraphs)
    for number, paragraph in enumerate(paragraphs):
        ids = np.array(tokenizer(paragraph, add_special_tokens=False)["input_ids"][:share], dtype=np.int32)
        if len(prefix) + len(ids) > 1:
            found.append(Encoded(f"text:{number}", prefix, (Answer(ids, np.ones(len(ids), bool)),)))
    return found


def pick_prompts(prepared: Prepared) -> list[np.ndarray]:
    """Prompts of the run, held-out ones where there are any, evenly spread; long ones are left out."""
    held_out = [(dataset, i) for dataset in prepared.eval.values() for i in range(len(dataset))]
    rows = held_out or [(prepared.train, i) for i in range(len(prepared.train))]
    lengths = [int(dataset.prompt_lengths[i]) for dataset, i in rows]
    usable = [row for row, length in zip(rows, lengths, strict=True) if 0 < length <= LONGEST_PROMPT]
    chosen = np.unique(np.linspace(0, len(usable) - 1, min(PROMPTS, len(usable))).round().astype(int)) if usable else []
    return [usable[i][0][usable[i][1]].prompt for i in chosen]
