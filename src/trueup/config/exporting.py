"""What `trueup export` reads of a config: what unset keys mean, what has no effect, what cannot be meant.

As for `trueup eval`, keys that only train are let pass in its file, and refused on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trueup.config.checks import Place, broken, not_yet
from trueup.config.methods import SET
from trueup.config.rules.rule import Rule
from trueup.config.schema import RunConfig
from trueup.config.verbs import read_with, section_keys, without_effect
from trueup.errors import Problem

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING += tuple(f"{name}_svd" for name in PRUNING)
CALIBRATED = ("gptq", "awq")
#: bits that each library writes.
WIDTHS = {"bnb": (4, 8), "gptq": (2, 3, 4, 8), "awq": (4,)}

#: keys → the conditions under which an export reads them; keys in no row are of other verbs.
_ROWS: list[tuple[str, dict[str, Any]]] = [
    (section_keys("model"), {}),
    ("infer_dtype export_dir export_size export_device export_gguf export_hub_model_id overwrite_export_dir", {}),
    ("export_quantization_bit", {}),
    ("export_quantization_method", {"export_quantization_bit": SET}),
    (
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen",
        {"export_quantization_bit": SET, "export_quantization_method": CALIBRATED},
    ),
    ("merge_method merge_weights num_expand", {}),
    ("merge_density", {"merge_method": PRUNING}),
    ("hub_private_repo hub_revision", {"export_hub_model_id": SET}),
    ("template default_system tool_format enable_thinking preserve_thinking", {}),
    ("dataset_dir finetuning_type stage seed on_unused_keys", {}),
]
READ_WITH: dict[str, Mapping[str, Any]] = read_with(_ROWS)
#: keys that act here and with no other verb yet.
IN_EXPORTS = frozenset({"infer_dtype"})
_REPOSITORY = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*").fullmatch


def derive(cfg: RunConfig) -> RunConfig:
    """What quantises, and who sees what is pushed."""
    changes: dict[str, Any] = {}
    if cfg.export.export_quantization_bit and cfg.export.export_quantization_method is None:
        changes["export_quantization_method"] = "gptq" if cfg.export.export_quantization_dataset else "bnb"
    if cfg.export.export_hub_model_id and cfg.train.hub_private_repo is None:
        changes["hub_private_repo"] = True
    return cfg.replace(**changes)


def check(cfg: RunConfig, place: Place, bad: set[str]) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass."""

    def of_the_file(key: str) -> bool:
        return not (place(key) or "").startswith("--")

    problems = not_yet(cfg, place, training=False, acting=IN_EXPORTS) + broken(cfg, place, bad, RULES)
    return problems, without_effect(cfg, place, bad, "export", READ_WITH, passes=of_the_file)


def _width_fits(c: Any) -> bool:
    method = c.export_quantization_method
    return not (c.export_quantization_bit and method) or c.export_quantization_bit in WIDTHS[method]


RULES = [
    Rule(
        ("model_name_or_path",),
        lambda c: not c.model_name_or_path,
        "`model_name_or_path` is missing",
        "name a model: a run's output directory, a directory, a hub id, or builtin:sql-tiny",
    ),
    Rule(
        ("export_dir",),
        lambda c: not c.export_dir,
        "`export_dir` is missing: there is no place to write to",
        "set export_dir: a directory that is new or empty",
    ),
    Rule(
        ("export_dir",),
        lambda c: c.export_dir and Path(c.export_dir).expanduser().resolve() == Path.cwd(),
        "`export_dir` is the current directory, which cannot be replaced in one step",
        "name a directory inside it",
    ),
    Rule(
        ("merge_weights", "adapter_name_or_path"),
        lambda c: c.merge_weights and len(c.merge_weights) != len(c.adapter_name_or_path),
        "`merge_weights` needs one number for each adapter of `adapter_name_or_path`",
        "give as many as there are adapters",
    ),
    Rule(
        ("merge_method", "adapter_name_or_path"),
        lambda c: c.merge_method != "sum" and len(c.adapter_name_or_path) < 2,
        "`merge_method` says how several adapters come together, and there are fewer than two",
        "name them all in adapter_name_or_path, or drop merge_method",
    ),
    Rule(
        ("export_quantization_method", "export_quantization_bit"),
        lambda c: not _width_fits(c),
        "this library does not write weights of so many bits",
        "bnb: 4 or 8; gptq: 2, 3, 4 or 8; awq: 4 (export_quantization_method)",
    ),
    Rule(
        ("export_quantization_method", "export_quantization_dataset"),
        lambda c: c.export_quantization_bit and c.export_quantization_method in CALIBRATED
        and not c.export_quantization_dataset,
        "gptq and awq look at text while they quantise, and there is none",
        "set export_quantization_dataset: a dataset's name or a file, or export_quantization_method: bnb",
    ),
    Rule(
        ("export_hub_model_id",),
        lambda c: c.export_hub_model_id and not _REPOSITORY(c.export_hub_model_id),
        "`export_hub_model_id` is no name of a repository",
        "write NAME or ACCOUNT/NAME, of letters, digits, `-`, `_` and `.`",
    ),
    Rule(
        ("quantization_bit", "export_quantization_bit"),
        lambda c: c.quantization_bit,
        "an export folds adapters into weights that are not quantised",
        "drop quantization_bit; export_quantization_bit quantises what is written",
    ),
]  # fmt: skip
