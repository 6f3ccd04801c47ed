"""Texts that a quantiser looks at: rows of a dataset as the model sees them."""

from __future__ import annotations

from trueup.config.schema import RunConfig
from trueup.data.chat_template import ChatTemplate
from trueup.data.examples import Chat, Text
from trueup.data.load import hub_settings, load_examples


def calibration_texts(cfg: RunConfig, template: ChatTemplate) -> list[str]:
    """Plain texts, or conversations through the model's template.

    Raises:
        DataError: the dataset has neither.
    """
    export = cfg.export
    found = load_examples(
        [str(export.export_quantization_dataset)], kind="text", beside="chat", dataset_dir=cfg.data.dataset_dir,
        hub=cfg.model.hub, max_samples=export.export_quantization_nsamples, **hub_settings(cfg),
    )  # fmt: skip
    texts = []
    for row in found.train:
        match row:
            case Text():
                texts.append(row.text)
            case Chat():
                texts.append(template.render(row.messages, row.tools))
    return texts
