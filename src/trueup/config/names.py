"""Names that are not ours: synonyms of other tools' keys, and keys we know and do not take.

A synonym resolves to one canonical key, and the user is told so in one line. A refused key is an
error with its reason, unless it is set to what happens anyway. An idle key is accepted, and said to
be idle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trueup.config.values import OFF_WORDS, words

#: our name: the names other tools give it.
_SAME: dict[str, str] = {
    "model_name_or_path": "model model_name base_model model_id",
    "adapter_name_or_path": "adapter_path checkpoint_dir",
    "model_revision": "revision",
    "hf_hub_token": "hub_token push_to_hub_token hf_token token",
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "use_bnb_nested_quant",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "use_reentrant_gc": "gradient_checkpointing_use_reentrant",
    "flash_attn": "attn_implementation",
    "dataset": "dataset_name datasets train_dataset",
    "dataset_dir": "data_dir",
    "cutoff_len": "max_seq_length max_length max_seq_len sequence_len model_max_length",
    "template": "chat_template chat_template_path",
    "default_system": "system system_prompt",
    "truncation": "truncation_mode",
    "val_size": "val_set_size test_split_size",
    "streaming": "dataset_streaming",
    "packing": "sample_packing",
    "preprocessing_num_workers": "dataset_num_proc",
    "lora_rank": "lora_r r",
    "lora_target": "target_modules lora_target_modules",
    "additional_target": "modules_to_save lora_modules_to_save",
    "pref_loss": "loss_type",
    "pref_beta": "dpo_beta beta",
    "pref_ftx": "rpo_alpha cpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "knowledge_weight": "kto_alpha",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "ref_model": "ref_model_name_or_path",
    "precompute_ref_log_probs": "precompute_ref_logps",
    "reward_model": "rm_path reward_model_path reward_model_name_or_path",
    "ppo_kl_coeff": "kl_coeff kl_coef ppo_kl_coef init_kl_coef",
    "reward_funcs": "reward_function reward_functions",
    "num_generations": "rloo_k num_samples_per_prompt n_samples_per_prompt",
    "ppo_clip_ratio": "cliprange clip_ratio epsilon",
    "ppo_clip_ratio_high": "epsilon_high clip_ratio_high",
    "ppo_epochs": "num_ppo_epochs num_iterations",
    "ppo_whiten_rewards": "whiten_rewards",
    "ppo_gamma": "gamma",
    "ppo_lambda": "lam",
    "ppo_value_coeff": "vf_coef",
    "ppo_value_clip": "cliprange_value",
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs",
    "per_device_train_batch_size": "per_gpu_train_batch_size train_batch_size micro_batch_size",
    "per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "allow_changed": "allow",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "eval_strategy": "evaluation_strategy",
    "early_stopping_steps": "early_stopping_patience",
    "ddp_backend": "xpu_backend",
    "hub_model_id": "push_to_hub_model_id",
    "hub_private_repo": "hub_private",
    "project": "swanlab_project",
    "run_name": "swanlab_run_name",
    "max_new_tokens": "max_completion_length generation_max_length response_length",
    "num_beams": "generation_num_beams",
    "torch_compile_backend": "torchdynamo",
    "register_as": "register",
}
SYNONYMS: dict[str, str] = {other: key for key, others in _SAME.items() for other in others.split()}

#: our name, and what its value becomes when the switch is on (nothing when it is off, but for `OFF`).
SWITCHES: dict[str, tuple[str, Any]] = {
    "load_in_4bit": ("quantization_bit", 4),
    "load_in_8bit": ("quantization_bit", 8),
    "use_cpu": ("device", "cpu"),
    "no_cuda": ("device", "cpu"),
    "use_mps_device": ("device", "mps"),
    "use_flash_attention_2": ("flash_attn", "fa2"),
    **dict.fromkeys(words("enable_liger_kernel use_liger_kernel use_liger use_liger_loss"), ("booster", "liger")),
    "disable_gradient_checkpointing": ("gradient_checkpointing", False),
    "use_unsloth_gc": ("activation_offloading", True),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "auto_find_batch_size": ("batch_tokens", "auto"),
    "adafactor": ("optim", "adafactor"),
    "use_swanlab": ("report_to", ["swanlab"]),
    "use_modelscope_hub": ("hub", "modelscope"),
    "use_openmind_hub": ("hub", "modelers"),
    "resume": ("resume_from_checkpoint", "auto"),
    "overwrite": ("overwrite_output_dir", True),
    "use_peft": ("finetuning_type", "lora"),
    "use_lora": ("finetuning_type", "lora"),
}

#: switch → what the value becomes when it is off.
OFF: dict[str, Any] = {"use_peft": "full", "use_lora": "full"}

#: canonical key and a value that says what another key has a value for → that key, its value, and what holds then.
ELSEWHERE: dict[tuple[str, str], tuple[str, Any, str]] = {
    ("pref_loss", "dft"): ("use_dft_loss", True, "the SFT loss, each token weighed by its probability"),
    ("per_device_train_batch_size", "auto"): (
        "batch_tokens", "auto",
        "memory decides how a step's rows are cut, never how many they are "
        "(per_device_train_batch_size, 8 where no number says otherwise, × gradient_accumulation_steps × processes)",
    ),
}  # fmt: skip

#: canonical key → other names of its values, as their tools or their readers write them.
VALUE_SYNONYMS: dict[str, dict[str, str]] = {
    "stage": {
        "pretrain": "pt",
        "pretraining": "pt",
        "rlhf": "ppo",
        "reward": "rm",
        "reward_model": "rm",
    },
    "pref_loss": {"dpo": "sigmoid", "slic": "hinge", "cdpo": "sigmoid", "rso": "hinge", "aot_pair": "aot"},
    "lora_target": {"all-linear": "all", "all_linear": "all", "value": "v_proj"},
    "oft_target": {"all-linear": "all", "all_linear": "all"},
    "scale_rewards": {"true": "group", "false": "no", "none": "no"},
    "hub": {"hf": "huggingface", "ms": "modelscope", "openmind": "modelers", "om": "modelers"},
    "optim": {
        "adamw_hf": "adamw_torch",
        "adamw": "adamw_torch",
        "adamw_apex_fused": "adamw_torch_fused",
    },
    "flash_attn": {
        "flash_attention_2": "fa2",
        "flash_attention_3": "fa3",
        "eager": "disabled",
        "flashattn2": "fa2",
        "off": "disabled",
        "false": "disabled",
        "none": "disabled",
        "true": "auto",
    },
    "booster": {
        "flashattn2": "flash_attn",
        "liger_kernel": "liger",
        "off": "none",
        "false": "none",
    },
    "infer_backend": {"hf": "huggingface"},
    "quantization_method": {"bitsandbytes": "bnb"},
    "truncation": {"start": "keep_start", "end": "keep_end"},
    "infer_dtype": {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"},
}

_MULTIMODAL = "trueup trains on text only"
_DERIVED = "the program works this out itself"
_MEGATRON = "Megatron is no backend of trueup"
_TPU = "trueup does not run on TPUs"
_KT = "KTransformers is no backend of trueup"
_SGLANG = "SGLang is no engine of trueup; the built-in engine or vLLM is"
_HYPER = "HyperParallel is no backend of trueup"
_BADAM = "BAdam is not kept up; LoRA, or finetuning_type: freeze, trains in as little memory"
_SWANLAB = "SwanLab reads it from its own environment variables (SWANLAB_API_KEY, SWANLAB_WORKSPACE …)"
_TRACKIO = "Trackio reads it from its own environment variables (TRACKIO_SPACE_ID …)"
_PROFILER = "profile: true tells where the time goes; torch's own profiler can wrap `python -m trueup`"


@dataclass(frozen=True)
class Refused:
    """A key we know and do not take; at the value `neutral` it asks for what happens anyway."""

    reason: str
    neutral: Any = None


def _refuse(reason: str, names: str, **neutral: Any) -> dict[str, Refused]:
    return {name: Refused(reason, neutral.get(name)) for name in names.split() + list(neutral)}


#: what TRL's SFTConfig, DPOConfig, ModelConfig and ScriptArguments have beside transformers' names.
_TRL: dict[str, Refused] = {
    **_refuse("bf16 and fp16 say how a run computes", "", dtype="auto", torch_dtype="auto"),
    **_refuse(
        "set the key itself: device, flash_attn, model_revision …",
        "model_init_kwargs ref_model_init_kwargs base_model_revision model_code_revision",
    ),
    **_refuse(
        "adapter_name_or_path and ref_model_adapters name adapters",
        "model_adapter_name ref_adapter_name",
    ),
    **_refuse("lora_target names modules", "lora_target_parameters", lora_task_type="CAUSAL_LM"),
    **_refuse("4-bit weights are kept as bytes", "bnb_4bit_quant_storage"),
    **_refuse(
        "answers are trained and prompts are not; train_on_prompt: true trains both",
        "",
        completion_only_loss=True,
        assistant_only_loss=True,
    ),
    **_refuse("columns in dataset_info.json say which is which", "dataset_kwargs", dataset_text_field="text"),
    **_refuse("dataset_info.json names subset and split", "dataset_config", dataset_train_split="train"),
    **_refuse("eval_dataset or val_size says what to evaluate on", "", dataset_test_split="test"),
    **_refuse("the chat template says where an answer ends", "eos_token"),
    **_refuse("a row's own `tools` are shown to the model", "tools"),
    **_refuse("packs never cut an example", "", packing_strategy="bfd"),
    **_refuse("lora_dropout is 0 unless set; other dropout is the model's own", "disable_dropout"),
    **_refuse("trueup chat --compare shows answers", "generate_during_eval"),
    **_refuse("pref_loss: simpo, orpo and cpo need no reference; others compare with one", "reference_free"),
    **_refuse("trueup trains decoder-only models", "is_encoder_decoder"),
}

REFUSED: dict[str, Refused] = {
    **_refuse(
        _MULTIMODAL,
        "media_dir image_do_pan_and_scan crop_to_patches use_audio_in_video freeze_language_model",
        image_max_pixels=768 * 768,
        image_min_pixels=32 * 32,
        video_max_pixels=256 * 256,
        video_min_pixels=16 * 16,
        video_fps=2.0,
        video_maxlen=128,
        audio_sampling_rate=16000,
        freeze_vision_tower=True,
        freeze_multi_modal_projector=True,
    ),
    **_refuse(_DERIVED, "compute_dtype device_map block_diag_attn"),
    **_refuse(
        _MEGATRON,
        """
        use_mca use_megatron_bridge megatron_bridge_args virtual_pipeline_model_parallel_size
        sequence_parallel recompute_granularity recompute_method recompute_num_layers
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        bias_activation_fusion apply_rope_fusion masked_softmax_fusion cross_entropy_loss_fusion
        moe_grouped_gemm moe_token_dispatcher_type calculate_per_token_loss use_packed_sequences
        megatron_pretrained_checkpoint export_hf_on_finish extra_config
        """,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
        overlap_grad_reduce=True,
        mixed_precision="bf16_mixed",
    ),
    **_refuse(
        _KT,
        """
        use_kt kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path
        kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
        """,
    ),
    **_refuse(
        _SGLANG,
        "sglang_config",
        sglang_maxlen=4096,
        sglang_mem_fraction=0.7,
        sglang_tp_size=-1,
        sglang_lora_backend="triton",
    ),
    **_refuse(_HYPER, "use_hyper_parallel hyper_parallel_args", hyper_parallel_cp_size=1),
    **_refuse(
        _BADAM,
        "use_badam badam_start_block badam_verbose",
        badam_mode="layer",
        badam_switch_mode="ascending",
        badam_switch_interval=50,
        badam_update_ratio=0.05,
        badam_mask_mode="adjacent",
    ),
    **_refuse(
        _SWANLAB,
        "swanlab_workspace swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
        swanlab_mode="cloud",
    ),
    **_refuse(
        _PROFILER,
        "enable_torch_profiler profiler_output_dir profile_modules",
        profiler_wait_steps=1,
        profiler_warmup_steps=1,
        profiler_active_steps=1,
        profiler_repeat=1,
        profiler_record_shapes=True,
        profiler_profile_memory=True,
        profiler_with_stack=True,
    ),
    **_refuse(
        "bf16 is the shortest format trueup trains in",
        "fp8_enable_fsdp_float8_all_gather",
        fp8_backend="auto",
    ),
    **_refuse("it rewrites the architecture; export such a model first", "mixture_of_depths"),
    **_refuse("trueup's own kernels are always on", "use_v1_kernels"),
    **_refuse("weights are saved as safetensors, never pickled", "export_legacy_format", save_safetensors=True),
    **_refuse("set cutoff_len and truncation: prompt and answer share one length", "max_prompt_length"),
    **_refuse("set cutoff_len", "max_target_length"),
    **_refuse("torchrun and its environment variables say it", "master_addr master_port"),
    **_refuse(_TPU, "tpu_num_cores tpu_metrics_debug"),
    **_refuse("no longer part of transformers; set device", "use_ipex jit_mode_eval", past_index=-1),
    **_refuse(
        "device, bf16 and torchrun say how a run computes",
        "mp_parameters accelerator_config parallelism_config",
    ),
    **_refuse("hub_model_id names the organisation too", "push_to_hub_organization"),
    **_refuse(
        "Trackio reads it from its own environment variables (TRACKIO_SPACE_ID …)",
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **_refuse("fsdp_config holds it", "fsdp_transformer_layer_cls_to_wrap", fsdp_min_num_params=0),
    **_refuse("set do_sample, temperature … directly", "generation_config"),
    **_refuse("resuming is always exact", "ignore_data_skip"),
    **_refuse("log-probs and losses report non-finite values at once", "debug"),
    **_refuse("set booster", "liger_kernel_config"),
    **_refuse("fsdp and deepspeed shard a model, and are to come", "sharded_ddp tp_size"),
    **_TRL,
    **_refuse("YAML merge keys are not read; write the keys out", "<<"),
}

#: accepted and without effect, because what they ask for always holds or has no counterpart here; with the
#: reason, where a reader would wonder.
IDLE: dict[str, str] = {
    **dict.fromkeys(
        words(
            """
            base_model_attribute_name batch_eval_metrics dataloader_in_order
            dataloader_multiprocessing_context ddp_broadcast_buffers ddp_bucket_cap_mb
            ddp_find_unused_parameters ddp_static_graph dispatch_batches eval_accumulation_steps
            eval_do_concat_batches eval_use_gather_object fp16_backend
            fp16_opt_level half_precision_backend ignore_bias_buffers
            include_for_metrics include_inputs_for_metrics
            include_num_input_tokens_seen label_names length_column_name
            local_rank log_level_replica log_on_each_node precompute_ref_batch_size
            prediction_loss_only ray_scope remove_unused_columns
            restore_callback_states_from_checkpoint save_on_each_node skip_memory_metrics
            sortish_sampler use_cache use_legacy_prediction_loop use_logits_to_keep
            """
        ),
        "",
    ),
    **dict.fromkeys(
        words("include_tokens_per_second include_effective_tokens_per_second"), "tokens/s is always logged"
    ),
    "logging_dir": "TensorBoard's files are in output_dir/runs",
    "average_tokens_across_devices": "a loss is always averaged over all processes",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "enable_jit_checkpoint": "SIGTERM always saves",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "split_batches": "per_device_train_batch_size counts the rows of one process",
    "shuffle_dataset": "the order follows from seed; disable_shuffling: true keeps that of the files",
    "force_use_ref_model": "ref_model is used whenever it is set",
    **dict.fromkeys(
        words("padding_free pad_to_multiple_of pad_token padding_value label_pad_token_id eval_packing"),
        "nothing is padded",
    ),
}


def idle_words(name: str) -> str:
    """What to say of an idle key."""
    return f"`{name}` has no effect here" + (f": {IDLE[name]}" if IDLE[name] else "")


#: How the names of keys end whose values are never written down.
SECRET_ENDINGS = ("_token", "api_key", "password", "_secret")


def is_secret(name: str) -> bool:
    """Whether a key of this name, ours or another tool's, holds a token, an access key or a password."""
    return name.endswith(SECRET_ENDINGS)


