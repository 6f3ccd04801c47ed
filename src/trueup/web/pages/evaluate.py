"""Evaluate: models measured side by side by `trueup eval`, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import ui

from trueup.config.evaluating import READ_WITH, START, overruled
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.errors import ConfigError
from trueup.training.run_files import RUN_FILE, read_config
from trueup.web import charts
from trueup.web.chore_view import ChorePage, chores_list, files, table
from trueup.web.chores import Chores
from trueup.web.draft import Draft
from trueup.web.frame import card
from trueup.web.pages import page
from trueup.web.results import SHARES, Evaluation, Interval
from trueup.web.verb_form import VerbForm
from trueup.web.view import View

_SHOWN_FILES = ("eval_report.html", "eval_report.md", "eval_report.json", "eval_answers.jsonl", "eval_data_report.json")


@page("/evaluate", icon="fact_check", order=70)
def evaluate(view: View) -> None:
    """The form, and below it what was measured."""
    form = EvaluateForm(view)
    form.build()
    t = view.t
    chores_list(view, form.chores, "/evaluation", t("evaluate.list"), t("evaluate.none"), "fact_check")


@page("/evaluation/{chore:path}", icon="fact_check", order=71, below="/evaluate", title="evaluate.one")
def evaluation(view: View) -> None:
    """One evaluation."""
    ChorePage(view, Chores(view.workspace, "eval"), "/evaluate", partial(_result, view)).build()


class EvaluateForm(VerbForm):
    """Its models are words of the command where they are directories here: then the first run's config says what is
    unset, and its start is measured beside it."""

    verb, words, address, out = "eval", "evaluate", "/evaluation", "output_dir"
    reads, hidden = READ_WITH, ("task_dir", "save_dir")
    front = {
        "models": ("eval_models", "model_name_or_path", "adapter_name_or_path"),
        "data": ("eval_dataset", "stage", "max_samples", "cutoff_len"),
        "measures": ("eval_measures", "eval_prompts", "max_new_tokens", "temperature", "bootstrap_samples"),
        "judges": ("rank_by", "judge_model", "reward_model", "reward_funcs", "rule_regex", "task", "task_limit"),
    }

    def of_run(self, run_id: str) -> dict[str, str]:
        path = self.place.run(run_id)
        if not (path / RUN_FILE).is_file():
            raise ConfigError(f"{run_id} has no {RUN_FILE}")
        return {"eval_models": self.place.output_dir(run_id)}

    def usual(self) -> str:
        models = _listed(self.draft.values.get("eval_models"))
        last = models[-1].partition("#")[0].removeprefix("./") if models else ""
        if last.startswith("saves/"):
            return f"{last}/eval"
        name = last or self.draft.values.get("model_name_or_path", "model")
        return f"saves/{name.rstrip('/').rpartition('/')[2].replace('builtin:', '').replace(':', '-')}/eval"

    def command_words(self) -> list[str]:
        directories, rest = self._split()
        return [*directories, *rest.words()]

    def read(self, words: Sequence[str]) -> RunConfig:
        """As `trueup eval` takes them: the first run's config below, its start beside the directories."""
        directories, rest = self._split()
        source = Path(directories[0]) / RUN_FILE if directories else None
        there = source is not None and (self.place.root / source).is_file()
        known = {**(read_config(self.place.root / directories[0]) if there else {}), **rest.values}
        models = [START] * ("model_name_or_path" in known) + directories if directories else []
        named = [f"eval_models={','.join(models)}"] if models else []
        file = str(self.place.root / source) if source is not None and there else None
        return load_config(file, [*rest.words(), *named, *overruled(rest.values, known)], verb="eval")

    def _split(self) -> tuple[list[str], Draft]:
        """(directories here, all other keys)."""
        values = dict(self.draft.values)
        models = _listed(values.get("eval_models"))
        if not models or not all((self.place.root / name).is_dir() for name in models):
            return [], Draft(values)
        values.pop("eval_models")
        return models, Draft(values)


def _listed(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(",") if part.strip()]


# --- what was found ------------------------------------------------------------------------------


