"""From a config to a policy: device, precision, weights, adapters. The one place that loads models."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils import logging as transformers_logging

from trueup import memory
from trueup.config.schema import ModelSection, TrainSection, TuningSection
from trueup.errors import ModelError, Problem
from trueup.garbage import no_collection
from trueup.models import quantise
from trueup.models.adapters import TRAINED, Adapters, Start, attach_frozen, attach_trained, make_room, merge_adapters
from trueup.models.allocator import give_back, hold_nothing, keep_memory
from trueup.models.booster import PLAIN, boost
from trueup.models.config_code import refuse_code
from trueup.models.expansion import check_outlet, keep_to_blocks, trained_blocks
from trueup.models.hub import HubAccess, resolve_model, unreachable
from trueup.models.memory import Recomputation, decoder_layers, fit_to_memory
from trueup.models.policy import Policy
from trueup.models.principal import originals_of, take_lost, take_principal
from trueup.models.rope import check_built, fit_rope, stretch_of
from trueup.models.rows import matrices
from trueup.models.tokenizer import hub_access
from trueup.models.tokenizer import load_tokenizer as load_tokenizer  # for those who load a model as well
from trueup.models.tuners import ADAPTERS, adapter_config, targets_of
from trueup.models.vocabulary import check_vocabulary, fit_vocabulary

log = logging.getLogger("trueup")

PolicyKind = TypeVar("PolicyKind", bound=Policy)


def pick_device(wanted: str) -> torch.device:
    """The device asked for, or the nearest that exists, said once."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if cuda else "mps" if mps else "cpu"
    if wanted == "auto":
        wanted = best
    kind, _, index = wanted.partition(":")
    missing = (kind == "cuda" and (not cuda or int(index or 0) >= torch.cuda.device_count())) or (
        kind == "mps" and not mps
    )
    if missing:
        log.warning("device %s is not present here; running on %s", wanted, best)
        wanted = best
    return torch.device(wanted)


def pick_dtype(device: torch.device, bf16: bool | None, fp16: bool | None) -> torch.dtype:
    """Compute dtype: what was asked for where the device has it, otherwise the nearest, said once.

    Unset means bf16 wherever the hardware multiplies it, else fp32.
    """
    has_bf16 = _has_bf16(device)
    if fp16 and device.type == "cuda":
        return torch.float16
    if fp16 or bf16:
        nearest = torch.bfloat16 if has_bf16 else torch.float32
        if fp16 or not has_bf16:
            asked = "fp16" if fp16 else "bf16"
            log.warning(
                "%s is not supported on this %s; computing in %s",
                asked,
                device.type,
                str(nearest)[6:],
            )
        return nearest
    if bf16 is None and fp16 is None and has_bf16:
        return torch.bfloat16
    return torch.float32


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without AMX or AVX512-BF16 a CPU emulates bf16 and is slower than in fp32.
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def read_model_config(
    location: str, model: ModelSection, name: str, key: str = "model_name_or_path"
) -> PretrainedConfig:
    """A model's config, without its weights.

    Raises:
        ModelError: it cannot be read; `name` and `key` say whose fault that is.
    """
    if memory.is_name(location):
        return memory.held(location, key).base.config
    access = hub_access(model)
    common = dict(revision=access.revision, token=access.token, cache_dir=access.cache_dir)
    try:
        refuse_code(location, name, key, model.trust_remote_code, **common)
        return AutoConfig.from_pretrained(location, trust_remote_code=model.trust_remote_code, **common)
    except (OSError, ValueError) as error:
        raise unreachable(name, access, error, key) from error