@dataclass(frozen=True)
class Resolved:
    """A key under its canonical name. `key` is None when there is nothing to set."""

    key: str | None
    value: Any = None
    notice: str | None = None


def is_on(value: Any) -> bool:
    """Whether a switch of another tool is set."""
    return value.strip().lower() not in OFF_WORDS | {"0", "f", "n"} if isinstance(value, str) else bool(value)


def resolve(name: str, value: Any) -> Resolved:
    """The canonical key and value of a name that may be another tool's."""
    if name in SWITCHES:
        key, meaning = SWITCHES[name]
        if not is_on(value):
            if name not in OFF:
                return Resolved(None)
            meaning = OFF[name]
        shown = ",".join(meaning) if isinstance(meaning, list) else str(meaning).lower()
        return Resolved(key, meaning, f"`{name}` is read as `{key}: {shown}`")
    key = SYNONYMS.get(name, name)
    if there := ELSEWHERE.get((key, str(value).strip().lower())):
        key, meaning, then = there
        return Resolved(key, meaning, f"`{name}: {value}` is read as `{key}: {meaning}`: {then}")
    notice = f"`{name}` is read as `{key}`" if key != name else None
    replaced = _rename_value(key, value)
    if replaced != value:
        notice = f"`{name}: {_shown(value)}` is read as `{key}: {_shown(replaced)}`"
    return Resolved(key, replaced, notice)


def _rename_value(key: str, value: Any) -> Any:
    names = VALUE_SYNONYMS.get(key)
    if not names:
        return value
    if isinstance(value, list):
        return [_rename_value(key, item) for item in value]
    if isinstance(value, bool):
        return names.get(str(value).lower(), value)
    if not isinstance(value, str):
        return value
    if "," in value:
        return ",".join(_rename_value(key, word.strip()) for word in value.split(","))
    return names.get(value.strip().lower(), value)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def asks_for_nothing(refused: Refused, value: Any) -> bool:
    """Whether a refused key is set to what happens anyway."""
    if str(value).strip().lower() == str(refused.neutral).lower():
        return True
    if refused.neutral is None:
        return not is_on(value) or value in ([], {})
    try:
        return isinstance(refused.neutral, int | float) and float(value) == refused.neutral
    except (TypeError, ValueError):
        return False
