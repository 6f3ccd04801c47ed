"""Label: two answers, blind and in chance order, by keyboard; how far people agree; datasets of what they chose."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

from nicegui import run as background
from nicegui import ui
from nicegui.events import KeyEventArguments

from trueup.data.inventory import Inventory, inventory
from trueup.errors import ConfigError, Problem, UserError
from trueup.web.agreement import Share, agreement
from trueup.web.frame import all_well, button, card, empty, figure, heading, problems, row
from trueup.web.judged import Kind, items_of, rows_of, verdicts, write_dataset
from trueup.web.labels import SKIP, TIE, Choice, Label, Project, Turn, projects, text_of, tidy_name
from trueup.web.onward import train_address
from trueup.web.pages import page
from trueup.web.rows import open_table, spec_of
from trueup.web.texts import Pieces, conversation, differences
from trueup.web.view import View
from trueup.web.workspace import check_id

REFRESH_SECONDS = 1.0
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
_KINDS: dict[str, tuple[Kind, str]] = {"dpo": ("pair", "pair"), "kto": ("feedback", "feedback")}
_KEYS: dict[str, str] = {
    "ArrowLeft": "left", "1": "left", "ArrowRight": "right", "2": "right", "t": "tie", "=": "tie", "s": "skip",
    "u": "undo", "Backspace": "undo",
}  # fmt: skip


@page("/label", icon="how_to_vote", order=60)
async def label(view: View) -> None:
    """Every project, and how another is begun."""
    t, root = view.t, view.workspace.root
    heading(view, t("label.title"), note=t("label.note"))
    names = projects(root)
    if names:
        with card(t("label.projects")):
            for name in names:
                _entry(view, Project(root, name))
    try:
        found = await background.io_bound(inventory, root / "data") or Inventory([])
    except UserError as error:
        found = Inventory([])
        problems(error.problems)
    pairs = [item.name for item in found.items if item.kind in ("pair", "ranking") and _is_here(item)]
    _new_project(view, pairs, set(names))


def _is_here(item: Any) -> bool:
    return item.group != "well-known" or item.copy is not None


def _entry(view: View, project: Project) -> None:
    """A project in a line."""
    people = sorted({label.annotator for label in project.labels.values()})
    with ui.link(target=f"/label/{quote(project.name)}").classes("project"):
        ui.label(project.name).classes("project-name")
        ui.label(view.t("label.pairs", count=f"{len(project.items):,}")).classes("muted small number")
        ui.label(view.t("label.given", count=f"{len(project.labels):,}")).classes("muted small number")
        ui.label(", ".join(filter(None, people))).classes("muted small project-people")


def _new_project(view: View, pairs: list[str], taken: set[str]) -> None:
    t, place = view.t, view.workspace
    asked = view.query.get("dataset")
    first = asked if asked in pairs else (pairs[0] if pairs else None)

    with card(t("label.new"), note=t("label.new_note")):
        with ui.element("div").classes("fields"):
            data = ui.select(pairs, value=first, label=t("label.dataset"), with_input=True).props("outlined dense")
            name = ui.input(t("label.name"), value=_free(first or "labels", taken)).props("outlined dense")
            count = ui.number(t("label.count"), value=100, min=1, max=100_000, precision=0).props("outlined dense")
            shares = {share: f"{share:.0%}" for share in _SHARES}
            repeats = ui.select(shares, value=0.1, label=t("label.repeats")).props("outlined dense")
        data.on_value_change(lambda event: name.set_value(_free(str(event.value or "labels"), taken)))
        wrong = ui.element("div").classes("stack label-wrong")

        async def begin() -> None:
            wrong.clear()
            try:
                wanted = str(name.value or "").strip()
                if wanted in projects(place.root):
                    raise ConfigError(t("label.taken", name=wanted))
                project = Project(place.root, wanted)
                table = await background.io_bound(open_table, spec_of(place.root, str(data.value)))
                assert table
                items = await background.io_bound(items_of, table, int(count.value or 100)) or []
                project.set_up(float(repeats.value or 0.0))
                project.add_items(items)
            except UserError as error:
                with wrong:
                    problems(error.problems)
                return
            view.open(f"/label/{quote(wanted)}")

        button(t("label.begin"), begin, icon="play_arrow", kind="primary").set_enabled(bool(pairs))


def _free(name: str, taken: set[str]) -> str:
    """A name that no project has."""
    plain = name.replace("/", "-")
    number, free = 1, plain
    while free in taken:
        number += 1
        free = f"{plain}-{number}"
    return free


@page("/label/{project}", icon="how_to_vote", order=61, below="/label", title="label.title")
def one(view: View) -> None:
    """A project: questions, or what came of them."""
    name = view.path["project"]
    check_id(name)
    if name not in projects(view.workspace.root):
        raise ConfigError(f"there is no project {name!r}")
    project = Project(view.workspace.root, name)
    results = view.query.get("tab") == "results"
    with heading(view, name, note=view.t("label.pairs", count=f"{len(project.items):,}")):
        other = "label.to_questions" if results else "label.to_results"
        query = {key: value for key, value in view.query.items() if key != "tab"} | (
            {} if results else {"tab": "results"}
        )
        button(view.t(other), lambda: view.open(view.address, **query), icon="quiz" if results else "insights")
    if project.torn:
        ui.label(view.t("label.torn", count=project.torn)).classes("notice small")
    if results:
        Results(view, project).build()
    else:
        Questions(view, project).build()


class Questions:
    """One person at a project. What they see comes from the files, so that two tabs ask nothing twice."""

    def __init__(self, view: View, project: Project) -> None:
        self.view, self.project = view, project
        self.annotator = tidy_name(view.query.get("as", ""))
        self.turn: Turn | None = None
        self.shown = 0.0

    def build(self) -> None:
        """Who is there, and then the first question."""
        if not self.annotator:
            self._ask_name()
            return
        t = self.view.t
        with card():
            with ui.element("div").classes("label-progress"):
                self.bar = ui.linear_progress(0, show_value=False, size="6px").props("rounded color=primary")
                self.bar.props["aria-label"] = t("label.progress")
                self.count = ui.label("").classes("muted small number").props("role=status")
                ui.label(self.annotator).classes("badge")
            self.question = ui.element("div").classes("stack").props("aria-live=polite")
        self.differences = self.view.query.get("diff") == "1"
        self._next()
        keys = ui.keyboard(self._key, repeating=False, ignore=["input", "select", "textarea"])
        keys.props["aria-hidden"] = "true"
        ui.timer(REFRESH_SECONDS, self._look)

    def _ask_name(self) -> None:
        t = self.view.t
        with card(t("label.who"), note=t("label.who_note")):
            name = ui.input(t("label.annotator")).props("outlined dense autofocus maxlength=60").classes("label-name")

            def start() -> None:
                if tidy_name(str(name.value or "")):
                    self.view.open(self.view.address, **{**self.view.query, "as": tidy_name(str(name.value))})

            name.on("keydown.enter", start)
            button(t("label.start"), start, icon="play_arrow", kind="primary")

    # --- asking ------------------------------------------------------------------------------

    def _look(self) -> None:
        """What other tabs have done since."""
        changed = self.project.refresh()
        if self.turn and self.project.is_answered(self.annotator, self.turn):
            ui.notify(self.view.t("label.elsewhere"))
            self._next()
        elif changed:
            self._progress()
            if self.turn is None:
                self._next()

    def _next(self) -> None:
        self.turn = self.project.next(self.annotator)
        self.shown = time.monotonic()
        self._progress()
        self._show()

    def _progress(self) -> None:
        done, asked = self.project.progress(self.annotator)
        self.bar.set_value(done / asked if asked else 1.0)
        self.count.set_text(self.view.t("label.done", done=f"{done:,}", asked=f"{asked:,}"))

    def _show(self) -> None:
        t = self.view.t
        self.question.clear()
        with self.question:
            if self.turn is None:
                with empty("task_alt", t("label.finished")), row():
                    button(t("label.undo"), lambda: self._answer("undo"), icon="undo")
                    results = {**self.view.query, "tab": "results"}
                    button(t("label.to_results"), lambda: self.view.open(self.view.address, **results), icon="insights",
                           kind="primary")  # fmt: skip
                return
            conversation(self.view, self.turn.item.prompt)
            with ui.element("div").classes("sides choices"):
                texts = [text_of(self.turn.item.answers[number]) for number in self.turn.order[:2]]
                pieces = differences(*texts) if self.differences else None
                for side, text in enumerate(texts):
                    with ui.element("section").classes("choice").props(f'aria-label="{t(f"label.answer_{side}")}"'):
                        ui.label("AB"[side]).classes("choice-name").props("aria-hidden=true")
                        if pieces:
                            Pieces(pieces[side]).classes("prose")
                        else:
                            ui.label(text).classes("choice-text")
            self._buttons()

    def _buttons(self) -> None:
        t = self.view.t
        with ui.element("div").classes("verdicts"):
            for what, key, icon in (
                ("left", "←", None), ("tie", "T", None), ("right", "→", None), ("skip", "S", "skip_next"),
                ("undo", "U", "undo"),
            ):  # fmt: skip
                quiet = "quiet" if what in ("skip", "undo") else "plain"
                made = button(t(f"label.{what}"), lambda what=what: self._answer(what), icon=icon, kind=quiet)
                made.classes("verdict")
                with made:
                    ui.label(key).classes("key").props("aria-hidden=true")
            switch = ui.switch(t("label.differences"), value=self.differences).classes("verdict-switch")
            switch.on_value_change(self._toggle)

    def _toggle(self, event: Any) -> None:
        self.differences = bool(event.value)
        self.view.remember(diff="1" if self.differences else None)
        self._show()

    # --- answering ---------------------------------------------------------------------------

    def _key(self, event: KeyEventArguments) -> None:
        modifiers = event.modifiers
        if event.action.keydown and not (modifiers.ctrl or modifiers.meta or modifiers.alt):
            what = _KEYS.get(event.key.name) or _KEYS.get(event.key.name.lower())
            if what:
                self._answer(what)

    def _answer(self, what: str) -> None:
        """Keep an answer on the disk, and ask the next."""
        try:
            if what == "undo":
                self.project.undo(self.annotator)
            elif self.turn:
                choices: dict[str, Choice] = {"tie": TIE, "skip": SKIP}
                shown = self.turn.order[:2]
                choice = choices.get(what, shown[what == "right"])
                seconds = time.monotonic() - self.shown
                said = Label(self.turn.item.id, choice, self.annotator, self.turn.round, shown, seconds)
                if not self.project.add(said):
                    ui.notify(self.view.t("label.elsewhere"))
        except UserError as error:
            with self.question:
                problems(error.problems)
            return
        self._next()


class Results:
    """What came of a project: figures, and datasets."""

    def __init__(self, view: View, project: Project) -> None:
        self.view, self.project = view, project

    def build(self) -> None:
        """Figures as they are now, looked at again every few seconds."""
        self.figures = ui.element("div")
        self._figures()
        self._export()
        ui.timer(3 * REFRESH_SECONDS, lambda: self._figures() if self.project.refresh() else None)

    def _figures(self) -> None:
        t, found = self.view.t, agreement(self.project)
        self.figures.clear()
        with self.figures:
            with ui.element("div").classes("grid-4 figures"):
                figure(t("label.labels"), f"{found.labels:,}", note=t("label.ties", ties=found.ties, skips=found.skips))
                for name, share in (("self", found.repeats), ("between", found.between), ("data", found.data)):
                    note = self._of(share)
                    if name == "between" and found.alpha is not None:
                        note += f" · α = {found.alpha:.2f}"
                    figure(t(f"label.agree_{name}"), _percent(share), note=note)
            if found.people:
                with card(t("label.people")):
                    self._table(
                        [t("label.annotator"), t("label.answered"), t("label.left_share"), t("label.seconds")],
                        [
                            [person.name or "–", f"{person.done:,} / {person.asked:,}",
                             f"{_percent(person.left)} ({self._of(person.left)})", f"{person.seconds:.1f} s"]
                            for person in found.people
                        ],
                    )  # fmt: skip
            if found.sources:
                with card(t("label.sources")):
                    rows = [[name, _percent(share), self._of(share)] for name, share in found.sources.items()]
                    self._table([t("label.source"), t("label.won"), ""], rows)

    def _of(self, share: Share) -> str:
        return self.view.t("label.of", same=share.same, of=share.of) if share.of else self.view.t("label.none_yet")

    def _table(self, names: list[str], rows: list[list[str]]) -> None:
        columns = [
            {"name": str(n), "label": name, "field": str(n), "align": "left" if n == 0 else "right"}
            for n, name in enumerate(names)
        ]
        values = [{"id": number, **{str(n): cell for n, cell in enumerate(cells)}} for number, cells in enumerate(rows)]
        ui.table(columns=columns, rows=values, row_key="id").classes("data-table").props("flat hide-bottom")

    def _export(self) -> None:
        t = self.view.t
        kinds = {name: t(f"label.as_{name}") for name in _KINDS}
        with card(t("label.export"), note=t("label.export_note")):
            with ui.element("div").classes("settings"):
                self.kind = ui.toggle(kinds, value="dpo").props("no-caps unelevated dense")
                self.name = ui.input(t("label.as_name"), value=f"{self.project.name}_dpo").props("outlined dense")
                button(t("label.write"), self._write, icon="save", kind="primary")
                button(t("label.download"), self._download, icon="download")
            self.said = ui.element("div").classes("stack").props("aria-live=polite")
        self.kind.on_value_change(lambda event: self.name.set_value(f"{self.project.name}_{event.value}"))

    def _write(self) -> None:
        kind, rows_kind = _KINDS[str(self.kind.value)]
        name = str(self.name.value or "").strip()
        self.project.refresh()
        self.said.clear()
        with self.said:
            try:
                path, count = write_dataset(self.view.workspace, self.project, kind, name)
            except UserError as error:
                problems(error.problems)
                return
            all_well(self.view.t("label.written", count=f"{count:,}", file=f"data/{path.name}"))
            self._left_out(kind)
            with row():
                button(self.view.t("label.look"), lambda: self.view.open(f"/data/{quote(name)}"), icon="dataset")
                address = train_address(self.view.workspace, name, rows_kind)
                button(self.view.t("dataset.train"), lambda: ui.navigate.to(address), icon="model_training")

    def _download(self) -> None:
        kind, _ = _KINDS[str(self.kind.value)]
        self.project.refresh()
        rows = rows_of(verdicts(self.project, kind))
        self.said.clear()
        with self.said:
            if not rows:
                problems([Problem(self.view.t("label.nothing"))])
                return
            self._left_out(kind)
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
        ui.download.content(text.encode(), f"{self.project.name}_{self.kind.value}.jsonl", "application/jsonl")

    def _left_out(self, kind: Kind) -> None:
        found = verdicts(self.project, kind).left_out
        words = [self.view.t(f"label.out_{reason}", count=count) for reason, count in found.items() if count]
        if words:
            ui.label(self.view.t("label.left_out", reasons=", ".join(words))).classes("muted small")


def _percent(share: Share) -> str:
    return "–" if share.value is None else f"{share.value:.0%}"
