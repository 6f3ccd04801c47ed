"""The reference's log-probabilities for every batch a run will ask about: from a table, or live."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trueup.config.methods import ONLINE, needs_reference
from trueup.config.schema import ModelSection, RunConfig
from trueup.data.encode import EncodedDataset
from trueup.data.forest import build_forest, num_predictions
from trueup.errors import ConfigError, DivergenceError, ModelError
from trueup.models.adapters import make_room
from trueup.models.estimate import without_weights
from trueup.models.hub import resolve_model
from trueup.models.load import Loaded, hub_access, load_reference, read_model_config
from trueup.models.memory import FP32
from trueup.models.quantise import expected_bytes, in_bits
from trueup.models.reference import LiveReference, MovingReference, ReferenceTable, table_path
from trueup.models.tuners import ADAPTERS
from trueup.models.vocabulary import num_rows
from trueup.recipes.batches import Batch
from trueup.recipes.objective import terms_of
from trueup.training.backend import Backend
from trueup.training.profile import phase
from trueup.types import Forest
from trueup.waiting import waiting

log = logging.getLogger("trueup")

TABLE_TOKENS = 4096  # of a forward pass that fills a table: enough to keep a GPU busy, little beside a training step
SAVE_SECONDS = 30.0  # what a kill may cost


class References:
    """Reference log-probabilities of batches: a table on disk, or a live model for those who ask for it."""

    def __init__(self, live: LiveReference | None, tables: dict[str, ReferenceTable]) -> None:
        self.live = live
        self.tables = tables

    def token_logps(self, batch: Batch, forest: Forest) -> Tensor:
        if not self.tables:
            return self.live_token_logps(forest)
        with phase("reference"):
            return self.tables[batch.split].get(batch.indices)

    def live_token_logps(self, forest: Forest) -> Tensor:
        """[N] of any forest, whether or not its rows are in a table."""
        assert self.live is not None
        with phase("reference"):
            return self.live.token_logps(forest)

    def follow(self, share: float) -> None:
        """Move the reference towards the policy (TR-DPO)."""
        assert isinstance(self.live, MovingReference)
        self.live.follow(share)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the reference: nothing, unless it moves."""
        if not isinstance(self.live, MovingReference):
            return {}
        return {f"{_PAST}{name}": tensor for name, tensor in self.live.past.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if isinstance(self.live, MovingReference):
            self.live.load({name.removeprefix(_PAST): tensor for name, tensor in state.items()})


_PAST = "reference."


def build_references(
    cfg: RunConfig,
    loaded: Loaded,
    datasets: Mapping[str, EncodedDataset],
    batches: Mapping[str, Iterable[np.ndarray]],
    backend: Backend,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> References | None:
    """The reference's log-probabilities for every batch the run will ask about; None if a stop cut it short.

    By default they are computed before the first step and kept on disk, in a layout that is no run's own, so that runs
    with other batches, seeds and epochs share them; full training then needs no second copy of the model.
    `precompute_ref_log_probs: false` runs the reference in every step.

    Args:
        batches: set name → example indices of all its micro-batches, over all processes.
        asked_to_stop: polled between forward passes; what is computed by then is kept.
    """
    live = live_reference(cfg, loaded)
    if not cfg.objective.precompute_ref_log_probs:
        return References(live, {})
    fingerprint = backend.gather(live.fingerprint() if backend.rank == 0 else "")[0]
    tables = {}
    for name, dataset in datasets.items():
        asked = list(batches[name])
        rows = rows_to_compute(asked, len(dataset))
        sizes = [num_predictions(example) for example in dataset]
        layout = f"{TABLE_TOKENS} tokens, {_digest_of(rows)}, {kernels(backend.device)}"
        tables[name] = ReferenceTable(sizes, table_path(fingerprint, dataset.fingerprint, layout))
        if not fill_table(
            tables[name], live, dataset, table_batches(rows, dataset.lengths), backend, name, asked_to_stop
        ):
            return None
        if not backend.rank:
            tell_rounding(tables[name], live, dataset, asked[0], name)
    return References(live if runs_beside(cfg) else None, tables)


def rows_to_compute(batches: Sequence[np.ndarray], size: int) -> np.ndarray:
    """All rows of a set, for every run alike, unless a run asks for less than half of them."""
    asked = np.unique(np.concatenate(batches))
    return asked if 2 * len(asked) < size else np.arange(size)


def table_batches(rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Rows by length, cut where a forward pass is full: the longest first, so that want of memory shows at once."""
    batches: list[list[int]] = []
    room = 0
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        if not batches or lengths[row] > room:
            batches.append([])
            room = TABLE_TOKENS
        batches[-1].append(row)
        room -= int(lengths[row])
    return [np.array(batch) for batch in batches]


def _digest_of(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()


def kernels(device: torch.device) -> str:
    """What decides the last bits of a forward pass, besides its inputs."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        amx = " amx" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else ""
        chip = f"{torch.backends.cpu.get_cpu_capability()}{amx} {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} {device.type} {chip}"


def check_reference(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether there is a reference that knows the tokens; seen before anything large is loaded (C14).

    Raises:
        ModelError: `ref_model` or `ref_model_adapters` is not there, or was made for fewer tokens.
        ConfigError: an evaluation has nothing to compare the model with.
    """
    if not needs_reference(cfg) or not (cfg.train.do_train or cfg.train.do_eval):
        return
    access = hub_access(cfg.model)
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        name, location, starts = resolve_model(*names, access, ("ref_model", "ref_model_adapters"))
        _check_tokens(cfg, name, location, starts, len(tokenizer))
    elif not cfg.train.do_train:
        _, _, starts = resolve_model(cfg.model.model_name_or_path, cfg.model.adapter_name_or_path, access)
        if not starts:  # a model compared with itself says nothing
            raise ConfigError(
                "evaluating preferences compares the model with a reference, and none is named", where="ref_model",
                fix="set ref_model to the model the training started from, or give base and adapter separately",
            )  # fmt: skip


def _check_tokens(cfg: RunConfig, name: str, location: str, starts: list[str], num_tokens: int) -> None:
    config = read_model_config(location, cfg.model, name, "ref_model")
    rows = config.get_text_config().vocab_size
    if rows < num_tokens and starts:  # an adapter may bring rows along
        shape = without_weights(config, cfg.model)
        make_room(shape, starts)
        rows = num_rows(shape)
    if rows < num_tokens and not cfg.model.resize_vocab:
        raise ModelError(
            f"{name} has embeddings for {rows} tokens, the tokenizer has {num_tokens}", where="ref_model",
            expected="a reference that reads the same tokens as the model",
        )  # fmt: skip


def reference_section(cfg: RunConfig) -> ModelSection:
    """How `ref_model` is loaded."""
    return in_bits(cfg.model, cfg.objective.ref_model_quantization_bit)


def live_reference(cfg: RunConfig, loaded: Loaded) -> LiveReference:
    """The model that stands for the reference, ready to be run."""
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        return LiveReference(load_reference(reference_section(cfg), *names, loaded.device, loaded.dtype))
    if not cfg.train.do_train:
        return base_reference(loaded)
    if cfg.objective.sync_ref_model:
        return MovingReference(loaded.policy)
    before_only = cfg.objective.precompute_ref_log_probs and not runs_beside(cfg)
    make = LiveReference.before_training if before_only else LiveReference.of
    return make(loaded.policy, loaded.adapters)


def runs_beside(cfg: RunConfig) -> bool:
    """Whether the reference is asked about more than the rows of the data (KTO: about mismatched ones)."""
    return any(term.objective.needs_mismatched for term in terms_of(cfg))


def runs_in_training(cfg: RunConfig) -> bool:
    """Whether a reference is in memory while the policy trains."""
    if cfg.objective.stage in ONLINE:
        return cfg.objective.stage in ("ppo", "online_dpo") or bool(cfg.online.ppo_kl_coeff)
    return needs_reference(cfg) and (not cfg.objective.precompute_ref_log_probs or runs_beside(cfg))


def reference_bytes(cfg: RunConfig, base: PreTrainedModel, dtype: torch.dtype) -> int:
    """Memory that the reference takes beside the policy's model while that trains; it need not be loaded yet.

    A model of its own, copies of what full training moves, or nothing: adapters are switched off.
    """
    if not (cfg.train.do_train and runs_in_training(cfg)):
        return 0
    if cfg.objective.ref_model:
        names = cfg.objective.ref_model, cfg.objective.ref_model_adapters
        name, location, _ = resolve_model(*names, hub_access(cfg.model), ("ref_model", "ref_model_adapters"))
        config = read_model_config(location, cfg.model, name, "ref_model")
        return expected_bytes(without_weights(config, cfg.model), reference_section(cfg), dtype)
    if cfg.objective.sync_ref_model:  # what trains, as it runs and in fp32
        trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
        return trained * (dtype.itemsize + (FP32 if dtype != torch.float32 else 0))
    if cfg.tuning.finetuning_type in ADAPTERS:
        return 0
    return sum(p.numel() for p in base.parameters()) * dtype.itemsize


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
    batches: Sequence[np.ndarray],
    backend: Backend,
    name: str,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Compute what the table lacks, saving now and then; the processes take turns. False if a stop cut it short."""
    backend.copy_from_first([table.values])  # or processes that found another state of the file would part here
    missing = table.missing(batches)
    if not missing:
        log.info("reference log-probabilities of %s: read from %s", name, table.path)
        return True
    mine, rounds = missing[backend.rank :: backend.world_size], len(missing[:: backend.world_size])
    tokens = np.cumsum([int(dataset.lengths[batch].sum()) for batch in missing])[:: backend.world_size].tolist()
    rows = sum(len(batch) for batch in missing)
    log.info("reference log-probabilities of %s: computing %s rows, once for all runs", name, f"{rows:,}")
    gaps = torch.isnan(table.values)
    saved = time.monotonic()
    with waiting(f"reference of {name}", tokens[-1], "tokens") as tell:
        for turn in range(rounds):
            stop = backend.any(asked_to_stop())
            if stop or backend.any(time.monotonic() - saved > SAVE_SECONDS):
                gaps = _share(table, gaps, backend)
                backend.on_first(table.save)
                saved = time.monotonic()
            if stop:
                return False
            if turn < len(mine):
                table.put(mine[turn], _finite_logps(live, dataset, mine[turn]))
            tell(tokens[turn])
    _share(table, gaps, backend)
    backend.on_first(table.save)
    return True


def _finite_logps(live: LiveReference, dataset: EncodedDataset, batch: np.ndarray) -> Tensor:
    examples = [dataset[i] for i in batch]
    values = live.token_logps(build_forest(examples))
    if not bool(torch.isfinite(values).all()):
        raise DivergenceError(
            "the reference's log-probabilities are not finite",
            where="rows " + ", ".join(example.row for example in examples),
            fix="compute in bf16 or fp32 (fp16 overflows), or look at the reference model",
        )
    return values


def _share(table: ReferenceTable, gaps: Tensor, backend: Backend) -> Tensor:
    """Give every process what the others have put into `gaps`, no two the same; what is still a gap."""
    filled = gaps & ~torch.isnan(table.values)
    sums = [torch.where(filled, table.values, 0.0), filled.float()]
    backend.sum_gradients(sums)
    table.values = torch.where(gaps & (sums[1] > 0), sums[0], table.values)
    return torch.isnan(table.values)


def tell_rounding(
    table: ReferenceTable, live: LiveReference, dataset: EncodedDataset, batch: np.ndarray, name: str
) -> None:
    """Say how far the table is from the live reference in one of the run's own batches: rounding, and no more."""
    forest = build_forest([dataset[i] for i in batch])
    gap = (table.get(batch) - live.token_logps(forest).cpu()).double()
    answers = torch.zeros(forest.num_sequences, dtype=torch.float64).index_add(0, forest.owner, gap)
    if not gap.any():
        log.info("reference log-probabilities of %s: cached and live are the same to the bit in the first batch", name)
        return
    log.info(
        "reference log-probabilities of %s: cached and live differ by up to %.1e a token and %.1e an answer in the "
        "first batch, as %s rounds from batch to batch; precompute_ref_log_probs: false computes them in every step",
        name, float(gap.abs().max()), float(answers.abs().max()), str(live.policy.dtype).removeprefix("torch."),
    )  # fmt: skip
