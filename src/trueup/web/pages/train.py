"""Train: a run put together, checked as it is typed, written down as a command and as YAML, and started."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from nicegui import ui

from trueup.builtin import BUILTIN_MODELS, QUICKSTART_CONFIG
from trueup.config.checks import default_output_dir
from trueup.config.load import given
from trueup.config.methods import STAGES
from trueup.errors import Problem, UserError
from trueup.quantities import lasting, sized
from trueup.web import forms
from trueup.web.draft import Checked, Draft
from trueup.web.found import found_here
from trueup.web.frame import button, card, copy_block, heading, problems, set_code, verdict
from trueup.web.pages import page
from trueup.web.series import read
from trueup.web.view import View

_SECTIONS = (
    "model", "data", "tuning", "objective", "reward", "online", "train", "generate", "export", "evaluate", "build",
)  # fmt: skip
_MOST_HITS = 24
_BEGINNINGS = ("stage", "example", "config", "run", "model")
_EXAMPLES = {"quickstart": QUICKSTART_CONFIG}  # configs that come with the package


@page("/train", icon="model_training", order=20)
def train(view: View) -> None:
    """The form."""
    TrainPage(view).build()


class TrainPage:
    """One look at the form. What is chosen is in the address, and in `draft` as long as the page is open."""

    def __init__(self, view: View) -> None:
        self.view, self.place = view, view.workspace
        self.note: list[Problem] = []
        self.draft = self._begin()
        self.widgets: dict[str, list[forms.Widget]] = {}
        self.checked, self.implied = Checked(None), self.draft.implied()

    def _begin(self) -> Draft:
        """From the address: a draft, an example, a saved config, another run; else a stage's beginning."""
        query = self.view.query
        try:
            if "draft" in query:
                return Draft.unpack(query["draft"])
            if query.get("example") in _EXAMPLES:
                return self._named(Draft.read(_EXAMPLES[query["example"]]))
            if "config" in query:
                return self._named(Draft.read(self.place.config(query["config"])))
            if "run" in query:
                return self._named(self._of_run(query["run"]))
        except UserError as error:
            self.note = error.problems
        stage = query.get("stage", "dpo")
        draft = Draft.new(stage if stage in STAGES else "dpo", query.get("model") or BUILTIN_MODELS[0])
        return self._named(self._at_hand(draft))

    def _of_run(self, run_id: str) -> Draft:
        """What a run was started with: the studio's words, else its config."""
        words = self.view.jobs.record(run_id).get("first", [])
        if words and not words[1].endswith(".yaml"):
            return Draft.of(given(None, words[1:]))
        return Draft.read(self.place.run(run_id) / "run.yaml")

    def _named(self, draft: Draft) -> Draft:
        """With a directory that is free."""
        values = draft.values
        wanted = values.get("output_dir", "").removeprefix("saves/").strip("/") or self._usual(values)
        wanted = re.sub(r"-\d+$", "", wanted)
        try:
            values["output_dir"] = self.place.output_dir(self.place.free_run_id(wanted))
        except UserError:
            values["output_dir"] = self.place.output_dir(self.place.free_run_id(self._usual(values)))
        return draft

    def _at_hand(self, draft: Draft) -> Draft:
        """Without the rewards that a beginning assumes and that are not here; with a function that is."""
        values, code = draft.values, self.place.code()
        if values.get("reward_funcs", "").partition(":")[0].endswith(".py") and values["reward_funcs"] not in code:
            del values["reward_funcs"]
            if code:
                values["reward_funcs"] = code[0]
        if "reward_model" in values and not (self.place.root / values["reward_model"]).exists():
            del values["reward_model"]
        return draft

    def _usual(self, values: dict[str, str]) -> str:
        model = values.get("model_name_or_path", "model")
        stage, method = values.get("stage", "sft"), values.get("finetuning_type", "lora")
        usual = default_output_dir(model, method, stage).removeprefix("saves/")
        return re.sub(r"[^\w./-]+", "-", usual)  # a directory of any name may hold a model

    # --- what is on the page -----------------------------------------------------------------

    def build(self) -> None:
        """Everything, top to bottom."""
        t = self.view.t
        with heading(self.view, t("train.title"), note=t("train.note")):
            button(t("train.load"), self._load_dialog, icon="folder_open")
            button(t("train.save"), self._save_dialog, icon="save")
        if self.note:
            problems(self.note)
        self._stages()
        with ui.element("div").classes("train-columns"):
            with ui.element("div").classes("train-form"):
                for name in forms.FRONT:
                    self._card(name)
                self._everything()
            with ui.element("div").classes("train-side"):
                self._start_card()
                self._written()
        self._check()

    def _stages(self) -> None:
        current = self.draft.values.get("stage", "sft")
        label = self.view.t("train.stage")
        with ui.element("div").classes("stages").props(f'role=group aria-label="{label}"'):
            for name, stage in STAGES.items():
                if stage.instead:
                    continue
                chosen = name == current
                made = ui.element("button").classes("stage" + (" stage-chosen" if chosen else ""))
                made.props(f"type=button aria-pressed={'true' if chosen else 'false'}")
                with made:
                    ui.label(name.upper().replace("_", " ")).classes("stage-name")
                    ui.label(self.view.maybe(f"train.stage_{name}") or stage.help).classes("stage-help")
                made.on(
                    "click", lambda _, name=name: self._take(self._named(self._at_hand(self.draft.with_stage(name))))
                )

    def _card(self, name: str) -> None:
        keys = forms.front(name, self.implied)
        if keys:
            with card(self.view.t(f"train.card_{name}")):
                with ui.element("div").classes("fields"):
                    for key in keys:
                        self._field(key)
                if name == "data":
                    button(self.view.t("train.look"), self._look_at_data, icon="visibility")

    def _field(self, key: forms.Key, note: str | None = None) -> None:
        value, unset = self.draft.values.get(key.name), key.unset(self.implied)
        options = found_here(key.name, self.place, self.draft.values)
        widget = forms.Widget(key, self.view, value, self._change, options, note, unset)
        self.widgets.setdefault(key.name, []).append(widget)

    def _look_at_data(self) -> None:
        """The first dataset, with this model's tokens."""
        values = self.draft.values
        name = values.get("dataset", "").split(",")[0].strip()
        asked = {"model": values.get("model_name_or_path"), "cutoff": values.get("cutoff_len")}
        if name:
            self.view.open(f"/data/{quote(name)}", **{key: value for key, value in asked.items() if value})

    # --- all other keys ----------------------------------------------------------------------

    def _everything(self) -> None:
        """Every other key: found by typing, or section by section; made when they are looked at."""
        with card(self.view.t("train.card_all"), note=self.view.t("train.all_note")):
            found = ui.input(self.view.t("train.search")).props("outlined dense clearable debounce=200 type=search")
            with found.add_slot("prepend"):
                ui.icon("search").props("aria-hidden=true")
            hits = ui.element("div").classes("fields")
            found.on_value_change(lambda event: self._search(str(event.value or ""), hits))
            for section, keys in forms.others().items():
                self._section(section, keys)

    def _section(self, section: str, keys: Sequence[forms.Key]) -> None:
        count = sum(key.name in self.draft.values for key in keys)
        title = self.view.t(f"train.section_{section}") if section in _SECTIONS else section
        folded = ui.expansion(title, caption=self.view.t("train.set", count=count) if count else None)
        folded.classes("section").props("dense")
        with folded:
            place = ui.element("div").classes("fields")

        def fill(event: Any) -> None:
            if event.value and not place.default_slot.children:
                with place:
                    for key in keys:
                        self._field(key, forms.why_not(key.name, self.implied))
                self._tell()

        folded.on_value_change(fill)

    def _search(self, text: str, place: ui.element) -> None:
        place.clear()
        if text.strip():
            with place:
                found = forms.search(text, self.view)
                for key in found[:_MOST_HITS]:
                    self._field(key, forms.why_not(key.name, self.implied))
                if not found:
                    ui.label(self.view.t("train.no_key")).classes("muted")
            self._tell()

    # --- starting ----------------------------------------------------------------------------

    def _start_card(self) -> None:
        t = self.view.t
        with card(t("train.run")):
            self.name = ui.input(t("train.run_name"), value=self._run_name()).props("outlined dense debounce=250")
            self.name.on_value_change(lambda event: self._change("output_dir", f"saves/{str(event.value).strip()}"))
            self.found = ui.element("div").classes("stack train-found").props("aria-live=polite")
            with ui.element("div").classes("toolbar"):
                self.start = button(t("train.start"), self._start, icon="play_arrow", kind="primary")
                self.look = button(t("train.estimate"), self._estimate, icon="straighten")
            self.estimate = ui.element("div").classes("stack").props("aria-live=polite")

    def _run_name(self) -> str:
        return self.draft.values.get("output_dir", "").removeprefix("saves/")

    def _written(self) -> None:
        t = self.view.t
        with card(t("train.preview"), note=t("train.preview_note")):
            with ui.tabs().props("dense align=left no-caps") as tabs:
                as_command = ui.tab("command", t("train.command"))
                as_yaml = ui.tab("yaml", "YAML")
            with ui.tab_panels(tabs, value=as_command).classes("panels"):
                with ui.tab_panel(as_command):
                    self.command = copy_block(self.view, "")
                with ui.tab_panel(as_yaml):
                    self.yaml = copy_block(self.view, "")

    async def _start(self) -> None:
        self._check()
        if self.checked.cfg is None:
            return
        run_id = self.place.run_id(self.draft.values["output_dir"])
        self.start.disable()
        try:
            await asyncio.to_thread(self.view.jobs.start, self.draft.words(), run_id)
        except UserError as error:
            self.start.enable()
            self.found.clear()
            with self.found:
                problems(error.problems)
            return
        self.view.open(f"/run/{run_id}")

    async def _estimate(self) -> None:
        """What `trueup check` says, in a process of its own."""
        self.look.props("loading")
        self.estimate.clear()
        said = await self.view.jobs.run_json(["check", *self.draft.words()])
        self.look.props(remove="loading")
        with self.estimate:
            if said.get("ok"):
                _needs(self.view, said["result"])
            else:
                problems([Problem(**one) for one in said.get("problems", [])])

    # --- what changes ------------------------------------------------------------------------

    def _change(self, key: str, value: str | None) -> None:
        if value is None:
            self.draft.values.pop(key, None)
        else:
            self.draft.values[key] = value
        if key in ("finetuning_type", "pref_loss") and value is not None:
            self._take(self.draft)  # other keys act now
            return
        if key == "model_name_or_path" and value:
            usual = self.place.free_run_id(self._usual(self.draft.values))
            self.draft.values["output_dir"] = self.place.output_dir(usual)
            self.name.value = usual
        self._check()
        self.view.remember(draft=self.draft.pack(), **dict.fromkeys(_BEGINNINGS))

    def _change_stage(self, stage: str) -> None:
        self._take(self._named(self._at_hand(self.draft.with_stage(stage))))

    def _take(self, draft: Draft) -> None:
        """Begin again with another draft."""
        self.view.open("/train", draft=draft.pack())

    def _check(self) -> None:
        self.checked, self.implied = self.draft.check(self.place), self.draft.implied()
        self._tell()
        set_code(self.command, self.draft.command())
        set_code(self.yaml, self.draft.yaml())
        self.found.clear()
        with self.found:
            verdict(self.view, self.checked)
        self.start.set_enabled(self.checked.cfg is not None)

    def _tell(self) -> None:
        for widgets in self.widgets.values():
            for widget in widgets:
                widget.tell(self.checked)

    # --- configs -----------------------------------------------------------------------------

    def _load_dialog(self) -> None:
        t = self.view.t
        with ui.dialog(value=True), ui.card().classes("dialog"):
            ui.label(t("train.load")).classes("h2")
            for name in self.place.configs():
                row = button(
                    name, lambda name=name: self.view.open("/train", config=name), icon="description", kind="quiet"
                )
                row.props("align=left")
            text = ui.textarea(t("train.paste")).props("outlined autogrow input-class=mono")
            wrong = ui.element("div")

            def read_text() -> None:
                folder = self.place.private("pasted")
                path = folder / f"{time.time_ns()}.yaml"
                path.write_text(str(text.value), encoding="utf-8")
                try:
                    self._take(self._named(Draft.read(path, "YAML")))
                except UserError as error:
                    wrong.clear()
                    with wrong:
                        problems(error.problems)
                finally:
                    path.unlink()

            button(t("train.use"), read_text, kind="primary")

    def _save_dialog(self) -> None:
        t = self.view.t
        with ui.dialog(value=True) as dialog, ui.card().classes("dialog"):
            ui.label(t("train.save")).classes("h2")
            name = ui.input(t("train.config_name"), value=PurePath(self._run_name()).name).props("outlined dense")
            wrong = ui.element("div")

            def write() -> None:
                try:
                    path = self.place.config(str(name.value).strip())
                except UserError as error:
                    wrong.clear()
                    with wrong:
                        problems(error.problems)
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.draft.yaml(), encoding="utf-8")
                dialog.close()
                ui.notify(t("train.saved", name=f"configs/{path.name}"), type="positive")

            button(t("train.save"), write, kind="primary")