def load_base(
    location: str,
    model: ModelSection,
    device: torch.device,
    dtype: torch.dtype,
    name: str | None = None,
    kind: type[Policy] = Policy,
    quantised: bool = True,
    adapters: Sequence[str] = (),
) -> PreTrainedModel:
    """A model of a policy's kind in eval mode, safetensors only, code from the hub only when trusted.

    Args:
        adapters: what will stand on it: it reads positions as they were trained.
        quantised: whether the config's quantisation applies; without it, the weights of a checkpoint that is quantised
            already are written out.

    Raises:
        ModelError: it cannot be loaded; the message says what and how to mend it.
    """
    access = hub_access(model)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a bar in a log file is noise
    if memory.is_name(location):
        if device.type == "cpu":
            keep_memory()
        base = memory.held(location, "model_name_or_path").lend(device, dtype, kind.auto_class, location).eval()
        if stretch := fit_rope(copy.deepcopy(base.config), model, adapters, name or location):
            raise ModelError(
                f"a model in memory is built already, and would have to be built with {stretch}", where="rope_scaling",
                fix="give the model by its directory, or load it with such rope_parameters in its config",
            )  # fmt: skip
        return base
    of_hub = dict(revision=access.revision, token=access.token, cache_dir=access.cache_dir)
    common = dict(**of_hub, trust_remote_code=model.trust_remote_code)
    try:
        refuse_code(location, name or location, "model_name_or_path", model.trust_remote_code, **of_hub)
        config = AutoConfig.from_pretrained(location, **common)
        kind.prepare(config)
        stretch = fit_rope(config, model, adapters, name or location)
        asked = model if quantised else model.model_copy(update={"quantization_bit": None})
        plan = quantise.loading(asked, config, dtype, device, kind.always_trained)
        if device.type == "cpu" and asked.quantization_bit:
            hold_nothing()
        with _expecting_a_new_head(bool(kind.always_trained)):
            base = kind.auto_class.from_pretrained(
                location,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=_plain_attention(model),
                device_map={"": device},  # straight to the device: no process holds a copy in host memory first
                **({"quantization_config": plan.config} if plan.config is not None else {}),
                **common,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(name or location, access, error) from error
    base = plan.after(base)
    check_built(base, stretch, name or location)
    quantise.settle(base)
    if device.type == "cpu":
        if quantise.is_quantised(base):
            quantise.let_go_of_files(base)
            give_back()  # what quantising needed, of several threads
        keep_memory()
    if not quantised and quantise.is_quantised(base):
        base = quantise.dequantise(base, dtype)
    return base.eval()


def from_scratch(
    location: str, model: ModelSection, device: torch.device, dtype: torch.dtype, name: str, kind: type[Policy] = Policy
) -> PreTrainedModel:
    """A model of that shape with new weights, drawn from torch's generator; nothing of the files but their config.

    Raises:
        ModelError: the config cannot be read.
    """
    config = read_model_config(location, model, name)
    kind.prepare(config)
    config = copy.deepcopy(config)
    if quantise.stored_quantisation(config):
        del config.quantization_config  # of weights that are not read
    stretch = fit_rope(config, model, (), name)
    attention = _plain_attention(model)
    base = kind.auto_class.from_config(
        config, dtype=torch.float32, trust_remote_code=model.trust_remote_code,
        **({"attn_implementation": attention} if attention else {}),
    )  # fmt: skip
    check_built(base, stretch, name)
    return base.to(device=device, dtype=dtype).eval()


@contextmanager
def _expecting_a_new_head(expected: bool) -> Iterator[None]:
    """Without transformers' report that a head was not in the files, where it need not be."""
    before = transformers_logging.get_verbosity()
    if expected:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _plain_attention(model: ModelSection) -> str | None:
    """The kernel of generation and of the unshared path; None lets transformers choose what the architecture has."""
    wanted = "fa2" if model.booster == "flash_attn" and model.flash_attn == "auto" else model.flash_attn
    if wanted in ("fa2", "fa3"):
        present = is_flash_attn_2_available() if wanted == "fa2" else is_flash_attn_3_available()
        if not present:
            log.warning("flash_attn: %s is not installed for this device; using torch's kernels", wanted)
            return None
        return "flash_attention_2" if wanted == "fa2" else "flash_attention_3"
    return {"disabled": "eager", "sdpa": "sdpa"}.get(wanted)


def _load_error(name: str, access: HubAccess, error: Exception) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} needs Python code from its repository", where="model_name_or_path",
            expected="an architecture that transformers has built in",
            fix="read that code, then set trust_remote_code: true and pin model_revision",
        )  # fmt: skip
    if "safetensors" in text:
        return ModelError(
            f"{name} has no safetensors weights", where="model_name_or_path", expected="model*.safetensors",
            fix="pickled weights can run code when loaded; convert them once with transformers' `save_pretrained`",
        )  # fmt: skip
    return unreachable(name, access, error)


@dataclass
class Loaded:
    """A policy ready to train, with what the header and the recipe want to know about it."""

    policy: Policy
    adapters: Adapters | None
    base_name: str
    starts: list[str]
    device: torch.device
    dtype: torch.dtype
    layout_note: str | None
    recomputation: Recomputation | None = None  # of activations, where something trains
    boosted: str = ""  # which kernels it computes with, for the header

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.policy.trainable().values())

    @property
    def num_parameters(self) -> int:
        return quantise.count_parameters(self.policy.model)


