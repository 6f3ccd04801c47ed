"""`trueup quickstart`: align the built-in model on the bundled pairs, and show its answers before and after."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trueup.builtin import BUILTIN_DATA, QUICKSTART_CONFIG
from trueup.builtin.sql import Grade, Task, grade, read_tasks
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.encode import run_template
from trueup.data.examples import Message
from trueup.errors import DivergenceError
from trueup.models.load import load_for_inference, load_tokenizer
from trueup.recipes.check import check
from trueup.recipes.offline import run
from trueup.rollout.engines import Engine, Sampling

SHOWN = 3  # answers printed side by side


@dataclass(frozen=True)
class QuickstartResult:
    """What changed, on held-out requests."""

    before: Grade
    after: Grade
    accuracy: float  # held-out preference accuracy
    train_seconds: float
    output_dir: Path

    @property
    def success(self) -> bool:
        """The bar the project holds itself to."""
        return self.accuracy >= 0.95 and self.after.all >= 0.90 and self.before.formatted <= 0.05


def quickstart(overrides: Sequence[str] = (), console: Console | None = None, requests: int = 100) -> QuickstartResult:
    """Check, train DPO with LoRA, evaluate on held-out prompts, show, and say what to do next.

    Args:
        overrides: words as on the command line (`output_dir=…`, `--max_steps 10`).
        requests: held-out requests answered before and after.

    Raises:
        DivergenceError: the model did not learn what the bundled pairs teach.
    """
    console = console or Console()
    cfg = load_config(QUICKSTART_CONFIG, [*overrides, "new_run=true"])
    console.print("[bold]1/4 check[/]")
    console.print(check(cfg).render(), highlight=False, markup=False)
    tasks = heldout(requests)
    console.print(f"\n[bold]2/4 before:[/] {cfg.model.model_name_or_path} answers {len(tasks)} held-out requests")
    before_texts = answer(cfg, tasks)
    console.print("\n[bold]3/4 train[/]")
    started = time.monotonic()
    result = run(cfg)
    seconds = time.monotonic() - started
    console.print(f"\n[bold]4/4 after:[/] the trained adapter in {result.output_dir} answers the same requests")
    after_texts = answer(cfg, tasks, result.output_dir)
    outcome = QuickstartResult(
        grade(before_texts, tasks), grade(after_texts, tasks),
        result.metrics["eval_rewards/accuracies"], seconds, result.output_dir,
    )  # fmt: skip
    show(console, cfg, outcome, tasks, before_texts, after_texts)
    if not outcome.success:
        raise DivergenceError(
            f"the quickstart did not reach its bar: accuracy {outcome.accuracy:.2f} (≥ 0.95), formatted, commented "
            f"and right {outcome.after.all:.0%} (≥ 90 %), formatted before {outcome.before.formatted:.0%} (≤ 5 %)",
            fix="with changed settings this can happen: run `trueup quickstart` without overrides",
        )
    return outcome


def heldout(count: int) -> list[Task]:
    """Held-out tasks, the same ones every time."""
    tasks = read_tasks(BUILTIN_DATA / "sql_heldout.jsonl")
    return random.Random(0).sample(tasks, min(count, len(tasks)))


def answer(cfg: RunConfig, tasks: Sequence[Task], adapter: Path | None = None) -> list[str]:
    """Greedy answers of the base, or of the base with a trained adapter."""
    model = cfg.model.model_copy(update={"adapter_name_or_path": [str(adapter)] if adapter else []})
    tokenizer = load_tokenizer(model)
    template = run_template(cfg, tokenizer)
    policy = load_for_inference(model, cfg.train)
    prompts = [template.encode_prompt((Message("user", task.request),), None) for task in tasks]
    return Engine(policy, tokenizer, template.stop_ids).generate_text(prompts, Sampling(max_new_tokens=160))


def show(
    console: Console,
    cfg: RunConfig,
    outcome: QuickstartResult,
    tasks: Sequence[Task],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Answers side by side, the figures, and the next three commands."""
    for i in range(min(SHOWN, len(tasks))):
        table = Table(title=tasks[i].request, title_justify="left", title_style="bold cyan", expand=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(before[i], after[i])
        console.print(table, markup=False)
    figures = Table(title=f"{outcome.after.count} held-out requests, greedy", title_justify="left")
    figures.add_column("")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right")
    for label, name in (
        ("formatted", "formatted"), ("commented", "commented"), ("right (executed)", "right"), ("all three", "all"),
    ):  # fmt: skip
        figures.add_row(label, f"{getattr(outcome.before, name):.0%}", f"{getattr(outcome.after, name):.0%}")
    figures.add_row("preference accuracy (before: all ties)", "50%", f"{outcome.accuracy:.0%}")
    console.print(figures)
    console.print(
        f"trained in {outcome.train_seconds:.0f} s; everything is in {outcome.output_dir}\n",
        highlight=False,
    )
    base, adapter = cfg.model.model_name_or_path, outcome.output_dir
    console.print("[bold]next[/]")
    for command in (
        f"trueup chat --model_name_or_path {base} --adapter_name_or_path {adapter} --compare",
        f"trueup runs {outcome.output_dir.parent}",
        "trueup init --stage dpo my_dpo.yaml",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
