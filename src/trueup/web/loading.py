"""The card on which models are loaded and unloaded. What is loaded is the same for every tab."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from trueup.builtin import BUILTIN_MODELS
from trueup.config.load import load_config
from trueup.errors import UserError
from trueup.web import forms
from trueup.web.draft import Draft
from trueup.web.found import found_here
from trueup.web.frame import button, card, problems
from trueup.web.glance import newest_result
from trueup.web.speakers import Loaded, base_of
from trueup.web.view import View

#: keys that say how a model is loaded, behind a fold.
_MORE = (
    "template", "enable_thinking", "device", "infer_dtype", "quantization_bit", "rope_scaling",
    "rope_scaling_length", "flash_attn", "booster", "hub", "model_revision",
)  # fmt: skip
_STATES = {"loading": "starting", "ready": "finished", "failed": "failed"}
_ICONS = {"loading": "hourglass_top", "ready": "check", "failed": "error_outline"}


class LoadingCard:
    """The form, and what is loaded since the last `refresh`, which calls `changed` if that is something else."""

    def __init__(self, view: View, changed: Callable[[], Any]) -> None:
        self.view, self.changed = view, changed
        self.widgets: dict[str, forms.Widget] = {}
        self.note: list[Any] = []
        self.draft = self._begin()
        self.seen: tuple[Any, ...] | None = None
        self.telling: dict[int, tuple[ui.label, ui.label]] = {}
        t = view.t
        with card(t("chat.models")):
            self.there = ui.element("div").classes("stack").props("aria-live=polite")
            self.fold = ui.expansion(t("chat.load_model"), icon="add", value=not view.speakers.loaded)
            self.fold.classes("section").props("dense")
            with self.fold:
                self._form()

    def _begin(self) -> Draft:
        """From the address: a draft, a run, a model with adapters; else the newest result, or what comes with us."""
        query = self.view.query
        if "load" in query:
            return Draft.unpack(query["load"])
        values = {"model_name_or_path": query.get("model", ""), "adapter_name_or_path": query.get("adapters", "")}
        if any(values.values()):
            return Draft({key: value for key, value in values.items() if value})
        run = query.get("run") or newest_result(self.view.jobs)
        try:
            return self._of_run(run) if run else Draft({"model_name_or_path": BUILTIN_MODELS[0]})
        except UserError as error:
            self.note = error.problems if "run" in query else []
        return Draft({})

    def _of_run(self, run: str) -> Draft:
        """What a run has made; an adapter on its base. Raises ConfigError."""
        place = self.view.workspace
        path = place.run(run)
        name = path.relative_to(place.root).as_posix() if path.is_relative_to(place.root) else run
        if (path / "adapter_config.json").is_file():
            return Draft({"model_name_or_path": base_of(path) or "", "adapter_name_or_path": name})
        return Draft({"model_name_or_path": f"./{name}"})

    def _form(self) -> None:
        t = self.view.t
        with ui.element("div").classes("stack loading-form"):
            self._field("model_name_or_path")
            self._field("adapter_name_or_path")
            said = {"label": t("chat.adapters"), "hint": t("chat.adapters_note")}
            self.widgets["adapter_name_or_path"].field.props.update(said)
            more = ui.expansion(t("chat.more")).props("dense").classes("section")
            with more, ui.element("div").classes("fields"):
                for name in _MORE:
                    self._field(name)
            self.keep = ui.switch(t("chat.keep"))
            self.found = ui.element("div").classes("stack")
            with self.found:
                if self.note:
                    problems(self.note)
            button(t("chat.load"), self._load, icon="memory", kind="primary")

    def _field(self, name: str) -> None:
        value, options = self.draft.values.get(name), found_here(name, self.view.workspace, self.draft.values)
        key = forms.key_of(name)
        self.widgets[name] = forms.Widget(
            key, self.view, value, self._change, options, unset=key.unset(self.draft.lenient())
        )

    def _change(self, key: str, value: str | None) -> None:
        values = self.draft.values
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
        if key == "adapter_name_or_path" and value:
            base = base_of(self.view.workspace.root / value.split(",")[-1].strip())
            field = self.widgets["model_name_or_path"].field
            if base and values.get("model_name_or_path") != base:
                if base not in field.options:
                    field.options.insert(0, base)
                    field.update()
                field.value = base
        self.view.remember(load=self.draft.pack(), run=None, model=None, adapters=None)

    async def _load(self) -> None:
        self.found.clear()
        checked = self.draft.check(self.view.workspace, partial(load_config, None, verb="infer"))
        for widget in self.widgets.values():
            widget.tell(checked)
        if checked.cfg is None:
            with self.found:
                problems(checked.problems)
            return
        model = checked.cfg.model
        alone = Draft({key: value for key, value in self.draft.values.items() if key != "adapter_name_or_path"})
        adapters = list(model.adapter_name_or_path)
        load = partial(self.view.speakers.load, str(model.model_name_or_path), adapters, alone.words())
        try:
            await asyncio.to_thread(load, keep=bool(self.keep.value))
        except UserError as error:
            with self.found:
                problems(error.problems)
            return
        self.fold.value = False
        self.refresh()

    # --- what is loaded ----------------------------------------------------------------------

    def refresh(self) -> None:
        """Look again at what is loaded."""
        loaded = list(self.view.speakers.loaded)
        now = tuple((one.number, one.state) for one in loaded)
        if now != self.seen:  # buttons are not drawn anew for a text: a click on one that has gone is lost
            self.seen = now
            self.telling.clear()
            self.there.clear()
            with self.there:
                for one in loaded:
                    self._one(one)
            self.changed()
        for one in loaded:
            words, memory = self.telling[one.number]
            words.set_text(self.view.said_lines(one.last_words) if one.state == "loading" else "")
            held = one.alive and one.memory >> 26
            memory.set_text(self.view.t("chat.holds", size=f"{one.memory / 2**30:.2f} GB") if held else "")

    def _one(self, one: Loaded) -> None:
        t = self.view.t
        with ui.element("div").classes("loaded"):
            with ui.element("div").classes("loaded-head"):
                ui.label(one.base).classes("loaded-name")
                with ui.element("span").classes(f"badge badge-{_STATES.get(one.state, 'stopped')}"):
                    ui.icon(_ICONS.get(one.state, "pause")).props("aria-hidden=true")
                    ui.label(t(f"chat.state_{one.state}"))
            for name in one.adapters:
                ui.label(f"+ {name}").classes("small mono")
            if one.state == "failed":
                with ui.element("div").classes("problem").props("role=alert"):
                    ui.label(self.view.said_lines(one.reason))
            words = ui.label("").classes("muted small")
            with ui.element("div").classes("toolbar"):
                word = t("chat.dismiss" if one.state == "failed" else "chat.unload")
                unload = button(word, partial(self._unload, one.number), icon="eject")
                unload.props["aria-label"] = f"{word}: {one.base}"
                memory = ui.label("").classes("muted small number")
        self.telling[one.number] = words, memory

    async def _unload(self, number: int) -> None:
        await asyncio.to_thread(self.view.speakers.unload, number)
        self.refresh()