def _result(view: View, folder: Path) -> None:
    found, t = Evaluation.read(folder), view.t
    if found.notes():
        for note in found.notes():
            ui.label(note).classes("notice")
    figures = found.figures()
    _shares(view, found, figures)
    with card(t("evaluate.figures"), note=t("evaluate.intervals")):
        rows = [[_name(view, name), *(one.shown() if one else "–" for one in of)] for name, of in figures.items()]
        table(["", *found.models], rows, label=t("evaluate.figures"))
    _differences(view, found)
    _duels(view, found)
    for part in ("groups", "tasks"):
        if of := found.figures(part):
            with card(t(f"evaluate.{part}")):
                rows = [[name, *(one.shown() if one else "–" for one in values)] for name, values in of.items()]
                table(["", *found.models], rows, label=t(f"evaluate.{part}"))
    _answers(view, found)
    with ui.element("div").classes("grid-2 results-end"):
        with card(t("evaluate.facts")):
            table(["", ""], [[view.maybe(f"evaluate.fact_{k}") or k, v] for k, v in found.facts()],
                  label=t("evaluate.facts"))  # fmt: skip
        files(view, folder, _SHOWN_FILES)


def _shares(view: View, found: Evaluation, figures: dict[str, list[Interval | None]]) -> None:
    """Accuracies with their intervals, models beside each other."""
    shown = {name: figures[name] for name in SHARES if any(figures.get(name, []))}
    if not shown:
        return
    title = view.t("evaluate.shares")
    series = {
        model: [_ends(of[number]) for of in shown.values()] for number, model in enumerate(found.models)
    }  # fmt: skip
    with card(title, note=view.t("evaluate.shares_note")):
        charts.chart(charts.intervals([_name(view, name) for name in shown], series, middle=0.5), title)


def _ends(one: Interval | None) -> tuple[float, float, float] | None:
    if one is None:
        return None
    return one.value, one.value if one.low is None else one.low, one.value if one.high is None else one.high


def _differences(view: View, found: Evaluation) -> None:
    t, rows = view.t, []
    for model, name, one in found.differences():
        word = ""
        if one.low is not None and one.high is not None:
            word = t("evaluate.higher" if one.low > 0 else "evaluate.lower" if one.high < 0 else "evaluate.same")
        rows.append([_name(view, name), model, one.shown("+"), word])
    if rows:
        title = t("evaluate.less", model=found.models[0])
        with card(title):
            table(["", t("evaluate.model"), t("evaluate.difference"), ""], rows, label=title)


def _duels(view: View, found: Evaluation) -> None:
    t = view.t
    rows = [
        [model, rate.shown(), equal.shown() if equal else "–", " / ".join(map(str, counts))]
        for model, rate, equal, counts in found.duels()
    ]
    if rows:
        title = t("evaluate.duels", model=found.models[0])
        with card(title):
            table([t("evaluate.model"), t("evaluate.win_rate"), t("evaluate.equal_length"), t("evaluate.won")], rows,
                  label=title)  # fmt: skip


def _answers(view: View, found: Evaluation) -> None:
    """What the models answered, side by side."""
    if not found.asked:
        return
    with card(view.t("evaluate.answers", count=len(found.asked))), ui.element("div").classes("exchanges"):
        for one in found.asked:
            with ui.element("section").classes("exchange"):
                with ui.element("div").classes("question"):
                    ui.label(_last(one.get("prompt"))).classes("answer-text")
                with ui.element("div").classes("answers"):
                    for number, (name, text) in enumerate(one.get("answers", {}).items()):
                        _answer(view, name, text, number)


def _answer(view: View, name: str, text: Any, number: int) -> None:
    with ui.element("article").classes("answer"):
        with ui.element("header").classes("answer-head"):
            ui.element("span").classes(f"answer-dot answer-dot-{number % 8 + 1}")
            ui.label(name).classes("answer-name")
        ui.label(str(text) if text else view.t("chat.nothing")).classes("answer-text" + ("" if text else " muted"))


def _last(prompt: Any) -> str:
    """The last turn of a prompt."""
    turns = prompt if isinstance(prompt, list) else []
    return str(turns[-1].get("content", "")) if turns and isinstance(turns[-1], dict) else str(prompt or "")


def _name(view: View, figure: str) -> str:
    """A figure in words."""
    return view.maybe(f"evaluate.figure_{figure}") or figure.removeprefix("answers/")
