"""The reference's log-probabilities for every batch a run will ask about: from a table, or live."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trueup.config.methods import needs_reference
from trueup.config.schema import RunConfig
from trueup.data.encode import EncodedDataset
from trueup.data.forest import build_forest, num_predictions
from trueup.errors import ConfigError, DivergenceError, ModelError
from trueup.models.hub import resolve_model
from trueup.models.load import Loaded, hub_access, load_frozen, read_model_config
from trueup.models.reference import LiveReference, ReferenceTable, table_path
from trueup.recipes.batches import Batch
from trueup.training.backend import Backend
from trueup.types import Forest

log = logging.getLogger("trueup")

TELL_SECONDS = 30.0  # between two lines on how far a long pass has come


class References:
    """Reference log-probabilities of batches: a table on disk, or a live model for those who ask for it."""

    def __init__(self, live: LiveReference | None, tables: dict[str, ReferenceTable]) -> None:
        self.live = live
        self.tables = tables

    def token_logps(self, batch: Batch, forest: Forest) -> Tensor:
        if self.tables:
            return self.tables[batch.split].get(batch.indices)
        assert self.live is not None
        return self.live.token_logps(forest)


def build_references(
    cfg: RunConfig,
    loaded: Loaded,
    datasets: Mapping[str, EncodedDataset],
    batches: Mapping[str, Iterable[np.ndarray]],
    layouts: Mapping[str, str],
    backend: Backend,
) -> References:
    """The reference's log-probabilities for every batch the run will ask about.

    By default they are computed before the first step, in the run's own batches, and kept on disk: full training
    then needs no second copy of the model. `precompute_ref_log_probs: false` runs the reference in every step.

    Args:
        batches: set name → example indices of all its micro-batches, over all processes, in order of use.
        layouts: set name → what decided, besides the data, which examples are in one micro-batch.
    """
    live = live_reference(cfg, loaded)
    if not cfg.objective.precompute_ref_log_probs:
        return References(live, {})
    fingerprint = live.fingerprint()
    tables = {}
    for name, dataset in datasets.items():
        sizes = [num_predictions(example) for example in dataset]
        layout = f"{layouts[name]} {kernels(backend.device)}"
        tables[name] = ReferenceTable(sizes, table_path(fingerprint, dataset.fingerprint, layout))
        fill_table(tables[name], live, dataset, batches[name], backend, name)
    return References(None, tables)


def kernels(device: torch.device) -> str:
    """What decides the last bits of a forward pass, besides its inputs."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch.__version__} {device.type}{threads}"


def check_reference(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether there is a reference that knows the tokens; seen before anything large is loaded (C14).

    Raises:
        ModelError: `ref_model` or `ref_model_adapters` is not there, or was made for fewer tokens.
        ConfigError: an evaluation has nothing to compare the model with.
    """
    if not needs_reference(cfg):
        return
    access = hub_access(cfg.model)
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        name, location, _ = resolve_model(*names, access, ("ref_model", "ref_model_adapters"))
        _check_tokens(cfg, name, location, len(tokenizer))
    elif not cfg.train.do_train:
        _, _, starts = resolve_model(cfg.model.model_name_or_path, cfg.model.adapter_name_or_path, access)
        if not starts:  # a model compared with itself says nothing
            raise ConfigError(
                "evaluating preferences compares the model with a reference, and none is named", where="ref_model",
                fix="set ref_model to the model the training started from, or give base and adapter separately",
            )  # fmt: skip


def _check_tokens(cfg: RunConfig, name: str, location: str, num_tokens: int) -> None:
    rows = read_model_config(location, cfg.model, name, "ref_model").get_text_config().vocab_size
    if rows < num_tokens:
        raise ModelError(
            f"{name} has embeddings for {rows} tokens, the tokenizer has {num_tokens}", where="ref_model",
            expected="a reference that reads the same tokens as the model",
        )  # fmt: skip


def live_reference(cfg: RunConfig, loaded: Loaded) -> LiveReference:
    """The model that stands for the reference, ready to be run."""
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        return LiveReference(load_frozen(cfg.model, *names, loaded.device, loaded.dtype))
    if not cfg.train.do_train:
        return base_reference(loaded)
    make = LiveReference.before_training if cfg.objective.precompute_ref_log_probs else LiveReference.of
    return make(loaded.policy, loaded.adapters)


def base_reference(loaded: Loaded) -> LiveReference:
    """What an evaluation without `ref_model` compares with: the model without its adapters."""
    log.warning(
        "evaluating against %s without adapters; if the training started from an adapter, name it: ref_model: %s, "
        "ref_model_adapters: DIR",
        loaded.base_name, loaded.base_name,
    )  # fmt: skip
    return LiveReference(loaded.policy, loaded.policy.model.disable_adapter)


def fill_table(
    table: ReferenceTable,
    live: LiveReference,
    dataset: EncodedDataset,
    batches: Iterable[np.ndarray],
    backend: Backend,
    name: str,
) -> None:
    """Compute what the table lacks; the processes share the batches and sum their tables (gaps count as zero)."""
    backend.copy_from_first([table.values])  # or processes that found another state of the file would part here
    missing = table.missing(batches)
    if not missing:
        log.info("reference log-probabilities of %s: read from %s", name, table.path)
        return
    rows = sum(len(batch) for batch in missing)
    log.info("reference log-probabilities of %s: computing %d rows once", name, rows)
    gaps = torch.isnan(table.values)
    told = time.monotonic()
    done = 0
    for batch in missing[backend.rank :: backend.world_size]:
        examples = [dataset[i] for i in batch]
        values = live.token_logps(build_forest(examples))
        if not bool(torch.isfinite(values).all()):
            raise DivergenceError(
                "the reference's log-probabilities are not finite",
                where="rows " + ", ".join(example.row for example in examples),
                fix="compute in bf16 or fp32 (fp16 overflows), or look at the reference model",
            )
        table.put(batch, values)
        done += len(batch)
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("reference log-probabilities of %s: %d of %d rows", name, done * backend.world_size, rows)
            if backend.world_size == 1:
                table.save()  # whoever interrupts a long pass finds its rows again
    filled = gaps & ~torch.isnan(table.values)
    computed = torch.where(filled, table.values, 0.0)
    backend.sum_gradients([computed])
    wanted = table.positions(np.concatenate(missing)) & gaps
    table.values[wanted] = computed[wanted]
    backend.on_first(table.save)
