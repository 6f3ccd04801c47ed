"""What people may change of a dataset that lies in the workspace: a line, its columns' roles, its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nicegui import ui
from nicegui.events import UploadEventArguments

from trueup.data.register import enter
from trueup.data.registry import COLUMN_ROLES, FORMATS, registered
from trueup.errors import UserError
from trueup.web import uploads
from trueup.web.drop import drop
from trueup.web.frame import button, problems, row
from trueup.web.rows import Table
from trueup.web.view import View

_TYPES = ("pretrain", "sft", "dpo", "rm", "kto")
_CHOSEN = ("file_name", "type", "formatting", "columns")  # keys of an entry that are chosen here


def own_file(view: View, name: str, table: Table) -> Path | None:
    """The one file of a dataset that is the workspace's own; None if it is not to be changed here."""
    folder = (view.workspace.root / "data").resolve()
    paths = [file.path.resolve() for file in table.files if file.path]
    mine = name in registered(folder) and len(paths) == 1 and paths[0].is_relative_to(folder)
    return paths[0] if mine else None


class OwnDataset:
    """The parts of a page that change a dataset. `again`: what shows it anew."""

    def __init__(self, view: View, name: str, file: Path, again: Callable[[], None]) -> None:
        self.view, self.name, self.file, self.again = view, name, file, again
        self.place = view.workspace

    def mend(self, number: int) -> None:
        """A line of the file to write anew, where it is a file of lines."""
        t, was = self.view.t, uploads.line_of(self.file, number)
        if was is None:
            return
        with ui.element("div").classes("stack mend"):
            text = ui.textarea(t("dataset.line", number=number), value=was).props("outlined autogrow spellcheck=false")
            wrong = ui.element("div")

            def write(new: str) -> None:
                try:
                    uploads.mend(self.place, self.file, number, was, new)
                except UserError as error:
                    _tell(wrong, error)
                    return
                self.again()

            with row():
                button(t("dataset.mend"), lambda: write(str(text.value)), icon="build")
                button(t("dataset.drop_line"), lambda: write(""), icon="delete_outline", kind="quiet")

    def mapping(self, columns_there: Sequence[str], taken: Mapping[str, str]) -> None:
        """Which column plays which role: `taken` is what is guessed or registered now."""
        t = self.view.t
        entry = uploads.registry_entry(self.place, self.name)
        own = entry.get("columns") or {}
        none = {"": t("dataset.auto")}
        with ui.element("div").classes("fields"):
            kind = ui.select({**none, **{name: name for name in _TYPES}}, value=entry.get("type") or "", label="type")
            form = ui.select(
                {**none, **{name: name for name in FORMATS}}, value=entry.get("formatting") or "", label="formatting"
            )
            roles = {
                role: ui.select(
                    {**none, **{column: column for column in columns_there}},
                    value=own.get(role) if own.get(role) in columns_there else "", label=role,
                )
                for role in COLUMN_ROLES
            }  # fmt: skip
        for control in (kind, form, *roles.values()):
            control.props("outlined dense options-dense")
        for role, control in roles.items():
            if role in taken and not control.value:
                control.props["hint"] = taken[role]

        wrong = ui.element("div")

        def keep() -> None:
            left_out = {role: None for role, column in own.items() if column is None}
            columns = left_out | {role: str(control.value) for role, control in roles.items() if control.value}
            kept = {key: value for key, value in entry.items() if key not in _CHOSEN}
            chosen = {"type": kind.value, "formatting": form.value, "columns": columns}
            kept |= {key: value for key, value in chosen.items() if value}
            try:
                enter(self.name, self.file, kept, self.place.root / "data", "dataset_info")
            except UserError as error:
                _tell(wrong, error)
                return
            self.again()

        button(t("dataset.keep"), keep, icon="save")

    def replace_dialog(self) -> None:
        """Another file in the place of this one."""
        t = self.view.t

        async def take(event: UploadEventArguments) -> None:
            try:
                uploads.safe_name(event.file.name)
                staged = uploads.stage(self.place)
                await event.file.save(staged)
                uploads.replace(self.place, staged, event.file.name, self.file)
            except UserError as error:
                _tell(wrong, error)
                return
            self.again()

        with ui.dialog(value=True) as dialog, ui.card().classes("dialog"):
            ui.label(t("dataset.replace")).classes("h2")
            ui.label(t("dataset.replace_note")).classes("muted")
            drop(self.view, [self.file.suffix], take)
            wrong = ui.element("div")
        dialog.on("hide", dialog.delete)

    def remove_dialog(self) -> None:
        """Out of the registry, and into the trash."""
        t = self.view.t

        def remove() -> None:
            uploads.remove(self.place, self.name, self.file)
            self.view.open("/data")

        with ui.dialog(value=True) as dialog, ui.card().classes("dialog"):
            ui.label(t("dataset.remove_question", name=self.name)).classes("h2")
            ui.label(t("dataset.remove_note")).classes("muted")
            with row():
                button(t("dataset.remove"), remove, icon="delete", kind="danger")
                button(t("frame.cancel"), dialog.close)
        dialog.on("hide", dialog.delete)


def _tell(where: ui.element, error: UserError) -> None:
    where.clear()
    with where:
        problems(error.problems)
