"""What may change between a checkpoint and the configuration that resumes it.

*Free* keys touch nothing that is computed; any other key that is not *refused* is said and taken as
it is now; *refused* keys make it another experiment, and need to be named in `allow` by who knows
better. Torch-free.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from trueup.errors import CorruptStateError, Problem

_log = logging.getLogger("trueup")


def _words(text: str) -> list[str]:
    return text.split()


#: Logging, saving, display, machine: the numbers stay the same.
FREE = frozenset(
    _words("""
    output_dir overwrite_output_dir resume_from_checkpoint allow_changed new_run run_name
    project report_to logging_dir logging_strategy logging_steps logging_first_step
    logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm
    plot_loss profile include_num_input_tokens_seen save_strategy save_steps save_total_limit
    save_only_model save_on_each_node eval_strategy eval_steps eval_delay eval_on_start
    per_device_eval_batch_size do_eval do_predict do_train regression_report dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers
    preprocessing_num_workers overwrite_cache cache_dir ddp_timeout push_to_hub hub_model_id
    hub_strategy hub_private_repo hub_revision trackio_space_id print_param_status
    skip_memory_metrics compute_accuracy
""")
)

#: Another experiment.
REFUSED = frozenset(
    _words("""
    seed data_seed model_name_or_path model_revision adapter_name_or_path create_new_adapter
    template finetuning_type lora_rank lora_alpha lora_target additional_target use_rslora
    use_dora rank_pattern alpha_pattern pissa_init pissa_iter loftq_init oft_rank oft_block_size oft_target ia3_target
    quantization_bit quantization_method quantization_type double_quantization ref_model_quantization_bit
    stage pref_loss use_dft_loss use_eaft_loss custom_objective ref_model ref_model_adapters reward_model optim dataset
    rope_scaling rope_scaling_length resize_vocab add_tokens add_special_tokens new_special_tokens_config
    init_special_tokens use_llama_pro freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
    packing neat_packing disable_shuffling dataloader_drop_last effective_batch data_fingerprint
""")
)

#: What stands in a checkpoint's manifest beside the keys; a key's name there means what the file has that it names.
IDENTITY = ("data_fingerprint", "effective_batch", "new_special_tokens_config", "reward_funcs", "judge")


def check_resumable(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    allow: Collection[str] = (),
    *,
    where: str = "run.yaml",
) -> None:
    """Compare two flat resolved configurations.

    Changes that matter are said once; raises CorruptStateError (all at once) for those that are
    refused and not named in `allow` ("all" allows everything).
    """
    refused: list[Problem] = []
    said: list[str] = []
    for key in sorted(then.keys() | now.keys()):
        if key in FREE or then.get(key) == now.get(key):
            continue
        change = f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        if key in REFUSED and key not in allow and "all" not in allow:
            refused.append(_refusal(key, change, where))
        else:
            said.append(change)
    if refused:
        raise CorruptStateError(refused)
    if said:
        _log.warning("resuming with a changed configuration: %s", "; ".join(said))


def check_identity(then: Mapping[str, Any], now: Mapping[str, Any], allow: Collection[str] = (), *, where: str) -> None:
    """Refuse a resume on other data, with another effective batch or other new tokens, unless `allow` names them.

    Edited reward functions are said: mending one is why many stop a run.
    """
    keys = [key for key in IDENTITY if then.get(key) and now.get(key)]
    check_resumable({k: then[k] for k in keys}, {k: now[k] for k in keys}, allow, where=where)


def _refusal(key: str, change: str, where: str) -> Problem:
    return Problem(
        f"this would be another experiment: {change}",
        where=where,
        expected="the value the checkpoint was trained with",
        fix=f"set it back, start a new run, or say allow_changed: [{key}]",
    )
