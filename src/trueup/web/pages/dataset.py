"""A dataset: what would become of every row, its rows as the model sees them, and how its columns are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import run as background
from nicegui import ui

from trueup.builtin import BUILTIN_MODELS
from trueup.data.examples import Pair, Ranking
from trueup.errors import ConfigError, Problem, UserError
from trueup.web import charts
from trueup.web.frame import button, card, empty, figure, heading, problems
from trueup.web.onward import train_address
from trueup.web.own_dataset import OwnDataset, own_file
from trueup.web.pages import page
from trueup.web.reports import report_of
from trueup.web.rows import SeenRow, Table, open_table, parts, spec_of
from trueup.web.texts import Pieces, conversation, differences, legend, part_name, said, shortened, tokens
from trueup.web.tokens import tokens_of
from trueup.web.view import View

PAGE_ROWS = 10
_VIEWS = ("tokens", "turns", "differences", "raw")
_COLOURS = {"prompt": 0, "chosen": 2, "best": 2, "rejected": 1, "worst": 1, "answer": 0, "total": 6, "text": 0}
_DRAWN = (("prompt",), ("text",), ("answer",), ("chosen", "rejected"), ("best", "worst"), ("total",))
_LINE = re.compile(r":(\d+)(?::\d+)?$")
_FAR = 10**9


@page("/data/{name:path}", icon="dataset", order=11, below="/data", title="data.title")
async def dataset(view: View) -> None:
    """One dataset."""
    name = view.path["name"]
    spec = spec_of(view.workspace.root, name)
    table = await background.io_bound(open_table, spec)
    assert table
    await DatasetPage(view, name, table).build()


class DatasetPage:
    """One look at one dataset; which row and how it is shown is in the address."""

    def __init__(self, view: View, name: str, table: Table) -> None:
        self.view, self.name, self.table = view, name, table
        self.place = view.workspace
        file = own_file(view, name, table)
        self.own = OwnDataset(view, name, file, self._again) if file else None
        self.report: dict[str, Any] = {}
        self.shown: list[SeenRow] = []
        self.turn = 0  # of the questions for tokens: only the newest is answered

    async def build(self) -> None:
        """Everything, top to bottom; the report comes when it is there."""
        t = self.view.t
        kind = self.view.maybe(f"data.kind_{self.table.kind}") or t("dataset.unknown_kind")
        with heading(self.view, self.name, note=kind):
            if self.own:
                button(t("dataset.replace"), self.own.replace_dialog, icon="upload_file")
                button(t("dataset.remove"), self.own.remove_dialog, icon="delete", kind="danger")
            if self.table.kind in ("pair", "ranking") and not self.table.problems:
                button(t("dataset.label"), lambda: self.view.open("/label", dataset=self.name), icon="how_to_vote")
            if self.table.layout and not self.table.problems:
                address = train_address(self.place, self.name, self.table.kind)
                button(t("dataset.train"), lambda: ui.navigate.to(address), icon="model_training", kind="primary")
        self.faults = ui.element("div").classes("stack data-wrong")
        if self.table.problems:
            self._tell(self.table.problems)
        with card(t("dataset.report")) as whole:
            self._settings()
            self.summary = ui.element("div").props("aria-live=polite")
        whole.set_visibility(not self.table.problems)
        with card(t("dataset.rows")):
            self._browser()
        self._columns()
        await self._list(show=False)
        ui.timer(0.02, self._show, once=True)  # what a page waits for must not keep it from being sent
        if self.table.layout and not self.table.problems:
            with self.summary, ui.element("div").classes("wait"):
                ui.spinner(size="20px")
                ui.label(t("dataset.counting"))
            ui.timer(0.05, self._report, once=True)

    # --- what is wrong with the file ---------------------------------------------------------

    def _tell(self, found: Sequence[Problem]) -> None:
        """Problems; a line that is at fault can be mended where it stands."""
        self.faults.clear()
        with self.faults:
            problems([plainly(problem, self.place.root) for problem in found])
            first = next((int(m[1]) for one in found if one.where and (m := _LINE.search(one.where))), None)
            if first and self.own:
                self.own.mend(first)

    def _again(self) -> None:
        self.view.open(self.view.address, **self.view.query)

    # --- the report --------------------------------------------------------------------------

    def _settings(self) -> None:
        """Whose tokens, and how many of them."""
        t, query = self.view.t, self.view.query
        models = list(dict.fromkeys([*BUILTIN_MODELS, *self.place.models(), query.get("model") or BUILTIN_MODELS[0]]))
        with ui.element("div").classes("settings"):
            self.model = ui.select(
                models, value=query.get("model") or BUILTIN_MODELS[0], label=t("dataset.model"), with_input=True,
                new_value_mode="add-unique",
            )  # fmt: skip
            self.model.props("outlined dense")
            self.cutoff = ui.number(t("dataset.cutoff"), value=_whole(query.get("cutoff"), 2048), min=1, precision=0)
            self.cutoff.props("outlined dense debounce=500").classes("narrow")
        for control in (self.model, self.cutoff):
            control.on_value_change(self._settle)

    def _settle(self) -> None:
        model = str(self.model.value or BUILTIN_MODELS[0])
        cutoff = _whole(self.cutoff.value, 2048)
        self.view.remember(
            model=None if model == BUILTIN_MODELS[0] else model, cutoff=None if cutoff == 2048 else str(cutoff)
        )
        self._again()

    def _words(self) -> list[str]:
        """The words of a command line that say whose tokens. Raises ConfigError for a model that lies elsewhere."""
        model = str(self.model.value or BUILTIN_MODELS[0])
        if not self.place.may_read(model):
            raise ConfigError(
                f"{model[:80]!r} lies outside of the studio's directory", where="model_name_or_path",
                fix="start the studio with --allow-dir",
            )  # fmt: skip
        return [f"model_name_or_path={model}", f"cutoff_len={_whole(self.cutoff.value, 2048)}"]

    async def _report(self) -> None:
        try:
            told = await report_of(self.view.jobs, self.table, self._words())
        except UserError as error:
            told = {"ok": False, "problems": [asdict(problem) for problem in error.problems]}
        self.summary.clear()
        with self.summary:
            if not told.get("ok"):
                found = [Problem(**one) for one in told.get("problems", [])]
                self._tell(found)
                ui.label(self.view.t("dataset.no_report")).classes("muted")
                return
            self.report = told["result"]["datasets"].get(self.name) or {}
            self._figures(self.report)
            self._findings(self.report, told["result"])
            self._lengths(self.report)
        self.which.set_options(self._choices(), value=self.which.value)

    def _figures(self, report: Mapping[str, Any]) -> None:
        t, left_out = self.view.t, report["read"] - report["kept"]
        with ui.element("div").classes("dataset-figures"):
            figure(t("dataset.read"), f"{report['read']:,}", note=t("dataset.of", count=f"{report['available']:,}"))
            figure(t("dataset.kept"), f"{report['kept']:,}", note=_share(report["kept"], report["read"]))
            figure(t("dataset.left_out"), f"{left_out:,}", note=_share(left_out, report["read"]))
            figure(
                t("dataset.cut"), f"{report['truncated_rows']:,}", note=_share(report["truncated_rows"], report["read"])
            )
            figure(t("dataset.duplicates"), f"{report['duplicates']['count']:,}")
            if self.table.kind in ("pair", "ranking"):
                figure(t("dataset.reversed"), f"{report['reversed_pairs']['count']:,}")

    def _findings(self, report: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        """Rows with something to say of them, and which these are."""
        t = self.view.t
        found = [*self._reasons(report).items()]
        if found:
            with ui.element("table").classes("losses"):
                for name, rows in found:
                    with ui.element("tr"):
                        for text in (name, f"{rows['count']:,}"):
                            with ui.element("td"):
                                ui.label(text)
                        with ui.element("td"):
                            for row_id in rows["rows"][:6]:
                                index = int(row_id.rpartition(":")[2])
                                link = ui.link(str(index), f"{self.view.address}?row={index}").classes("row-link")
                                link.props["aria-label"] = t("dataset.row", number=index)
                            if rows["excerpt"]:
                                ui.label(self.view.said(rows["excerpt"])).classes("muted small")
        for text in [*report["findings"], *whole["notes"]]:
            ui.label(self.view.said(text)).classes("notice small")

    def _reasons(self, report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """What is said of rows: left out and why, cut, the same as others."""
        t = self.view.t
        found = {
            t("dataset.dropped", reason=self.view.said(reason)): rows
            for reason, rows in report.get("dropped", {}).items()
        }
        for part, rows in report.get("truncated", {}).items():
            found[t("dataset.truncated", part=part_name(self.view, part))] = rows
        for name in ("duplicates", "repeated_ids", "reversed_pairs"):
            if report.get(name, {}).get("count"):
                found[t(f"dataset.{name}")] = report[name]
        return found

    def _lengths(self, report: Mapping[str, Any]) -> None:
        """Histograms of tokens: sides of a pair over each other."""
        t, drawn = self.view.t, report.get("histogram")
        if not drawn:
            return
        rows = drawn["rows"]
        groups = [names for names in _DRAWN if all(name in rows for name in names)]
        if not any(name in rows for name in ("prompt", "chosen", "best")):
            groups = [names for names in groups if names != ("total",)]  # it is the text's, once more
        limit = (_whole(self.cutoff.value, 2048), t("dataset.cutoff"))
        with ui.element("div").classes("grid-3 histograms"):
            for names in groups:
                title = " / ".join(part_name(self.view, name) for name in names)
                with ui.element("div"):
                    ui.label(title).classes("h3")
                    facts = report["tokens"][names[0]]
                    if len(names) == 1:
                        text = t(
                            "dataset.lengths",
                            p50=f"{facts['p50']:,.0f}",
                            p95=f"{facts['p95']:,.0f}",
                            most=f"{facts['max']:,.0f}",
                        )
                    else:
                        text = t(
                            "dataset.medians",
                            one=f"{facts['p50']:,.0f}",
                            other=f"{report['tokens'][names[1]]['p50']:,.0f}",
                        )
                    ui.label(text).classes("muted small number")
                    series = [(part_name(self.view, name), rows[name], _COLOURS.get(name, 0)) for name in names]
                    options = charts.histogram(
                        series, width=drawn["width"], last_is_open=drawn["last_is_open"], x_label=t("dataset.tokens"),
                        limit=limit if names == ("total",) else None,
                    )  # fmt: skip
                    charts.chart(options, t("dataset.histogram", part=title)).classes("chart-low")

    # --- rows --------------------------------------------------------------------------------

    def _browser(self) -> None:
        t, query = self.view.t, self.view.query
        choices = ["tokens", "turns", *(["differences"] if self.table.kind in ("pair", "ranking") else []), "raw"]
        with ui.element("div").classes("settings"):
            self.which = ui.select(self._choices(), value="", label=t("dataset.which")).props("outlined dense")
            self.which.on_value_change(lambda: self._list())
            self.go = (
                ui.number(t("dataset.go"), value=None, min=0, precision=0).props("outlined dense").classes("narrow")
            )
            self.go.on("keydown.enter", lambda: self._choose(_whole(self.go.value, 0)))
            shown = query.get("view") if query.get("view") in choices else choices[0] if self.table.layout else "raw"
            self.kind = ui.toggle({name: t(f"dataset.view_{name}") for name in choices}, value=shown)
            self.kind.props("no-caps unelevated dense").on_value_change(self._change_view)
        with ui.element("div").classes("browser"):
            with ui.element("div"):
                self.entries = (
                    ui.element("div").classes("row-list").props(f'role=group aria-label="{t("dataset.rows")}"')
                )
                with ui.element("div").classes("pager"):
                    self.back = button(
                        "", lambda: self._page(-1), icon="chevron_left", kind="quiet", label=t("dataset.back")
                    )
                    self.range = ui.label("").classes("muted small number")
                    self.on = button(
                        "", lambda: self._page(1), icon="chevron_right", kind="quiet", label=t("dataset.on")
                    )
            self.one = ui.element("div").classes("one-row").props("aria-live=polite")
        self.at = _whole(query.get("row"), 0)
        self.start = self.at // PAGE_ROWS * PAGE_ROWS

    def _choices(self) -> dict[str, str]:
        found = self._reasons(self.report) if self.report else {}
        return {"": self.view.t("dataset.all"), **{name: f"{name} ({rows['count']:,})" for name, rows in found.items()}}

    async def _list(self, *, show: bool = True) -> None:
        """The rows of this page, or those that the report names; and the chosen one, unless it is to wait."""
        chosen = self._reasons(self.report).get(str(self.which.value or "")) if self.report else None
        if chosen:
            numbers = [int(row_id.rpartition(":")[2]) for row_id in chosen["rows"]]
            windows = [await background.io_bound(self.table.window, number, 1) for number in numbers]
            self.shown, more = [one for window in windows if window for one in window.rows], False
        else:
            window = await background.io_bound(self.table.window, self.start, PAGE_ROWS)
            assert window
            self.shown, more = window.rows, window.more
        self.back.set_enabled(not chosen and self.start > 0)
        self.on.set_enabled(more)
        numbers = [one.index for one in self.shown]
        self.range.set_text(f"{min(numbers):,} – {max(numbers):,}" if numbers else "")
        if numbers and self.at not in numbers:
            self.at = numbers[0]
        self._fill()
        if show:
            await self._show()

    def _fill(self) -> None:
        self.entries.clear()
        with self.entries:
            for one in self.shown:
                current = one.index == self.at
                entry = ui.element("button").classes("row-entry" + (" row-current" if current else ""))
                entry.props(f"type=button aria-pressed={'true' if current else 'false'}")
                with entry:
                    ui.label(f"{one.index:,}").classes("row-number")
                    ui.label(one.excerpt).classes("row-text")
                    if one.problem:
                        ui.label(self.view.said(one.problem)).classes("row-bad")
                entry.on("click", lambda _, index=one.index: self._choose(index))

    async def _choose(self, index: int) -> None:
        self.at = index
        self.view.remember(row=str(index) if index else None)
        if any(one.index == index for one in self.shown):
            self._fill()
            await self._show()
        else:
            self.which.value = ""
            self.start = index // PAGE_ROWS * PAGE_ROWS
            await self._list()

    async def _page(self, step: int) -> None:
        self.start = max(0, self.start + step * PAGE_ROWS)
        self.at = self.start
        self.view.remember(row=str(self.at) if self.at else None)
        await self._list()

    async def _change_view(self) -> None:
        self.view.remember(view=str(self.kind.value))
        await self._show()

    async def _show(self) -> None:
        """The chosen row, as it is to be looked at."""
        self.turn += 1
        self.one.clear()
        current = next((one for one in self.shown if one.index == self.at), None)
        if current is None:
            with self.one:
                empty("table_rows", self.view.t("dataset.no_rows"))
            return
        with self.one:
            if current.problem:
                problems([Problem(self.view.t("dataset.left_out_because", reason=self.view.said(current.problem)))])
                if current.line and self.own:
                    self.own.mend(current.line)
        shown = str(self.kind.value)
        if shown == "tokens" and not self.table.problems and not current.problem:
            await self._show_tokens(current, self.turn)
            return
        with self.one:
            if shown == "turns" and current.example:
                self._show_turns(current)
            elif shown == "differences" and isinstance(current.example, Pair | Ranking):
                self._show_differences(current.example)
            else:
                text = json.dumps(dict(current.raw), ensure_ascii=False, indent=2, default=str)
                Pieces([[shortened(self.view, text), "plain"]])

    def _show_turns(self, current: SeenRow) -> None:
        assert current.example
        for name, content in parts(current.example):
            with ui.element("div").classes("part"):
                ui.label(part_name(self.view, name)).classes("h3")
                turns = (
                    [{"role": "", "content": content}] if isinstance(content, str) else [m.to_dict() for m in content]
                )
                conversation(self.view, turns)

    def _show_differences(self, example: Pair | Ranking) -> None:
        """The question, and the better and the worse answer beside each other."""
        better, worse = (
            (example.chosen, example.rejected)
            if isinstance(example, Pair)
            else (example.answers[0], example.answers[-1])
        )
        if example.prompt:
            ui.label(part_name(self.view, "prompt")).classes("h3")
            conversation(self.view, [message.to_dict() for message in example.prompt])
        texts = ["\n\n".join(said(message.to_dict()) for message in side) for side in (better, worse)]
        # what the rejected answer lacks is green in the chosen one, what it has too much is red in it
        worse_pieces, better_pieces = differences(texts[1], texts[0])
        with ui.element("div").classes("sides prose"):
            for name, pieces in (("chosen", better_pieces), ("rejected", worse_pieces)):
                with ui.element("div").classes("part"):
                    ui.label(part_name(self.view, name)).classes("h3")
                    Pieces(pieces)

    async def _show_tokens(self, current: SeenRow, turn: int) -> None:
        with self.one:
            waiting = ui.element("div").classes("wait")
            with waiting:
                ui.spinner(size="20px")
                ui.label(self.view.t("dataset.encoding"))
        try:
            told = await tokens_of(self.place.root).row(self.name, current.index, self._words())
        except UserError as error:
            told = {"ok": False, "problems": [asdict(problem) for problem in error.problems]}
        if turn != self.turn:  # another row has been chosen since
            return
        waiting.delete()
        with self.one:
            if not told.get("ok"):
                problems([plainly(Problem(**one), self.place.root) for one in told["problems"]])
                return
            if told["dropped"] and not current.problem:
                problems([Problem(self.view.t("dataset.left_out_because", reason=self.view.said(told["dropped"])))])
            legend(self.view)
            if told["about"]:  # what the data say of the answers: a label, scores
                ui.label(part_name(self.view, told["about"])).classes("small")
            for part in told["parts"]:
                tokens(self.view, part)
            settings = ", ".join(f"{key} {value}" for key, value in told["settings"].items())
            ui.label(settings).classes("muted small")
            for line, good in told["template"]:
                ui.label(self.view.said(line)).classes("muted small" if good else "notice small")

    # --- columns -----------------------------------------------------------------------------

    def _columns(self) -> None:
        """Which column plays which role; to be changed where the registry is the workspace's own."""
        t, layout = self.view.t, self.table.layout
        taken: Mapping[str, str] = layout.columns if layout else {}
        with card(t("dataset.columns"), note=t("dataset.columns_note")):
            with ui.element("div").classes("toolbar columns"):
                for role, column in taken.items():
                    ui.label(f"{column} → {role}").classes("badge mono")
                for column in self.table.columns:
                    if column not in taken.values():
                        ui.label(column).classes("badge mono muted")
            if self.own and self.table.columns:
                with ui.expansion(t("dataset.change")).classes("section").props("dense"):
                    self.own.mapping(self.table.columns, taken)


def plainly(problem: Problem, root: Path) -> Problem:
    """A problem with files named as they lie in the workspace."""

    bases = sorted({f"{root}/", f"{os.path.relpath(root)}/"} - {"./"}, key=len, reverse=True)

    def short(text: str | None) -> str | None:
        for base in bases:
            text = text and text.replace(base, "")
        return text

    return Problem(short(problem.what) or "", short(problem.where), short(problem.expected), short(problem.fix))


def address_of(name: str) -> str:
    """A dataset's page."""
    return f"/data/{quote(name)}"


def _share(count: int, whole: int) -> str:
    return f"{count / whole:.1%}" if whole else ""


def _whole(text: Any, otherwise: int) -> int:
    """A whole number of an address or a field."""
    try:
        return min(max(int(float(text)), 0), _FAR)
    except (TypeError, ValueError, OverflowError):
        return otherwise
