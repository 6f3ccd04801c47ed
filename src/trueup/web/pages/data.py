"""Data: every dataset that has a name here, files that are brought here, and well-known sets to get."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from nicegui import run as background
from nicegui import ui
from nicegui.events import GenericEventArguments, UploadEventArguments

from trueup.data.inventory import Inventory, Item, inventory
from trueup.data.registry import FILE_SUFFIXES
from trueup.errors import UserError
from trueup.web import fetches, uploads
from trueup.web.drop import drop
from trueup.web.frame import card, empty, heading, problems
from trueup.web.pages import page
from trueup.web.view import View

REFRESH_SECONDS = 1.0
_NAME_CELL = """
<q-td :props="props" class="data-cell">
  <a v-if="props.row.address" :href="props.row.address">{{ props.row.name }}</a><span v-else>{{ props.row.name }}</span>
  <div v-if="props.row.about" class="data-about">{{ props.row.about }}</div>
  <div v-if="props.row.problem" class="data-problem">{{ props.row.problem }}</div>
</q-td>
"""
_KIND_CELL = """
<q-td :props="props"><span v-if="props.row.kind" class="badge">{{ props.row.kind }}</span></q-td>
"""
_GET_CELL = """
<q-td :props="props" class="data-get">
  <div v-if="props.row.state === 'running'" class="data-coming">
    <q-linear-progress :value="props.row.share || 0" :indeterminate="props.row.share === null" rounded size="6px"
      :aria-label="props.row.said || props.row.name"></q-linear-progress>
    <span class="data-about">{{ props.row.said }}</span>
    <q-btn flat round dense icon="close" class="button-quiet" :aria-label="props.row.stop_word"
      @click="() => $parent.$emit('halt', props.row.name)"></q-btn>
  </div>
  <span v-else-if="props.row.here" class="badge badge-finished">{{ props.row.here }}</span>
  <q-btn v-else no-caps unelevated class="button" icon="download" :label="props.row.get_word"
    :aria-label="props.row.get_word + ' ' + props.row.name" @click="() => $parent.$emit('get', props.row.name)"></q-btn>
</q-td>
"""


@page("/data", icon="dataset", order=10)
async def data(view: View) -> None:
    """The list."""
    heading(view, view.t("data.title"), note=view.t("data.note"))
    await Shelf(view).build()


class Shelf:
    """The page's parts."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.found = Inventory([])

    async def build(self) -> None:
        """What can be brought here, and then what is here."""
        t = self.view.t
        drop(self.view, FILE_SUFFIXES, self._take, t("data.upload_note", types=" ".join(FILE_SUFFIXES)))
        self.wrong = ui.element("div").classes("stack data-wrong")
        try:
            await self._look()
        except UserError as error:  # a registry that cannot be read
            problems(error.problems)
        with card(t("data.yours")):
            self.none = empty("dataset", t("data.none"))
            self.yours = self._table(t("data.yours"))
        with card(t("data.bundled"), note=t("data.bundled_note")):
            self.bundled = self._table(t("data.bundled"))
        with card(t("data.known"), note=t("data.known_note")):
            search = ui.input(t("data.search")).props("outlined dense clearable type=search").classes("data-search")
            self.known = self._table(t("data.known"), get=True)
            search.on_value_change(lambda event: self.known.set_filter(event.value or ""))
        self._fill()
        ui.timer(REFRESH_SECONDS, self._refresh)

    async def _take(self, event: UploadEventArguments) -> None:
        """A file has arrived whole; one that is cut off on its way never gets here."""
        place = self.view.workspace
        try:
            uploads.safe_name(event.file.name)
            staged = uploads.stage(place)
            await event.file.save(staged)
            name = await background.io_bound(uploads.take, place, staged, event.file.name)
        except UserError as error:
            self.wrong.clear()
            with self.wrong:
                problems(error.problems)
            return
        self.view.open(f"/data/{quote(str(name))}")

    # --- tables ------------------------------------------------------------------------------

    def _table(self, label: str, get: bool = False) -> ui.table:
        t = self.view.t
        columns: list[dict[str, Any]] = [
            {"name": "name", "label": t("data.name"), "field": "name", "align": "left", "sortable": True},
            {"name": "kind", "label": t("data.kind"), "field": "kind", "align": "left", "sortable": True},
            {"name": "rows", "label": t("data.rows"), "field": "rows", "sortable": not get},
        ]
        if get:
            columns.append({"name": "get", "label": "", "field": "here", "align": "right"})
        table = ui.table(columns=columns, rows=[], row_key="name", pagination={"rowsPerPage": 10 if get else 0})
        table.classes("data-table data-list").props(f'flat {"" if get else "hide-bottom"} aria-label="{label}"')
        table.props(':rows-per-page-options="[10, 20, 0]"')
        table.add_slot("body-cell-name", _NAME_CELL)
        table.add_slot("body-cell-kind", _KIND_CELL)
        if get:
            table.add_slot("body-cell-get", _GET_CELL)
            table.on("get", self._get)
            table.on("halt", lambda event: fetches.stop(self.view.workspace, str(event.args)))
        return table

    async def _look(self) -> None:
        self.found = await background.io_bound(inventory, self.view.workspace.root / "data") or self.found

    async def _refresh(self) -> None:
        """Downloads, every second; and the list again when one has ended."""
        before = {row["name"] for row in self.known.rows if row["state"] == "running"}
        self._fill()
        now = {row["name"] for row in self.known.rows if row["state"] == "running"}
        if before - now:
            await self._look()
            self._fill()

    def _fill(self) -> None:
        """Rows as they are now; nothing is sent if they are the same."""
        tables = {"registry": self.yours, "bundled": self.bundled, "well-known": self.known}
        for group, table in tables.items():
            rows = [self._row(item) for item in self.found.items if item.group == group]
            if rows != table.rows:
                table.rows = rows
                table.update()
        self.none.set_visibility(not self.yours.rows)
        self.yours.set_visibility(bool(self.yours.rows))

    def _row(self, item: Item) -> dict[str, Any]:
        t = self.view.t
        well_known = item.group == "well-known"
        fetch = fetches.state(self.view.workspace, item.name) if well_known else None
        state = fetch.state if fetch else ""
        rows = f"{item.rows:,}" if isinstance(item.rows, int) else f"≈ {item.rows}" if item.rows else ""
        broken = (item.problem or "").partition("\n")[0]
        failed = "\n".join(problem.what for problem in fetch.problems) if fetch and state == "failed" else ""
        return {
            "name": item.name, "address": "" if well_known and not item.copy else f"/data/{quote(item.name)}",
            "kind": self.view.maybe(f"data.kind_{item.kind}") or item.kind or "", "rows": rows,
            "about": self.view.said(item.about),
            "problem": broken or failed, "state": state, "share": fetch.share if fetch else None,
            "said": fetch.said if fetch else "", "here": t("data.here") if item.copy else "",
            "get_word": t("data.again" if failed else "data.get"), "stop_word": t("data.stop", name=item.name),
        }  # fmt: skip

    async def _get(self, event: GenericEventArguments) -> None:
        await background.io_bound(fetches.start, self.view.workspace, str(event.args))
        self._fill()
