"""Stages and objectives: what each trains on, what is supported, and which keys act with which.

Four tables, read by the checker, the help, the docs and the forms:

* `STAGES` (and `PREF_LOSSES` in `losses.py`): a row without `instead` is supported; otherwise it is
  known and refused for now, and `instead` names what to use. Supporting one is deleting its `instead`.
* `LATER`, `LATER_VALUES`: keys and values known and not supported yet, with the alternative.
* `ACTS_WITH`: a key acts only while the conditions in its row hold; set in vain, it is an error.
* `OTHER_VERBS`: keys that no training reads, with the verb that does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from trueup.config.losses import (
    LOSSES_OF_KEY,
    ON_SUMS,
    PAIR_STAGES,
    PREF_LOSSES,
    STAGE_LOSSES,
    WITH_REFERENCE,
    pref_losses,
    stages_of,
)
from trueup.config.optimizers import OPTIMIZERS, REFUSED_OPTIMIZERS, reading
from trueup.config.schema import SECTION_OF, RunConfig, default
from trueup.config.sections.train import Scheduler
from trueup.config.values import words

DPO_NOW = "stage: dpo, pref_loss: sigmoid"


@dataclass(frozen=True)
class Stage:
    """One thing a run can do. `kind` is the kind of example it trains on."""

    kind: str  # text | chat | pair | ranking | feedback | prompt
    help: str
    reference: bool = False
    instead: str | None = None


STAGES: dict[str, Stage] = {
    "pt": Stage("text", "continue pre-training on plain text"),
    "sft": Stage("chat", "learn to give the answers of the data"),
    "dpo": Stage("pair", "prefer the chosen over the rejected answer", reference=True),
    "rm": Stage("ranking", "train a reward model on pairs, rankings or scores"),
    "ppo": Stage("prompt", "learn from a reward (PPO)", reference=True),
    "kto": Stage("feedback", "learn from good and bad answers (KTO, BCO)", reference=True),
    "orpo": Stage("pair", "SFT and preference in one loss (ORPO)"),
    "simpo": Stage("pair", "preference without a reference (SimPO)"),
    "cpo": Stage("pair", "contrastive preference (CPO)"),
    "grpo": Stage("prompt", "learn from rewards of answer groups (GRPO)", reference=True),
    "rloo": Stage("prompt", "learn from rewards, leave-one-out (RLOO)", reference=True),
    "online_dpo": Stage("prompt", "DPO on answers that a judge compares", reference=True),
}

_WHOLE = "drop it: gradients are clipped and checked as a whole before a step"
_COMPILED = (
    "drop it: on a CPU a compiled layer is as fast as our fused ones at best, within the noise (both take 0.82 of the "
    "plain one's time in bf16), compiling takes 5 to 44 s, and every new shape of a batch compiles a whole layer again "
    "(docs/log.md)"
)
_DDP = "one process per device with torchrun"

LATER: dict[str, str] = {
    # model
    "allow_pickle_weights": "convert once with transformers' save_pretrained, which writes safetensors",
    "use_unsloth": "drop it: the default kernels",
    "shift_attn": "a smaller cutoff_len",
    "moe_aux_loss_coef": "drop it: the router keeps its weights under LoRA",
    "upcast_layernorm": "drop it: norms are computed in fp32 by most models",
    "upcast_lmhead_output": "drop it: log-probs are always fp32",
    "infer_dtype": "bf16: true, or fp16: true on a GPU",
    # data
    "eval_num_beams": "temperature: 0, which takes the likeliest token",
    # tuning
    "pure_bf16": "bf16: true, which keeps fp32 masters of the trained weights",
    "galore_layerwise": _WHOLE,
    "apollo_layerwise": _WHOLE,
    # objective
    "use_asft_loss": "use_dft_loss: true, or the plain SFT loss",
    # train
    "label_smoothing_factor": "dpo_label_smoothing for pairs; none for SFT",
    "fp8": "bf16: true",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    "num_beams": "num_beams: 1 with sampling",
    "push_to_hub": "upload output_dir with the hub's own tool",
    "deepspeed": _DDP,
    "fsdp": _DDP,
    "fsdp_config": _DDP,
    "ray_init_kwargs": _DDP,
}

#: value of `optim` → what to use instead (None: supported).
OPTIMISERS: dict[str, str | None] = {**dict.fromkeys(OPTIMIZERS), **REFUSED_OPTIMIZERS}
#: key → its values, each with what to use instead (None: supported).
LATER_VALUES: dict[str, dict[str, str | None]] = {
    "stage": {name: stage.instead for name, stage in STAGES.items()},
    "pref_loss": {name: loss.instead for name, loss in PREF_LOSSES.items()},
    "optim": OPTIMISERS,
    "lr_scheduler_type": {"reduce_lr_on_plateau": "cosine", "greedy": "cosine"},
    "infer_backend": {
        "vllm": "huggingface; trueup serve --engine vllm is vLLM's own server, and chat --with URL talks to it",
        **dict.fromkeys(("sglang", "ktransformers"), "huggingface"),
    },
    "train_sampling_strategy": {
        "sequential": "disable_shuffling: true",
        "group_by_length": "train_sampling_strategy: random",
        "batch_rebalance": "train_sampling_strategy: random",
    },
}

#: keys accepted before they act, because they describe a machine or ask for what holds anyway; with what
#: happens instead, where that is not plain. Changed from its default, a key is said to be idle once.
NOT_ACTING_YET: dict[str, str] = {
    **dict.fromkeys(
        words(
            """
            torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory
            dataloader_persistent_workers dataloader_prefetch_factor gradient_checkpointing_kwargs
            """
        ),
        "",
    ),
    "low_cpu_mem_usage": "weights are always read one at a time",
    "use_reentrant_gc": "activations are recomputed without re-entering autograd; the gradients are the same",
    "data_shared_file_system": "every process reads the same tokenised cache, wherever it lies",
    "offload_folder": "the model stays in memory; `trueup check` says beforehand whether it fits",
    "quantization_device_map": "each process has the whole model on its device",
    "use_kv_cache": "keys and values are always kept while answering",
    "tf32": "products of fp32 numbers stay exact; bf16 is the fast format",
    "ddp_backend": "the device decides: nccl between GPUs, gloo between CPUs",
    "ignore_pad_token_for_loss": "nothing is padded",
    "log_level": "notes and warnings are always shown",
}

_VERBS = {"generate": "chat", "export": "export", "evaluate": "eval", "build": "data build"}

SCHEDULES: tuple[str, ...] = get_args(Scheduler)

SET = object()
"""A condition that holds when the other key has a value at all."""

_PREFERENCE = tuple(STAGE_LOSSES)
_REFERENCE = tuple(name for name, stage in STAGES.items() if stage.reference)
ONLINE = ("ppo", "grpo", "rloo", "online_dpo")
_OFFLINE_REFERENCE = tuple(name for name in _REFERENCE if name not in ONLINE)
_REWARDED = ("ppo", "grpo", "rloo")  # online_dpo asks a judge
_LORA = {"finetuning_type": ("lora",)}

_ROWS: list[tuple[str, dict[str, Any]]] = [
    *((key, {"stage": stages_of(losses), "pref_loss": losses}) for key, losses in LOSSES_OF_KEY.items()),
    ("pref_loss loss_weights pref_ftx", {"stage": _PREFERENCE}),
    ("custom_objective", {"stage": tuple(name for name in STAGES if name not in ONLINE)}),
    ("pref_beta", {"stage": (*_PREFERENCE, "online_dpo"), "pref_loss": LOSSES_OF_KEY["pref_beta"]}),
    (
        "f_alpha_divergence_coef",
        {
            "stage": ("dpo",),
            "f_divergence_type": ("alpha_divergence",),
            "pref_loss": LOSSES_OF_KEY["f_divergence_type"],
        },
    ),
    ("use_weighting knowledge_weight", {"stage": PAIR_STAGES}),
    ("ld_alpha", {"stage": PAIR_STAGES, "pref_loss": ON_SUMS}),
    ("ld_reference", {"ld_alpha": SET, "pref_loss": WITH_REFERENCE}),
    ("pref_bco_weight sync_ref_model", {"stage": ("dpo",), "pref_loss": WITH_REFERENCE}),
    ("ref_model_mixup_alpha ref_model_sync_steps", {"sync_ref_model": (True,)}),
    ("ref_model", {"stage": _REFERENCE, "pref_loss": WITH_REFERENCE}),
    ("precompute_ref_log_probs", {"stage": _OFFLINE_REFERENCE, "pref_loss": WITH_REFERENCE}),
    ("ref_model_adapters ref_model_quantization_bit", {"ref_model": SET}),
    (
        "reward_funcs reward_weights reward_model num_generations generation_batch_size missing_eos_penalty "
        "mask_truncated_completions ppo_buffer_size ppo_epochs",
        {"stage": ONLINE},
    ),
    ("reward_timeout", {"stage": ONLINE}),  # and with functions of the user's: a rule
    ("reward_loss", {"stage": ("rm",)}),
    (
        "center_rewards_coefficient score_margin",
        {"stage": ("rm",), "reward_loss": ("bradley_terry", "plackett_luce")},
    ),
    ("reward_model_adapters reward_model_quantization_bit reward_model_type", {"reward_model": SET}),
    ("judge", {"stage": ("online_dpo",)}),
    ("ppo_kl_coeff", {"stage": _REWARDED}),
    ("ppo_clip_ratio", {"stage": _REWARDED, "grpo_loss": ("dapo", "grpo", "bnpo", "dr_grpo", "gspo")}),
    ("ppo_clip_ratio_high", {"stage": _REWARDED}),
    (
        "ppo_target ppo_gamma ppo_lambda ppo_value_coeff ppo_value_clip ppo_score_norm ppo_whiten_rewards",
        {"stage": ("ppo",)},
    ),
    ("grpo_loss scale_rewards", {"stage": ("grpo",)}),
    ("normalize_advantages", {"stage": ("rloo",)}),
    ("train_on_prompt mask_history predict_with_generate", {"stage": ("sft",)}),
    ("compute_accuracy", {"stage": ("sft",), "do_eval": (True,)}),
    ("use_dft_loss use_asft_loss use_eaft_loss", {"stage": ("sft",)}),
    ("asft_alpha", {"use_asft_loss": (True,)}),
    ("eaft_alpha", {"use_eaft_loss": (True,)}),
    (
        "lora_rank lora_alpha lora_dropout lora_target use_rslora use_dora loraplus_lr_ratio pissa_init "
        "rank_pattern alpha_pattern",
        _LORA,
    ),
    ("train_from_scratch", {"stage": ("pt", "sft"), "finetuning_type": ("full",)}),
    ("loraplus_lr_embedding", {"loraplus_lr_ratio": SET}),
    ("pissa_iter pissa_convert", {"pissa_init": (True,)}),
    ("loftq_init", {**_LORA, "quantization_bit": SET}),
    ("additional_target create_new_adapter", {"finetuning_type": ("lora", "oft", "ia3")}),
    ("ia3_target", {"finetuning_type": ("ia3",)}),
    (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
        {"finetuning_type": ("freeze",)},
    ),
    ("use_llama_pro", {"finetuning_type": ("freeze", "lora")}),
    ("module_dropout oft_rank oft_block_size oft_target", {"finetuning_type": ("oft",)}),
    (
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
        {"use_galore": (True,)},
    ),
    (
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front",
        {"use_apollo": (True,)},
    ),
    (
        "interleave_probs",
        {"mix_strategy": ("interleave_under", "interleave_over", "interleave_once")},
    ),
    (
        "quantization_device_map quantization_method",
        {"quantization_bit": SET},
    ),
    ("quantization_type", {"quantization_bit": (4, 8), "quantization_method": ("bnb", "torchao")}),
    ("double_quantization", {"quantization_bit": (4,), "quantization_method": ("bnb",)}),
    ("new_special_tokens_config init_special_tokens", {"resize_vocab": (True,)}),
    (
        "lr_scheduler_kwargs",
        {"lr_scheduler_type": tuple(name for name in SCHEDULES if not name.startswith("constant"))},
    ),
    ("neftune_noise_alpha", {"stage": tuple(name for name in STAGES if name not in ONLINE)}),
    ("rope_scaling_length", {"rope_scaling": SET}),
    ("adapter_folder", {"adapter_name_or_path": SET}),
    ("length_penalty", {"num_beams": tuple(range(2, 100))}),
    ("ray_num_workers", {"ray_init_kwargs": SET}),
]

#: The same for keys that steer the run, not the method: set in vain, they are only said to be so.
_QUIET_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("logging_steps", {"logging_strategy": ("steps",)}),
    ("log_entropy", {"stage": tuple(name for name in STAGES if name not in (*ONLINE, "rm"))}),
    ("eval_steps", {"eval_strategy": ("steps",)}),
    ("regression_report", {"stage": (*_PREFERENCE, *ONLINE)}),
    ("eval_delay eval_on_start", {"eval_strategy": ("steps", "epoch")}),
    ("save_steps", {"save_strategy": ("steps",)}),
    ("warmup_steps warmup_ratio", {"lr_scheduler_type": tuple(name for name in SCHEDULES if name != "constant")}),
    ("buffer_size", {"streaming": (True,)}),
    ("gradient_checkpointing_kwargs", {"gradient_checkpointing": ("auto", "full", "selective")}),
    (
        "optim_target_modules",
        {"optim": tuple(name for name, row in OPTIMIZERS.items() if row.projects)},
    ),
    ("optim_args", {"optim": tuple(name for name, row in OPTIMIZERS.items() if row.arguments)}),
    ("adam_beta1 adam_beta2", {"optim": reading("adam_beta1")}),
    ("adam_epsilon", {"optim": reading("adam_epsilon")}),
    (
        "default_system tool_format enable_thinking preserve_thinking mask_thinking template",
        {"stage": tuple(name for name in STAGES if name != "pt")},
    ),
    (
        "hub_model_id hub_private_repo hub_revision hub_strategy hub_always_push",
        {"push_to_hub": (True,)},
    ),
    (
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config",
        {"infer_backend": ("vllm",)},
    ),
    (
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen",
        {"export_quantization_bit": SET},
    ),
]

#: keys of verbs that do not train → the verb.
OTHER_VERBS: dict[str, str] = {
    **{key: verb for key, section in SECTION_OF.items() if (verb := _VERBS.get(section))},
    **dict.fromkeys(words("infer_backend infer_dtype offload_folder use_kv_cache"), "chat"),
    "token_logprobs": "generate",
    **dict.fromkeys(words("vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config"), "chat"),
}
#: keys of `chat` that a stage reads which answers prompts itself.
SAMPLED = frozenset(words("temperature top_p top_k max_new_tokens"))
#: the same for a run that predicts.
PREDICTED = SAMPLED.union(words("do_sample repetition_penalty skip_special_tokens"))
#: keys of the steps of a training, which a run that only evaluates has none of.
STEPS = frozenset(
    words(
        """
        num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
        dataloader_drop_last learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
        optim optim_args lr_multipliers layer_lr_decay weight_decay adam_beta1 adam_beta2 adam_epsilon
        max_grad_norm gradient_checkpointing neftune_noise_alpha print_param_status
        eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end metric_for_best_model
        early_stopping_steps save_strategy save_steps save_total_limit save_only_model
        """
    )
)
#: a key of another verb → the one that training has for it.
IN_TRAINING = {"batch_size": "per_device_train_batch_size", "save_dir": "output_dir"}

#: key → stages whose users know it from elsewhere: there it is said to be idle, and no error.
IDLE_WITH: dict[str, tuple[str, ...]] = {"pref_beta": ("ppo",)}
#: keys that other tools' configs hold whether or not they are meant; at their defaults they ask for nothing.
_ALWAYS_WRITTEN = frozenset(
    words(
        """
        f_divergence_type f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha ref_model_sync_steps
        length_penalty ray_num_workers init_special_tokens
        """
    )
)
ACTS_WITH: dict[str, dict[str, Any]] = {key: needs for row, needs in _ROWS for key in words(row)}
QUIET: frozenset[str] = frozenset(key for row, _ in _QUIET_ROWS for key in words(row))
ACTS_WITH |= {key: needs for row, needs in _QUIET_ROWS for key in words(row)}


def stage_kind(cfg: RunConfig) -> str:
    """The kind of example the stage trains on: text, chat, pair, ranking, answers, feedback or prompt."""
    if cfg.objective.stage == "rm" and cfg.reward.reward_loss in ("pointwise", "binary"):
        return "answers"  # each is learnt by itself
    return STAGES[cfg.objective.stage].kind


def other_verb(key: str, cfg: RunConfig) -> str | None:
    """The verb a key belongs to if a run by `cfg` does not read it."""
    predicts = cfg.train.do_predict or cfg.train.predict_with_generate
    reads = (cfg.objective.stage in ONLINE and key in SAMPLED) or (predicts and key in PREDICTED)
    return None if reads else OTHER_VERBS.get(key)


def needs_reference(cfg: RunConfig) -> bool:
    """Whether the objective compares with a reference model."""
    if losses := pref_losses(cfg):
        return any(PREF_LOSSES[name].reference for name in losses) or bool(cfg.objective.pref_bco_weight)
    return STAGES[cfg.objective.stage].reference


def holds(value: Any, allowed: Any) -> bool:
    """Whether a value is one that a condition allows."""
    if allowed is SET:
        return value not in (None, [], {}, "")
    if isinstance(value, list):
        return any(item in allowed for item in value)
    return value in allowed


def missing_condition(key: str, cfg: RunConfig) -> tuple[str, Any] | None:
    """Why `key` does nothing under `cfg`: a key it depends on and the values that would need.

    None if it acts.
    """
    if key == "freeze_trainable_layers" and cfg.tuning.use_llama_pro:
        return None  # it counts the blocks, with adapters too
    for other, allowed in ACTS_WITH.get(key, {}).items():
        if other == "pref_loss" and cfg.objective.stage not in STAGE_LOSSES:
            continue  # no loss to choose
        if not holds(cfg[other], allowed):
            return other, allowed
    return None


def is_off(key: str, value: Any) -> bool:
    """Whether a value asks for nothing: off, and off is what happens anyway; or what its tool always writes down."""
    return value == default(key) and (key in _ALWAYS_WRITTEN or (not value and value not in ("",)))
