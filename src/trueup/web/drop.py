"""A place to drop a file on, or to choose one by a button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from nicegui import ui

from trueup.web import uploads
from trueup.web.view import View

#: Quasar's own header hides its file field inside of a button, where no screen reader finds it
_HEAD = """
<div class="drop-head">
  <q-icon name="upload_file" aria-hidden="true"></q-icon>
  <div class="drop-words"><div class="drop-title">{title}</div><div class="muted small">{note}</div></div>
  <span v-if="props.isUploading" class="muted small number" role="status">{{{{ props.uploadProgressLabel }}}}</span>
  <q-btn no-caps unelevated class="button button-plain" label="{choose}" :disable="props.isUploading"
         @click="props.pickFiles"></q-btn>
  <div hidden><q-uploader-add-trigger></q-uploader-add-trigger></div>
</div>
"""


def drop(view: View, suffixes: Sequence[str], take: Callable[..., Any], note: str = "") -> ui.upload:
    """The place; `take` gets NiceGUI's event of a file that has arrived whole. `note` stands below its title."""
    uploader = ui.upload(
        auto_upload=True, max_file_size=uploads.MOST_BYTES, on_upload=take,
        on_rejected=lambda: ui.notify(view.t("data.rejected"), type="negative"),
    )  # fmt: skip
    words = {"title": view.t("data.upload"), "note": note, "choose": view.t("data.choose")}
    uploader.add_slot("header", _HEAD.format_map({name: escape(text) for name, text in words.items()}))
    return uploader.classes("drop").props(f'flat accept="{",".join(suffixes)}"')
