"""The form of a verb that is no training: its keys from the schema, checked as they are typed, the command, a start."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nicegui import ui

from trueup.config.methods import holds
from trueup.config.schema import RunConfig
from trueup.errors import Problem, UserError
from trueup.web import forms
from trueup.web.chores import Chores
from trueup.web.draft import Checked, Draft
from trueup.web.found import found_here
from trueup.web.frame import button, card, copy_block, heading, problems, set_code, verdict
from trueup.web.glance import newest_result
from trueup.web.view import View


class VerbForm:
    """One look at the form. What is chosen is in the address, and in `draft` as long as the page is open.

    Class attributes, of each verb:
        verb: of the command line. words: the table of its page's words. address: of the page of one chore.
        front: keys in front, by card. reads: every key it reads, with the conditions under which it does.
        out: the key that names the directory. hidden: keys that only a shell may set.
    """

    verb: ClassVar[str]
    words: ClassVar[str]
    address: ClassVar[str]
    out: ClassVar[str]
    front: ClassVar[Mapping[str, tuple[str, ...]]]
    reads: ClassVar[Mapping[str, Mapping[str, Any]]]
    hidden: ClassVar[tuple[str, ...]] = ()

    def __init__(self, view: View) -> None:
        self.view, self.place = view, view.workspace
        self.chores = Chores(view.workspace, self.verb)
        self.note: list[Problem] = []
        self.named = False  # whether a person has named the directory
        self.draft = self._begin()
        self.widgets: dict[str, list[forms.Widget]] = {}
        self.checked = Checked(None)

    # --- what a verb says --------------------------------------------------------------------

    def of_run(self, run_id: str) -> dict[str, str]:
        """Where the form begins for a run. Raises ConfigError."""
        raise NotImplementedError

    def usual(self) -> str:
        """The directory that is proposed, from the studio's."""
        raise NotImplementedError

    def read(self, words: Sequence[str]) -> RunConfig:
        """What the verb makes of its words. Raises ConfigError."""
        raise NotImplementedError

    def command_words(self) -> list[str]:
        """The words after the verb."""
        return self.draft.words()

    # --- the page ----------------------------------------------------------------------------

    def _begin(self) -> Draft:
        query = self.view.query
        if "draft" in query:
            draft = Draft.unpack(query["draft"])
            self.named = self.out in draft.values
            return draft
        if "model" in query:
            return Draft({"model_name_or_path": query["model"]})
        run = query.get("run") or newest_result(self.view.jobs)
        try:
            return Draft(self.of_run(run) if run else {})
        except UserError as error:
            self.note = error.problems if "run" in query else []
        return Draft({})

    def build(self) -> None:
        """Everything, top to bottom."""
        t = self.view.t
        heading(self.view, t(f"{self.words}.title"), note=t(f"{self.words}.note"))
        if self.note:
            problems(self.note)
        self._name()
        with ui.element("div").classes("train-columns"):
            with ui.element("div").classes("train-form"):
                for name, keys in self.front.items():
                    with card(t(f"{self.words}.card_{name}")), ui.element("div").classes("fields"):
                        for key in keys:
                            self._field(key)
                self._more()
            with ui.element("div").classes("train-side"):
                self._start_card()
                with card(t("train.preview"), note=t("train.preview_note")):
                    self.command = copy_block(self.view, "")
        self._check()

    def _field(self, name: str, note: str | None = None) -> None:
        key, values = forms.key_of(name), self.draft.values
        options, unset = found_here(name, self.place, values), key.unset(self._implied())
        widget = forms.Widget(key, self.view, values.get(name), self._change, options, note, unset)
        self.widgets.setdefault(name, []).append(widget)

    def _more(self) -> None:
        """Every other key that the verb reads: by search, or all of them."""
        t = self.view.t
        ahead = {self.out, *self.hidden, *(key for keys in self.front.values() for key in keys)}
        others = [key for key in self.reads if key not in ahead]
        with card(t("train.card_all"), note=t("train.all_note")):
            found = ui.input(t("train.search")).props("outlined dense clearable debounce=200 type=search")
            with found.add_slot("prepend"):
                ui.icon("search").props("aria-hidden=true")
            hits = ui.element("div").classes("fields")
            count = sum(key in self.draft.values for key in others)
            every = ui.expansion(t("chores.every"), caption=t("train.set", count=count) if count else None)
            with every.classes("section").props("dense"):
                place = ui.element("div").classes("fields")

        def fill(event: Any) -> None:
            if event.value and not place.default_slot.children:
                with place:
                    for name in others:
                        self._field(name, self._why_not(name))

        def search(event: Any) -> None:
            hits.clear()
            text = str(event.value or "")
            names = [key.name for key in forms.search(text, self.view) if key.name in others] if text.strip() else []
            with hits:
                for name in names[:24]:
                    self._field(name, self._why_not(name))
                if text.strip() and not names:
                    ui.label(t("train.no_key")).classes("muted")

        every.on_value_change(fill)
        found.on_value_change(search)

    def _implied(self) -> RunConfig:
        """The config as far as it is known: unset keys mean what the verb makes of them."""
        if self.checked.cfg is None:
            try:
                return self.read(self.command_words())
            except UserError:
                return self.draft.lenient()
        return self.checked.cfg

    def _why_not(self, name: str) -> str | None:
        """Under which other keys this one acts, if it does not now."""
        cfg = self._implied()
        lacking = [key for key, allowed in self.reads[name].items() if not holds(cfg[key], allowed)]
        return self.view.t("chores.acts_with", keys=", ".join(lacking)) if lacking else None

    def _start_card(self) -> None:
        t = self.view.t
        with card(t("chores.start_title")):
            self.name = ui.input(t(f"{self.words}.name"), value=self.draft.values[self.out])
            self.name.props("outlined dense debounce=250")
            self.name.on_value_change(lambda event: self._rename(str(event.value).strip()))
            self.found = ui.element("div").classes("stack train-found").props("aria-live=polite")
            self.start = button(t("train.start"), self._start, icon="play_arrow", kind="primary")

    # --- what changes ------------------------------------------------------------------------

    def _name(self) -> None:
        """A directory that is free, unless a person has named one."""
        if not self.named:
            try:
                self.draft.values[self.out] = self.chores.free(self.usual())
            except UserError:
                self.draft.values[self.out] = self.chores.free(f"{self.chores.area}/{self.words}")

    def _rename(self, name: str) -> None:
        if name != self.draft.values.get(self.out):
            self.named = True
            self._set(self.out, name or None)

    def _change(self, key: str, value: str | None) -> None:
        self._set(key, value)
        if not self.named:
            self._name()
            self.name.value = self.draft.values[self.out]
            self._check()

    def _set(self, key: str, value: str | None) -> None:
        if value is None:
            self.draft.values.pop(key, None)
        else:
            self.draft.values[key] = value
        self._check()
        kept = self.draft if self.named else Draft({k: v for k, v in self.draft.values.items() if k != self.out})
        self.view.remember(draft=kept.pack(), run=None, model=None)

    def _check(self) -> None:
        checked = self.draft.check(self.place, lambda words: self.read(self.command_words()))
        wrong = list(checked.problems)
        try:
            self.chores.path(self.draft.values.get(self.out, ""))
        except UserError as error:
            wrong += [Problem(one.what, f"--{self.out}", one.expected, one.fix) for one in error.problems]
        wrong += [
            Problem(f"`{key}` is for a shell: what it names is run", f"--{key}")
            for key in self.hidden
            if key in self.draft.values
        ]
        self.checked = Checked(None if wrong else checked.cfg, wrong, checked.notices)
        for widgets in self.widgets.values():
            for widget in widgets:
                widget.tell(self.checked)
        set_code(self.command, written(self.verb, self.command_words()))
        self.found.clear()
        with self.found:
            verdict(self.view, self.checked)
        self.start.set_enabled(not wrong)

    async def _start(self) -> None:
        self._check()
        if self.checked.cfg is None:
            return
        chore_id = self.draft.values[self.out]
        self.start.disable()
        await asyncio.to_thread(self.chores.start, self.command_words(), chore_id)
        self.view.open(f"{self.address}/{chore_id}")


def written(verb: str, words: Sequence[str]) -> str:
    """`trueup VERB …` for a shell, a key a line."""
    lines, rest = [["trueup", verb]], list(words)
    while rest and not rest[0].startswith("--"):
        lines[0].append(rest.pop(0))
    while rest:
        word = rest.pop(0)
        lines.append([word] if "=" in word else [word, rest.pop(0)])
    return " \\\n  ".join(shlex.join(line) for line in lines)