@no_collection()
def load_policy(
    model: ModelSection,
    tuning: TuningSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | None = None,
    kind: type[Policy] = Policy,
) -> Loaded:
    """Load the base, attach or merge starting adapters, decide what trains, and prove the layout.

    Args:
        device: where; the config's choice by default (a process of several has its own).
        kind: what the model is made into.

    Raises:
        ModelError: the model, an adapter or the tokenizer does not fit (C10, C11, C17).
    """
    device = device or pick_device(model.device)
    dtype = pick_dtype(device, train.bf16, train.fp16)
    access = hub_access(model)
    name, location, starts = resolve_model(model.model_name_or_path, model.adapter_name_or_path, access)
    # Adapters are folded into fp32 weights: in bf16 a small change would vanish in the rounding of the large weight.
    merging = bool(starts) and tuning.finetuning_type not in ADAPTERS
    torch.manual_seed(train.seed)  # a new head's first weights
    if model.train_from_scratch:
        base = from_scratch(location, model, device, dtype, name, kind)
    else:
        base = load_base(location, model, device, torch.float32 if merging else dtype, name, kind, adapters=starts)
    make_room(base, starts)
    new_rows = fit_vocabulary(base, model, tokenizer)
    check_vocabulary(base, tokenizer, name)
    _check_trainable(base, tuning)
    base.requires_grad_(False)

    adapters = None
    torch.manual_seed(train.seed)  # the new adapter's first weights
    if tuning.finetuning_type in ADAPTERS:
        wanted = adapter_config(tuning, base, kind, new_rows)
        if tuning.use_llama_pro:
            keep_to_blocks(wanted, base, tuning.freeze_trainable_layers)
            if not starts:  # which may have trained them
                check_outlet(base, targets_of(base, wanted))
        start = _start(tuning, base, location, access)
        adapters = attach_trained(base, wanted, starts, name, tuning.create_new_adapter, start)
        policy = kind(base, adapters.model)
    else:
        merged = merge_adapters(base, starts)
        if merging:
            for parameter in merged.parameters():
                parameter.data = parameter.data.to(dtype)
        policy = kind(merged)
        unfreeze(policy.base, tuning, kind, new_rows)
    policy.pad_with(tokenizer.pad_token_id)
    policy.noise_alpha = train.neftune_noise_alpha
    if memory.is_name(location):
        memory.held(location, "model_name_or_path").used_as(policy.model)
    boosted = boost(policy, model.booster)
    policy.offloads = train.activation_offloading and device.type != "cpu"
    if train.activation_offloading and not policy.offloads:
        log.warning("activation_offloading: on a CPU activations are in the host's memory already; nothing is moved")
    note = policy.layout_note
    if note and note != PLAIN:
        log.warning("prompts are not shared between answers on this architecture: %s", note)
    recomputation = fit_to_memory(policy.base, tuning, train, booster=model.booster)
    return Loaded(policy, adapters, name, starts, device, dtype, note, recomputation, boosted)


def _check_trainable(base: PreTrainedModel, tuning: TuningSection) -> None:
    """Quantised weights do not move; a checkpoint may hold such weights without any key that says so (C4)."""
    if tuning.finetuning_type in ("full", "freeze") and quantise.is_quantised(base):
        raise ModelError(
            f"the model has {quantise.describe(base)}, which cannot be trained themselves", where="finetuning_type",
            expected="lora, oft or ia3 on a quantised model", fix="set finetuning_type: lora",
        )  # fmt: skip


def _start(tuning: TuningSection, base: PreTrainedModel, location: str, access: HubAccess) -> Start | None:
    """What a new adapter starts as, where that is not nothing."""
    if not (tuning.pissa_init or tuning.loftq_init):
        return None
    if memory.is_name(location):
        raise ModelError(
            "a model in memory has no files to read its weights from, and nobody to give changed ones back to",
            where="pissa_init" if tuning.pissa_init else "loftq_init", fix="give the model by its directory",
        )  # fmt: skip
    if tuning.pissa_init:
        return Start(lambda model: take_principal(model, TRAINED, tuning.pissa_iter), changes_base=True)
    if quantise.stored_quantisation(base.config) and not quantise.made_here(base):
        raise ModelError(
            "the checkpoint holds quantised weights only: what quantising lost is not known", where="loftq_init",
            fix="name the model that it was quantised from, with quantization_bit",
        )  # fmt: skip
    originals = originals_of(location, access)
    return Start(lambda model: take_lost(model, TRAINED, originals), changes_base=False)


