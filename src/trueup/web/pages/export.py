"""Export: adapters folded into their base by `trueup export`, quantised, as GGUF, on a hub; and what was written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nicegui import ui

from trueup.config.exporting import READ_WITH
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.quantities import sized
from trueup.training import durable
from trueup.web.chore_view import ChorePage, chores_list, files, table
from trueup.web.chores import Chores
from trueup.web.frame import button, card, copy_block, figure, row
from trueup.web.pages import page
from trueup.web.results import short
from trueup.web.speakers import base_of
from trueup.web.verb_form import VerbForm
from trueup.web.view import View


@page("/export", icon="inventory_2", order=80)
def export(view: View) -> None:
    """The form, and below it what was written."""
    form = ExportForm(view)
    form.build()
    chores_list(view, form.chores, "/exported", view.t("export.list"), view.t("export.none"), "inventory_2")


@page("/exported/{chore:path}", icon="inventory_2", order=81, below="/export", title="export.one")
def exported(view: View) -> None:
    """One export."""
    ChorePage(view, Chores(view.workspace, "export"), "/export", partial(_result, view)).build()


class ExportForm(VerbForm):
    """What is written lies under `exports/`."""

    verb, words, address, out = "export", "export", "/exported", "export_dir"
    reads = READ_WITH
    front = {
        "models": ("model_name_or_path", "adapter_name_or_path", "merge_method"),
        "format": ("infer_dtype", "export_gguf", "export_size"),
        "quantise": (
            "export_quantization_bit", "export_quantization_method", "export_quantization_dataset",
            "export_quantization_nsamples",
        ),
        "hub": ("export_hub_model_id", "hub_private_repo"),
    }  # fmt: skip

    def of_run(self, run_id: str) -> dict[str, str]:
        path, name = self.place.run(run_id), self.place.output_dir(run_id)
        if (path / "adapter_config.json").is_file():
            return {"model_name_or_path": base_of(path) or "", "adapter_name_or_path": name}
        return {"model_name_or_path": f"./{name}"}

    def usual(self) -> str:
        values = self.draft.values
        name = values.get("adapter_name_or_path", "").split(",")[-1] or values.get("model_name_or_path", "model")
        parts = [part for part in name.removeprefix("./").replace("builtin:", "").replace(":", "-").split("/") if part]
        tail = "-".join(parts[-2:]) if parts and parts[-1].startswith("checkpoint-") else (parts or ["model"])[-1]
        return f"exports/{tail}"

    def read(self, words: Sequence[str]) -> RunConfig:
        return load_config(None, words, verb="export")


# --- what was written ----------------------------------------------------------------------------


def _result(view: View, folder: Path) -> None:
    t, kept = view.t, durable.read_json(folder / "export.json")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = kept.get("largest_logit_difference", {})
    with ui.element("div").classes("grid-4 figures"):
        figure(t("export.size"), sized(size))
        figure(t("export.dtype"), str(kept.get("dtype", "–")))
        for name, one in found.items():
            share = one["largest"] / one["scale"] if one.get("scale") else 0.0
            note = t("export.agreement", share=f"{100 * one['agreement']:.1f}")
            figure(t("export.difference", name=name), f"{100 * share:.2g} %", note=note)
    name = folder.relative_to(view.workspace.root).as_posix() if folder.is_relative_to(view.workspace.root) else ""
    with card(t("export.use")), ui.element("div").classes("stack"):
        lines = [f"trueup chat --model_name_or_path {name or folder}"]
        if (folder / "Modelfile").is_file():
            lines.append(f"ollama create {folder.name} -f {name or folder}/Modelfile")
        copy_block(view, "\n".join(lines))
        with row():
            button(t("export.talk"), lambda: view.open("/chat", model=f"./{name}"), icon="forum", kind="primary")
    with ui.element("div").classes("grid-2 results-end"):
        with card(t("export.facts")):
            shown = ("base", "adapters", "merge", "weights", "template", "quantised", "gguf")
            rows = [[view.maybe(f"export.fact_{key}") or key, _word(kept[key])] for key in shown if key in kept]
            rows += [
                [t("export.difference", name=key), f"{short(one['largest'])} / {short(one['scale'])}"]
                for key, one in found.items()
            ]
            table(["", ""], rows, label=t("export.facts"))
        files(view, folder)


def _word(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
