"""What a model's config.json may name: words for settings, never code to fetch or to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trueup.errors import ModelError, Problem

#: implementations that are in transformers; another name is one of the hub's kernels, which are programs.
_ATTENTION = frozenset(
    ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager", "paged|sdpa")
)
_CODE = ("model_file", "trust_remote_code")


def refuse_code(location: str, name: str, key: str, trusted: bool, **access: Any) -> None:
    """Look at a config before anything is made of it.

    A class of the model's own (`auto_map`) is passed over where transformers has one for its type, as transformers
    itself does; everything else that names code is refused, at any depth: CVE-2026-4372, CVE-2026-5241.

    Args:
        trusted: `trust_remote_code`, for this run. access: of the hub, as transformers takes it.

    Raises:
        ModelError: it names code, and is not trusted. OSError, ValueError: it cannot be read.
    """
    if trusted:
        return
    config, _ = PretrainedConfig.get_config_dict(location, **access)
    known = config.get("model_type") in CONFIG_MAPPING
    found = [f"{where} = {value!r}"[:120] for where, value in _naming_code(config, known)]
    if found:
        raise ModelError(
            [
                Problem(
                    f"{name} names code to be run: {one}", where=key, expected="weights and settings only",
                    fix="read that code; if you trust it with your account, set trust_remote_code: true",
                )
                for one in found
            ]
        )  # fmt: skip


def _naming_code(config: Mapping[str, Any], known: bool, where: str = "config.json") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        place = f"{where}: {key}"
        if isinstance(value, Mapping):
            if key == "auto_map" and not known:
                yield place, value
            elif key != "auto_map":
                yield from _naming_code(value, known, place)
        elif (
            (key in _CODE and value)
            or (key.endswith("_kernel") and isinstance(value, str) and "/" in value)
            or (
                key.lstrip("_").startswith("attn_implementation") and isinstance(value, str) and value not in _ATTENTION
            )
        ):
            yield place, value
