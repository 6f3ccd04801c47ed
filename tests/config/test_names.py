"""Names of other tools: synonyms, refusals, keys without a counterpart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trueup.config import methods, names
from trueup.config.explain import explain, nearest
from trueup.config.load import known_keys, load_config
from trueup.config.schema import FIELDS, SECTION_OF, is_flag
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d"}


@pytest.mark.parametrize(
    "given, key, value",
    [
        ({"stage": "dpo", "dpo_beta": 0.2}, "pref_beta", 0.2),
        ({"stage": "dpo", "beta": 0.2}, "pref_beta", 0.2),
        ({"stage": "dpo", "loss_type": "sigmoid"}, "pref_loss", "sigmoid"),
        ({"max_seq_length": 512}, "cutoff_len", 512),
        ({"max_length": 512}, "cutoff_len", 512),
        ({"model_max_length": 512}, "cutoff_len", 512),
        ({"swanlab_project": "p"}, "project", "p"),
        ({"swanlab_run_name": "r"}, "run_name", "r"),
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"lora_r": 4}, "lora_rank", 4),
        ({"r": 4}, "lora_rank", 4),
        ({"target_modules": ["q_proj"]}, "lora_target", ["q_proj"]),
        ({"lora_target": "value"}, "lora_target", ["v_proj"]),
        ({"lora_target": "q_proj,value"}, "lora_target", ["q_proj", "v_proj"]),
        ({"lora_target": "all-linear"}, "lora_target", ["all"]),
        ({"stage": "pretrain"}, "stage", "pt"),
        ({"no_cuda": True}, "device", "cpu"),
        ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", "off"),
        ({"use_unsloth_gc": True}, "activation_offloading", True),
        ({"use_mps_device": True}, "device", "mps"),
        ({"use_mps_device": False}, "device", "auto"),
        ({"load_in_4bit": False}, "quantization_bit", None),
        ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ({"hub": "openmind"}, "hub", "modelers"),
        ({"lr": 1e-3}, "learning_rate", 1e-3),
        ({"activation_checkpointing": True}, "gradient_checkpointing", "full"),
        ({"hub_token": "t"}, "hf_hub_token", "t"),
        ({"use_swanlab": True}, "report_to", ["swanlab"]),
        ({"use_peft": "no"}, "finetuning_type", "full"),
        ({"xpu_backend": "gloo"}, "ddp_backend", "gloo"),
        ({"chat_template_path": "a.jinja"}, "template", "a.jinja"),
        ({"flash_attn": "off"}, "flash_attn", "disabled"),
        ({"per_device_train_batch_size": "auto"}, "batch_tokens", "auto"),
        ({"micro_batch_size": "Auto"}, "batch_tokens", "auto"),
    ],
)
def test_synonyms_resolve_and_are_said_once(given, key, value, caplog):
    with caplog.at_level("INFO", "trueup"):
        assert load_config({**BASE, **given})[key] == value
    said = [r.message for r in caplog.records if "is read as" in r.message]
    assert len(said) == (0 if False in given.values() else 1)


def test_a_synonym_and_its_key_with_equal_values_agree():
    assert load_config({**BASE, "lora_r": 4, "lora_rank": "4"}).tuning.lora_rank == 4


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("image_max_pixels", 1024, "text only"),
        ("freeze_vision_tower", False, "text only"),
        ("use_mca", True, "Megatron"),
        ("tensor_model_parallel_size", 2, "Megatron"),
        ("use_badam", True, "LoRA"),
        ("save_safetensors", False, "safetensors"),
        ("compute_dtype", "bf16", "works this out itself"),
        ("max_prompt_length", 512, "cutoff_len"),
        ("use_ipex", True, "device"),
        ("tpu_num_cores", 8, "TPU"),
        ("swanlab_mode", "local", "environment"),
        ("model_init_kwargs", {"a": 1}, "flash_attn"),
        ("reference_free", True, "simpo"),
        ("assistant_only_loss", False, "train_on_prompt"),
        ("tp_size", 4, "fsdp"),
        ("sharded_ddp", "simple", "fsdp"),
    ],
)
def test_refused_keys_give_their_reason(key, value, reason):
    with pytest.raises(ConfigError) as caught:
        load_config({**BASE, key: value})
    assert reason in caught.value.problems[0].what


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_max_pixels", 589824),
        ("freeze_vision_tower", True),
        ("save_safetensors", "true"),
        ("use_ipex", False),
        ("use_mca", "no"),
        ("badam_mode", "layer"),
        ("debug", ""),
    ],
)
def test_refused_keys_at_their_default_are_let_pass(key, value):
    assert load_config({**BASE, key: value})


def test_every_training_argument_of_transformers_is_known_with_its_default():
    transformers = pytest.importorskip("transformers")
    arguments = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)
    }
    plain = {key: getattr(value, "value", value) for key, value in arguments.items()}
    cfg = load_config({**BASE, **plain, "do_train": True})
    assert cfg.train.learning_rate == 5e-5


def test_every_key_of_llama_factory_is_known_with_its_default(caplog):
    text = (Path(__file__).parent / "llamafactory_keys.txt").read_text(encoding="utf-8")
    keys = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    for key in ("task", "dataset", "model_name_or_path", "max_length"):
        keys.pop(key)
    given = {key: None if value == "None" else value for key, value in keys.items()}
    defaults = {**BASE, **given, "on_unused_keys": "warn"}
    assert load_config(defaults).objective.stage == "sft"
    assert "unknown key" not in caplog.text


TRL = """
model_init_kwargs=null router_aux_loss_coef=null chat_template_path=null dataset_text_field=text
dataset_kwargs=null eos_token=null shuffle_dataset=false packing_strategy=bfd padding_free=false
pad_to_multiple_of=auto eval_packing=null completion_only_loss=true assistant_only_loss=true
activation_offloading=false pad_token=null disable_dropout=false precompute_ref_batch_size=null
loss_weights=null f_divergence_type=reverse_kl f_alpha_divergence_coef=0.5 use_weighting=false
discopop_tau=0.05 sync_ref_model=false ref_model_mixup_alpha=0.6 ref_model_sync_steps=512
ref_model_init_kwargs=null model_adapter_name=null ref_adapter_name=null force_use_ref_model=false
use_logits_to_keep=false label_pad_token_id=-100 tools=null use_liger_loss=false
base_model_attribute_name=model reference_free=false generate_during_eval=false padding_value=null
dtype=auto torch_dtype=auto lora_target_parameters=null lora_task_type=CAUSAL_LM bnb_4bit_quant_storage=null
dataset_config=null dataset_train_split=train dataset_test_split=test dataset_streaming=false
ignore_bias_buffers=false gradient_checkpointing_use_reentrant=true is_encoder_decoder=null cpo_alpha=null
"""


def test_every_name_of_trls_configs_is_known():
    assert load_config(BASE, TRL.split())


V4 = """
tp_size=0 sharded_ddp= xpu_backend=null
evaluation_strategy=no per_gpu_train_batch_size=8 per_gpu_eval_batch_size=8 no_cuda=false
overwrite_output_dir=false logging_dir=runs save_safetensors=true group_by_length=false
warmup_ratio=0.0 fp16_backend=auto half_precision_backend=auto fp16_opt_level=O1 past_index=-1
push_to_hub_model_id=null push_to_hub_organization=null push_to_hub_token=null
include_inputs_for_metrics=false include_tokens_per_second=false ray_scope=last mp_parameters=
torchdynamo=null jit_mode_eval=false use_ipex=false use_mps_device=false tpu_num_cores=null
tpu_metrics_debug=false adafactor=false fsdp_min_num_params=0 use_legacy_prediction_loop=false
fsdp_transformer_layer_cls_to_wrap=null dispatch_batches=null split_batches=null
"""


def test_every_v4_name_is_known_at_its_default():
    assert load_config(BASE, V4.split())


def test_no_name_has_two_meanings():
    groups = [set(FIELDS), set(names.SYNONYMS), set(names.SWITCHES), set(names.REFUSED), set(names.IDLE)]
    for position, group in enumerate(groups):
        for other in groups[position + 1 :]:
            assert not group & other
    assert set(names.SYNONYMS.values()) <= set(FIELDS)
    assert {key for key, _ in names.SWITCHES.values()} <= set(FIELDS)


def test_tables_name_only_keys_that_exist():
    keys = set(FIELDS)
    assert set(methods.LATER) <= keys and set(methods.LATER_VALUES) <= keys
    assert set(methods.ACTS_WITH) <= keys and keys >= set(methods.NOT_ACTING_YET)
    assert set(methods.OTHER_VERBS) <= keys and set(methods.IN_TRAINING.values()) | methods.STEPS <= keys
    assert {other for needs in methods.ACTS_WITH.values() for other in needs} <= keys
    assert set(names.VALUE_SYNONYMS) <= keys


def test_every_key_not_supported_yet_is_refused_and_names_an_alternative():
    for key, instead in methods.LATER.items():
        if SECTION_OF[key] == "evaluate":  # the verb itself is to come
            continue
        value = True if is_flag(key) else 4 if "bit" in key else 2
        value = {
            "rope_scaling": "yarn",
            "infer_dtype": "float16",
        }.get(key, value)
        if key in ("ld_alpha", "moe_aux_loss_coef", "label_smoothing_factor"):
            value = 0.5
        if key.endswith(("kwargs", "vllm_config")):
            value = {"a": 1}
        if key == "quantization_device_map":
            value = "auto"
        with pytest.raises(ConfigError) as caught:
            load_config({**BASE, key: value}, verb="infer" if key in methods.OTHER_VERBS else "train")
        said = [p for p in caught.value.problems if f"`{key}` is not supported yet" in p.what]
        assert len(said) == 1 and instead in said[0].fix, key


@pytest.mark.parametrize("stage", [s for s, row in methods.STAGES.items() if row.instead])
def test_stages_for_later_name_an_alternative(stage):
    with pytest.raises(ConfigError) as caught:
        load_config({**BASE, "stage": stage})
    (problem,) = caught.value.problems
    assert problem.what == f"`stage: {stage}` is not supported yet" and "stage: dpo" in problem.fix


def test_stage_kinds():
    kinds = {s: methods.stage_kind(load_config({**BASE, "stage": s})) for s in ("pt", "sft", "dpo")}
    assert kinds == {"pt": "text", "sft": "chat", "dpo": "pair"}
    assert methods.needs_reference(load_config({**BASE, "stage": "dpo"}))
    assert not methods.needs_reference(load_config(BASE))


@pytest.mark.parametrize("variable, hub", [("USE_MODELSCOPE_HUB", "modelscope"), ("USE_OPENMIND_HUB", "modelers")])
def test_hub_variables_act_and_the_key_wins(variable, hub, monkeypatch):
    monkeypatch.setenv(variable, "1")
    assert load_config(BASE).model.hub == hub
    assert load_config({**BASE, "hub": "huggingface"}).model.hub == "huggingface"
    monkeypatch.setenv(variable, "0")
    assert load_config(BASE).model.hub == "huggingface"


def test_keys_that_describe_a_machine_never_fail():
    machine = {"ddp_timeout": 180000000, "dataloader_num_workers": 4, "ddp_backend": "nccl",
               "preprocessing_num_workers": 16, "dataloader_pin_memory": True, "tf32": True,
               "report_to": "wandb", "ddp_find_unused_parameters": False}  # fmt: skip
    assert load_config({**BASE, **machine})


def test_idle_keys_say_why_where_a_reader_would_wonder(caplog):
    with caplog.at_level("INFO", "trueup"):
        load_config({**BASE, "logging_dir": "runs", "use_cache": False})
    assert [r.message for r in caplog.records] == [
        "`logging_dir` has no effect here: TensorBoard's files are in output_dir/runs",
        "`use_cache` has no effect here",
    ]


def test_help_on_a_key_by_any_of_its_names():
    assert explain("dpo_beta").startswith("pref_beta (objective): ")
    assert "not supported yet" in explain("galore_layerwise")
    assert "text only" in explain("video_fps")
    assert "did you mean learning_rate" in explain("learnign_rate")
    assert nearest("zzzzzz") is None
    assert all(explain(key) for key in known_keys())
