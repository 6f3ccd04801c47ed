"""The verb `export`."""

from __future__ import annotations

import click

from trueup.cli_options import (
    PASS_ON,
    ConfigCommand,
    config_words,
    debug_option,
    json_option,
    leading_directories,
    read_config,
)
from trueup.console import Session
from trueup.errors import ConfigError
from trueup.garbage import importing


@click.command(cls=ConfigCommand, context_settings=PASS_ON)
@config_words
@debug_option
@json_option
@click.pass_obj
def export(session: Session, words: tuple[str, ...]) -> None:
    """Merge adapters and write a model for others (merge).

    Also rounded (infer_dtype), quantised (export_quantization_bit), as GGUF with an Ollama Modelfile (export_gguf),
    pushed to a hub (export_hub_model_id, private). What was written is read back and compared with base + adapter.

    \b
    trueup export saves/sql-tiny/dpo --export_dir merged
    trueup export --model_name_or_path BASE --adapter_name_or_path A,B merge_method=ties --export_dir merged
    trueup export saves/sql-tiny/dpo --export_dir gguf --export_gguf q8_0
    trueup export --model_name_or_path BASE --num_expand 8 --export_dir expanded   (LLaMA-Pro)
    """
    directories, rest = leading_directories(words)
    if len(directories) > 1:
        raise ConfigError(
            "export takes one run's directory", where=" ".join(directories), fix="name adapters in adapter_name_or_path"
        )
    cfg = read_config([*rest, *(f"model_name_or_path={name}" for name in directories)], verb="export")
    with importing():
        from trueup.inference.export.export import export as write

    with session.result() as result:
        done = write(cfg)
        result.data, result.text = done.to_dict(), done.render()