def unfreeze(
    base: PreTrainedModel, tuning: TuningSection, kind: type[Policy] = Policy, new_rows: Sequence[int] = ()
) -> None:
    """Mark what full or freeze training moves.

    `freeze` trains the last n layers (the first n for a negative n), only the named modules of them, plus
    `freeze_extra_modules` anywhere, plus embeddings and head where they have new rows.

    Raises:
        ModelError: more layers than the model has, or a module name that matches nothing.
    """
    if tuning.finetuning_type == "full":
        base.requires_grad_(True)
        return
    for name in kind.always_trained:
        base.get_submodule(name).requires_grad_(True)
    layers = decoder_layers(base)
    count = tuning.freeze_trainable_layers
    extra = set(tuning.freeze_extra_modules or ())
    if abs(count) > len(layers) or (count == 0 and not extra):
        raise ModelError(
            f"the model has {len(layers)} layers", where="freeze_trainable_layers",
            expected=f"1 … {len(layers)} (last n) or -1 … -{len(layers)} (first n)",
        )  # fmt: skip
    chosen = list(layers)[-count:] if count > 0 else list(layers)[:-count]
    if tuning.use_llama_pro:
        chosen = [layers[place] for place in trained_blocks(base, count)]
    wanted = set(tuning.freeze_trainable_modules) - {"all"}
    used: set[str] = set()
    for layer in chosen:
        for path, parameter in layer.named_parameters():
            matches = wanted & set(path.split("."))
            if matches or not wanted:
                used |= matches
                parameter.requires_grad_(True)
    if new_rows:
        paths = matrices(base)
        log.info("finetuning_type: freeze trains %s too, whole, for the rows of new tokens", " and ".join(paths))
        for module in paths.values():
            module.requires_grad_(True)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for path, parameter in base.named_parameters(remove_duplicate=False):  # a tied head is known by both its names
        matches = extra & set(path.split("."))
        if matches and id(parameter) not in inside:
            used |= matches
            parameter.requires_grad_(True)
    keys = (("freeze_trainable_modules", wanted), ("freeze_extra_modules", extra))
    if unmatched := [(key, names - used) for key, names in keys if names - used]:
        raise ModelError(
            [Problem(f"no module named {', '.join(sorted(names))} in the model", key) for key, names in unmatched]
        )


@no_collection()
def load_frozen(
    model: ModelSection,
    name: str,
    adapters: list[str],
    device: torch.device,
    dtype: torch.dtype,
    kind: type[PolicyKind] = Policy,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PolicyKind:
    """A model that is only run, for chat and evaluation.

    Args:
        tokenizer: whose new tokens it has to have rows for, as the config says.
    """
    root, location, starts = resolve_model(name, adapters, hub_access(model))
    base = load_base(location, model, device, dtype, root, kind, adapters=starts)
    if stretch := stretch_of(base):
        log.info("positions of %s are stretched: %s", root, stretch)
    if tokenizer is not None:
        make_room(base, starts)
        fit_vocabulary(base, model, tokenizer)
    policy = kind(base, attach_frozen(base, starts))
    if memory.is_name(location):
        memory.held(location, "model_name_or_path").used_as(policy.model)
    policy.model.requires_grad_(False).eval()
    boost(policy, model.booster)
    return policy


def load_reference(
    model: ModelSection, name: str, adapters: list[str], device: torch.device, dtype: torch.dtype
) -> Policy:
    """A model of its own as reference (`ref_model`): it reads the tokens of the model that is compared with it."""
    return load_frozen(model, name, adapters, device, dtype, tokenizer=load_tokenizer(model))


def load_for_evaluation(
    model: ModelSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    kind: type[Policy] = Policy,
) -> Loaded:
    """The config's model and adapters, frozen, with what a recipe wants to know about them."""
    dtype = pick_dtype(device, train.bf16, train.fp16)
    name, location, starts = resolve_model(model.model_name_or_path, model.adapter_name_or_path, hub_access(model))
    policy = load_frozen(model, location, starts, device, dtype, kind, tokenizer)
    check_vocabulary(policy.base, tokenizer, name)
    policy.pad_with(tokenizer.pad_token_id)
    return Loaded(policy, None, name, starts, device, dtype, policy.layout_note)


def load_for_inference(model: ModelSection, train: TrainSection) -> Policy:
    """The config's model and adapters, frozen, on its device."""
    device = pick_device(model.device)
    dtype = pick_dtype(device, train.bf16, train.fp16)
    tokenizer = load_tokenizer(model) if model.resize_vocab else None  # whose new tokens need rows
    return load_frozen(model, model.model_name_or_path, model.adapter_name_or_path, device, dtype, tokenizer=tokenizer)