def _needs(view: View, report: dict[str, Any]) -> None:
    """The estimate in a few lines."""
    t, needs, steps = view.t, report["estimate"], report["steps"]
    fits = needs["memory"] <= report["memory_free"]
    rows = [
        (t("train.memory"), sized(needs["memory"]), t("train.free", size=sized(report["memory_free"])), fits),
        (t("train.disk"), sized(report["disk_needed"]), t("train.free", size=sized(report["disk_free"])),
         report["disk_needed"] <= report["disk_free"]),
        (t("train.steps"), f"{steps['total_steps']:,}", t("train.rows_a_step", count=steps["rows_per_step"]), True),
    ]  # fmt: skip
    if seconds := _seconds(view, report):
        rows.append((t("train.time"), lasting(seconds), t("train.time_from"), True))
    trained = f"{needs['trainable']:,} / {needs['parameters']:,}"
    rows.append((t("train.trained"), trained, f"{needs['device']}, {needs['dtype']}", True))
    with ui.element("dl").classes("needs"):
        for label, value, note, well in rows:
            with ui.element("div").classes("need" + ("" if well else " need-bad")):
                for tag, text in (("dt", label), ("dd", value)):
                    with ui.element(tag):
                        ui.label(text)
                ui.label(note).classes("muted small")
    datasets = report["data"].get("datasets", {})
    for name, found in datasets.items():
        text = t("train.rows", name=name, kept=found["kept"], read=found["read"])
        ui.label(text).classes("small" if found["kept"] == found["read"] else "notice small")


def _seconds(view: View, report: dict[str, Any]) -> float | None:
    """From the tokens of all steps, and how many a second the newest run of the same model did."""
    tokens, model = report.get("tokens"), report["config"].get("model_name_or_path")
    if not tokens or not tokens.get("epoch"):
        return None
    saves = view.workspace.root / "saves"
    newest = sorted(saves.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)[:20]
    for path in newest:
        config = path.parent / "run.yaml"
        if config.is_file() and f"model_name_or_path: {model}\n" in config.read_text(encoding="utf-8"):
            speed = read(path.parent).last("tokens_per_second")
            if speed:
                return tokens["epoch"] * report["steps"]["epochs"] / speed
    return None
