"""What cannot be meant together: keys that exclude or need each other, keys that are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trueup.config import optimizers
from trueup.config.losses import LIVE_REFERENCE, ON_SUMS, PREF_LOSSES, STAGE_LOSSES, parting
from trueup.config.schema import default


@dataclass(frozen=True)
class Rule:
    """Keys that exclude or need each other. `broken` sees all keys as attributes."""

    keys: tuple[str, ...]
    broken: Callable[[Any], Any]
    what: str
    fix: str


def _not_multiple(c: Any) -> bool:
    if not c.load_best_model_at_end or c.eval_strategy != "steps" or c.save_strategy != "steps":
        return False
    if c.eval_steps < 1 or c.save_steps < 1:
        return (c.eval_steps < 1) != (c.save_steps < 1) or abs(c.save_steps / c.eval_steps % 1) > 1e-6
    return bool(c.save_steps % c.eval_steps)


def _count_rewards(c: Any) -> int:
    return len(c.reward_funcs) + bool(c.reward_model)


def _judged(c: Any) -> bool:
    return c.stage == "online_dpo" and bool(c.judge) and not _count_rewards(c)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _ratio_is_one(c: Any) -> bool:
    """Answers are learnt from once, by the very policy that gave them: a ratio of 1 is never clipped. With dropout the
    policy that learns is not quite the one that PPO and RLOO have computed beforehand.
    """
    drops = c.stage != "grpo" and c.finetuning_type == "lora" and c.lora_dropout > 0
    return c.stage in ("ppo", "grpo", "rloo") and c.ppo_buffer_size * (c.ppo_epochs or 1) == 1 and not drops


def _clips_in_vain(key: str, unset: float | None = None) -> Rule:
    """`unset`: the value that asks for nothing, where it is not the schema's default."""
    usual = default(key) if unset is None else unset

    def broken(c: Any) -> bool:
        caps = key == "ppo_clip_ratio_high" and c.grpo_loss == "cispo"  # caps the weight itself
        return key in c.explicit and getattr(c, key) != usual and _ratio_is_one(c) and not (c.stage == "grpo" and caps)

    return Rule(
        (key, "ppo_epochs", "ppo_buffer_size"),
        broken,
        f"`{key}` has no effect: answers that are learnt from in a single step have not moved yet",
        "drop it, or set ppo_epochs or ppo_buffer_size above 1",
    )


def _losses(c: Any) -> list[str]:
    return c.pref_loss if isinstance(c.pref_loss, list) else [c.pref_loss]


def _foreign(c: Any) -> bool:
    return c.stage in STAGE_LOSSES and not set(_losses(c)) <= set(STAGE_LOSSES[c.stage])


def _parting(key: str) -> Rule:
    return Rule(
        ("pref_loss", key),
        lambda c: c.stage in STAGE_LOSSES and key not in c.explicit and parting(key, _losses(c)),
        f"the losses of `pref_loss` differ in what an unset `{key}` means",
        f"set {key}: it then holds for all of them",
    )


_ONLINE = ("ppo", "grpo", "rloo", "online_dpo")

#: keys that choose or make up the loss.
_OF_LOSSES = ("pref_loss", "loss_weights", "pref_ftx", "pref_bco_weight", "knowledge_weight", "reward_loss")

#: method → the bits it keeps weights in.
QUANTISED_BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 8), "eetq": (8,), "torchao": (8,)}


def _impossible_bits(c: Any) -> bool:
    bits = QUANTISED_BITS.get(c.quantization_method)
    return bool(bits and c.quantization_bit and c.quantization_bit not in bits)


def _foreign_type(c: Any) -> bool:
    """Whether the number format is another method's."""
    if not c.quantization_bit or "quantization_type" not in c.explicit:
        return False
    return (c.quantization_type == "fp8") != (c.quantization_method == "torchao")


# Rules that several verbs have.

MODEL = Rule(
    ("model_name_or_path",),
    lambda c: not c.model_name_or_path,
    "`model_name_or_path` is missing",
    "name a model: a directory, a hub id, or builtin:sql-tiny",
)
PRECISION = Rule(
    ("bf16", "fp16"),
    lambda c: c.bf16 and c.fp16,
    "`bf16` and `fp16` exclude each other: a run computes in one format",
    "drop one of them; bf16 needs no loss scaling",
)
PROMPTS = Rule(
    ("dataset",),
    lambda c: not c.dataset,
    "`dataset` is missing: there are no prompts to answer",
    "name a dataset of dataset_info.json, a built-in sample such as alpaca_en_demo, or a file",
)
GREEDY = Rule(
    ("temperature", "top_p", "top_k"),
    lambda c: c.temperature == 0 and {"top_p", "top_k"} & c.explicit and (c.top_p < 1 or c.top_k > 0),
    "`top_p` and `top_k` have no effect at `temperature: 0`, which always takes the likeliest token",
    "set temperature, or drop them",
)
JUDGE = Rule(
    ("rank_by", "judge_model"),
    lambda c: c.rank_by == "judge" and not c.judge_model,
    "`rank_by: judge` needs a judge",
    "set judge_model: a directory, a hub id, or URL#MODEL",
)
REWARD_WEIGHTS = Rule(
    ("reward_weights", "reward_funcs", "reward_model"),
    lambda c: c.reward_weights and len(c.reward_weights) != _count_rewards(c),
    "`reward_weights` needs one number for each reward: those of `reward_funcs`, then `reward_model`",
    "give as many as there are rewards",
)

#: How a base is quantised; training and inference alike.
QUANTISATION = [
    Rule(
        ("quantization_method", "quantization_bit"),
        lambda c: c.quantization_bit and c.quantization_method in ("gptq", "awq"),
        "GPTQ and AWQ quantise with the help of data, not while loading",
        "name a checkpoint that is quantised so, without quantization_bit; or set quantization_method: bnb",
    ),
    Rule(
        ("quantization_method", "quantization_bit"),
        _impossible_bits,
        "this `quantization_method` does not keep weights in so many bits",
        "; ".join(f"{name}: {', '.join(map(str, bits))}" for name, bits in QUANTISED_BITS.items())
        + " (torchao's 4-bit weights pass no gradient on)",
    ),
    Rule(
        ("quantization_type", "quantization_method"),
        _foreign_type,
        "`quantization_type: nf4` and `fp4` are bitsandbytes' formats of 4 bits, `fp8` is torchao's of 8 bits",
        "drop quantization_type",
    ),
]

#: What trains the weights.
OPTIMIZER_RULES = [
    Rule(
        (*optimizers.SWITCHED, "optim"),
        optimizers.contradicts,
        "one run has one optimizer",
        f"keep one of {', '.join(optimizers.SWITCHED)}, or set optim alone",
    ),
    Rule(
        ("optim_args", "use_galore", "use_apollo"),
        optimizers.given_twice,
        "`optim_args` and the optimizer's own keys (galore_…, apollo_…) say different things",
        "drop optim_args",
    ),
    Rule(
        ("optim_args", "optim"),
        optimizers.bad_arguments,
        "`optim_args` holds a name or a value that this `optim` does not take",
        "write name=value,name=value; "
        + "; ".join(
            f"{name}: {', '.join(row.arguments)}"
            for name, row in optimizers.OPTIMIZERS.items()
            if row.arguments and name in ("sgd", "adafactor", "adamw_8bit", "galore_adamw", "apollo_adamw", "muon")
        ),
    ),
    Rule(
        ("optim", *optimizers.SWITCHED, "finetuning_type"),
        lambda c: (
            c.finetuning_type not in ("full", "freeze")
            and c.optim in optimizers.OPTIMIZERS
            and optimizers.OPTIMIZERS[c.optim].whole_weights
        ),
        "GaLore, APOLLO and Adam-mini save moments of the model's own matrices, and adapters are small as they are",
        "set finetuning_type: full or freeze, or optim: adamw_torch",
    ),
    Rule(
        ("optim", "lr_scheduler_type"),
        lambda c: c.optim.startswith("schedule_free") and c.lr_scheduler_type != "constant",
        "a schedule-free optimizer takes no schedule: it averages weights instead",
        "drop lr_scheduler_type; warmup_steps still acts",
    ),
    Rule(
        ("optim", "warmup_steps", "warmup_ratio"),
        lambda c: c.optim == "schedule_free_radam" and (c.warmup_steps or c.warmup_ratio),
        "schedule_free_radam warms up by itself",
        "drop warmup_steps and warmup_ratio, or set optim: schedule_free_adamw",
    ),
    Rule(
        ("optim", "load_best_model_at_end", "save_only_model"),
        lambda c: c.optim.startswith("schedule_free") and c.load_best_model_at_end and c.save_only_model,
        "the best weights of a schedule-free run are made with its optimizer's state, and `save_only_model` drops that",
        "drop save_only_model",
    ),
    Rule(
        ("layer_lr_decay",),
        lambda c: c.layer_lr_decay is not None and c.layer_lr_decay > 1,
        "`layer_lr_decay` above 1 would train the lowest layers fastest",
        "set it between 0 and 1, such as 0.9",
    ),
    Rule(
        ("lr_multipliers",),
        lambda c: any(
            isinstance(v, bool) or not isinstance(v, int | float) or v < 0 for v in c.lr_multipliers.values()
        ),
        "`lr_multipliers` maps parts of parameters' names to numbers",
        "write lr_multipliers: {embed_tokens: 0.1}",
    ),
]


def _bad_pattern(pattern: dict[str, Any]) -> bool:
    return any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in pattern.values())


RULES = [
    Rule(
        ("init_special_tokens", "new_special_tokens_config"),
        lambda c: c.init_special_tokens != "noise_init" and not c.new_special_tokens_config,
        "`init_special_tokens: desc_init` starts rows from descriptions, and there are none",
        "name a YAML file of tokens and their descriptions: new_special_tokens_config",
    ),
    Rule(
        ("pissa_init", "quantization_bit"),
        lambda c: c.pissa_init and c.quantization_bit,
        "`pissa_init` changes the base's weights, and `quantization_bit` freezes them in few bits",
        "set loftq_init: true, which starts from what quantising has lost; or drop one of them",
    ),
    Rule(
        ("pissa_init", "loftq_init"),
        lambda c: c.pissa_init and c.loftq_init,
        "`pissa_init` and `loftq_init` both say where the adapter starts",
        "drop one of them",
    ),
    Rule(
        ("pissa_init", "use_dora"),
        lambda c: c.use_dora and (c.pissa_init or c.loftq_init),
        "an adapter with `use_dora` starts at the base itself: `pissa_init` and `loftq_init` have no part in it",
        "drop one of them",
    ),
    Rule(
        ("pissa_convert", "pissa_init"),
        lambda c: c.pissa_init and not c.pissa_convert,
        "`pissa_convert: false` would save an adapter for a base that exists nowhere",
        "drop it: what is saved stands on the original model, at twice the rank",
    ),
    Rule(
        ("use_llama_pro", "use_dora", "pissa_init", "loftq_init"),
        lambda c: c.use_llama_pro and c.finetuning_type == "lora" and (c.use_dora or c.pissa_init or c.loftq_init),
        "inserted blocks end in weights of 0, in which `use_dora`, `pissa_init` and `loftq_init` find nothing to "
        "start from",
        "drop these: plain LoRA and use_rslora train the blocks of `use_llama_pro`",
    ),
    Rule(
        ("rank_pattern", "alpha_pattern"),
        lambda c: _bad_pattern(c.rank_pattern) or _bad_pattern(c.alpha_pattern),
        "`rank_pattern` and `alpha_pattern` give whole numbers above 0 to names of layers",
        "as in rank_pattern: {q_proj: 16}",
    ),
    Rule(
        ("oft_rank", "oft_block_size"),
        lambda c: c.finetuning_type == "oft" and not c.oft_rank and not c.oft_block_size,
        "`oft_rank: 0` and `oft_block_size: 0` leave no blocks to rotate",
        "set one of them",
    ),
    Rule(
        ("stage", "pref_loss"),
        lambda c: _foreign(c) and set(_losses(c)) <= set(PREF_LOSSES),
        "this stage does not train this `pref_loss`",
        "stage: dpo takes every loss on pairs, stage: kto takes kto, bco and apo_zero_unpaired; "
        "orpo, simpo and cpo have their own",
    ),
    Rule(
        ("pref_loss",),
        lambda c: c.stage in STAGE_LOSSES and (not c.pref_loss or len(set(_losses(c))) < len(_losses(c))),
        "`pref_loss` names a loss twice, or none",
        "name each once; loss_weights weighs them",
    ),
    Rule(
        ("custom_objective", *_OF_LOSSES),
        lambda c: c.custom_objective and set(_OF_LOSSES) & c.explicit,
        f"a `custom_objective` is the whole loss: {', '.join(_OF_LOSSES)} have no part in it",
        "drop them, or the custom_objective",
    ),
    Rule(
        ("stage", "pref_loss"),
        lambda c: c.stage != "dpo" and c.stage in STAGE_LOSSES and len(_losses(c)) > 1,
        "only `stage: dpo` adds up several losses",
        "keep one, or set stage: dpo",
    ),
    Rule(
        ("pref_loss", "loss_weights"),
        lambda c: c.stage in STAGE_LOSSES and c.loss_weights and len(c.loss_weights) != len(_losses(c)),
        "`loss_weights` needs one number for each loss of `pref_loss`",
        "give as many as there are losses, or drop it",
    ),
    Rule(
        ("loss_weights",),
        lambda c: c.loss_weights and (min(c.loss_weights) < 0 or c.loss_weights[0] <= 0),
        "`loss_weights` are not negative, and the first loss counts",
        "give the losses positive weights",
    ),
    Rule(
        ("pref_loss", "dpo_label_smoothing"),
        lambda c: c.stage == "dpo" and "exo_pair" in _losses(c) and not c.dpo_label_smoothing,
        "`pref_loss: exo_pair` takes the logarithm of `dpo_label_smoothing`, which is 0",
        "set dpo_label_smoothing: 0.001, or leave it unset",
    ),
    Rule(
        ("pref_loss", "pref_bco_weight"),
        lambda c: c.stage == "dpo" and c.pref_bco_weight and "bco_pair" in _losses(c),
        "`pref_bco_weight` adds a BCO loss, and `pref_loss` has it already",
        "drop one of them",
    ),
    Rule(
        ("pref_loss", "pref_ftx"),
        lambda c: c.stage == "dpo" and c.pref_ftx and "sft" in _losses(c),
        "`pref_ftx` adds an SFT loss, and `pref_loss` has it already",
        "drop one of them",
    ),
    *map(_parting, ("pref_beta", "dpo_label_smoothing", "simpo_gamma")),
    Rule(
        ("pref_loss", "use_weighting"),
        lambda c: c.stage == "dpo" and c.use_weighting and _losses(c) == ["sft"],
        "`use_weighting` has no effect with `pref_loss: sft`: it weighs pairs",
        "drop it, or add a loss on pairs",
    ),
    Rule(
        ("pref_loss", "ld_alpha"),
        lambda c: (
            c.stage == "dpo"
            and c.ld_alpha is not None
            and set(_losses(c)) & set(ON_SUMS)
            and any(PREF_LOSSES[name].per_token for name in _losses(c) if name in PREF_LOSSES)
        ),
        "`ld_alpha` weighs sums over tokens, and a loss of `pref_loss` compares means per token",
        "drop ld_alpha, or keep losses on sums",
    ),
    Rule(
        ("sync_ref_model", "ref_model"),
        lambda c: c.stage == "dpo" and c.sync_ref_model and c.ref_model,
        "`sync_ref_model` moves the reference with the model, and `ref_model` is another model",
        "drop one of them",
    ),
    Rule(
        ("precompute_ref_log_probs", "sync_ref_model", "pref_loss"),
        lambda c: (
            c.stage == "dpo"
            and c.precompute_ref_log_probs
            and (c.sync_ref_model or set(_losses(c)) & set(LIVE_REFERENCE))
        ),
        "`precompute_ref_log_probs: true` keeps log-probabilities, and this reference has to run in every step",
        "drop precompute_ref_log_probs",
    ),
    Rule(
        ("stage", "reward_funcs", "reward_model", "judge"),
        lambda c: (
            c.stage in _ONLINE
            and (c.do_train or c.do_eval)
            and not (_count_rewards(c) or (c.stage == "online_dpo" and c.judge))
        ),
        "nobody says what a good answer is: this stage learns from rewards",
        "set reward_funcs: FILE.py:NAME, or reward_model: DIR (online_dpo also takes judge: FILE.py:NAME)",
    ),
    REWARD_WEIGHTS,
    Rule(
        ("judge", "reward_funcs", "reward_model"),
        lambda c: c.judge and _count_rewards(c),
        "`judge` and rewards both say which answer is better",
        "drop one of them",
    ),
    Rule(
        ("stage", "num_generations"),
        lambda c: c.stage in ("grpo", "rloo", "online_dpo") and (c.num_generations or 2) < 2,
        "one answer cannot be compared with the others of its prompt",
        "set num_generations: 2 or more",
    ),
    Rule(
        ("reward_timeout", "reward_funcs", "judge"),
        lambda c: (
            c.stage in _ONLINE
            and c.reward_timeout != default("reward_timeout")
            and not c.reward_funcs
            and not (c.stage == "online_dpo" and c.judge)
        ),
        "`reward_timeout` has no effect without `reward_funcs` or `judge`",
        "drop it",
    ),
    Rule(
        ("judge", "missing_eos_penalty"),
        lambda c: c.stage == "online_dpo" and c.judge and c.missing_eos_penalty,
        "`missing_eos_penalty` has no effect with `judge`, which gives no rewards to take it from",
        "drop it, or give rewards in place of the judge",
    ),
    Rule(
        ("judge", "eval_dataset", "val_size", "eval_strategy", "do_eval"),
        lambda c: (
            _judged(c)
            and (c.eval_strategy != "no" or c.do_eval or bool(c.eval_dataset or c.val_size) and not c.do_predict)
        ),
        "an evaluation scores one answer to each prompt, and `judge` compares two: it would have nothing to say",
        "drop what asks for an evaluation, or give rewards in place of the judge",
    ),
    Rule(
        ("reward_model_type", "reward_model"),
        lambda c: (
            c.reward_model and c.reward_model_type and (c.reward_model_type == "api") != _is_url(str(c.reward_model))
        ),
        "`reward_model_type: api` and a URL in `reward_model` go together, and only they",
        "drop reward_model_type: what reward_model is can be seen",
    ),
    Rule(
        ("reward_model_type", "reward_model_adapters"),
        lambda c: c.reward_model and c.reward_model_adapters and c.reward_model_type in ("full", "api"),
        "`reward_model_adapters` belong to `reward_model_type: lora`",
        "drop one of them",
    ),
    Rule(
        ("reward_model", "reward_model_adapters"),
        lambda c: c.reward_model and c.reward_model_adapters and _is_url(str(c.reward_model)),
        "`reward_model_adapters` have no effect on a scorer behind a URL",
        "drop them",
    ),
    _clips_in_vain("ppo_clip_ratio", 0.2),
    _clips_in_vain("ppo_clip_ratio_high", 0.2),
    _clips_in_vain("ppo_value_clip"),
    Rule(
        ("ppo_kl_coeff", "ppo_target"),
        lambda c: c.stage == "ppo" and c.ppo_target and c.ppo_kl_coeff == 0,
        "`ppo_target` has no effect with `ppo_kl_coeff: 0`: the price it multiplies stays 0",
        "drop ppo_target, or set ppo_kl_coeff",
    ),
    Rule(
        ("stage", "temperature"),
        lambda c: c.stage in ("grpo", "rloo", "online_dpo") and c.temperature == 0,
        "at `temperature: 0` all answers of a prompt are the same, and there is nothing to compare",
        "set temperature: 1",
    ),
    Rule(
        ("stage", "packing", "neat_packing"),
        lambda c: c.stage in _ONLINE and (c.packing or c.neat_packing),
        "`packing` has no effect where the model writes the answers itself",
        "drop it",
    ),
    Rule(
        ("judge", "num_generations"),
        lambda c: c.judge and c.num_generations not in (None, 2),
        "`judge` compares two answers of a prompt",
        "drop num_generations, or give rewards: the best and the worst of several are then a pair",
    ),
    Rule(
        ("stage", "ppo_kl_coeff", "ref_model"),
        lambda c: c.stage in ("ppo", "grpo", "rloo") and c.ref_model and not c.ppo_kl_coeff and not c.ppo_target,
        "`ref_model` is compared with at a price of 0: `ppo_kl_coeff` is 0",
        "set ppo_kl_coeff, or drop ref_model",
    ),
    PRECISION,
    Rule(
        ("quantization_bit", "finetuning_type"),
        lambda c: c.quantization_bit and c.finetuning_type in ("full", "freeze"),
        "a quantised base cannot be trained itself: `quantization_bit` excludes `finetuning_type: full` and `freeze`",
        "drop quantization_bit, or set finetuning_type: lora",
    ),
    *QUANTISATION,
    Rule(
        ("resume_from_checkpoint", "new_run"),
        lambda c: c.resume_from_checkpoint and c.new_run,
        "`resume_from_checkpoint` goes on with a run and `new_run` starts one",
        "drop one of them",
    ),
    Rule(
        ("new_run", "overwrite_output_dir"),
        lambda c: c.new_run and c.overwrite_output_dir,
        "`new_run` keeps the run that `overwrite_output_dir` moves aside",
        "drop one of them",
    ),
    Rule(
        ("warmup_steps", "warmup_ratio"),
        lambda c: c.warmup_steps and c.warmup_ratio,
        "`warmup_steps` and `warmup_ratio` say the same thing twice",
        "drop one of them",
    ),
    *OPTIMIZER_RULES,
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda c: c.load_best_model_at_end and c.eval_strategy == "no",
        "`load_best_model_at_end` needs evaluations while training",
        "set eval_strategy: steps (or epoch)",
    ),
    Rule(
        ("load_best_model_at_end", "save_strategy", "eval_strategy"),
        lambda c: (
            c.load_best_model_at_end and c.eval_strategy != "no" and c.save_strategy not in ("best", c.eval_strategy)
        ),
        "`load_best_model_at_end` needs a checkpoint at each evaluation: `save_strategy` and `eval_strategy` differ",
        "give save_strategy and eval_strategy the same value",
    ),
    Rule(
        ("load_best_model_at_end", "save_steps", "eval_steps"),
        _not_multiple,
        "`load_best_model_at_end` needs an evaluation at each checkpoint: `save_steps` is no multiple of `eval_steps`",
        "make save_steps a multiple of eval_steps",
    ),
    Rule(
        ("early_stopping_steps", "eval_strategy"),
        lambda c: c.early_stopping_steps and c.eval_strategy == "no",
        "`early_stopping_steps` counts evaluations, and there are none",
        "set eval_strategy: steps (or epoch)",
    ),
    Rule(
        ("eval_dataset", "val_size"),
        lambda c: c.eval_dataset and c.val_size,
        "`eval_dataset` and `val_size` both say what to evaluate on",
        "drop one of them",
    ),
    Rule(
        ("val_size",),
        lambda c: c.val_size > 1 and c.val_size % 1,
        "`val_size` is a share below 1 or a whole number of rows",
        "round it",
    ),
    Rule(
        ("packing", "neat_packing"),
        lambda c: c.neat_packing and c.packing is False,
        "`neat_packing: true` and `packing: false` contradict each other",
        "keep packing",
    ),
    Rule(
        ("interleave_probs", "dataset"),
        lambda c: c.interleave_probs and c.dataset and len(c.interleave_probs) != len(c.dataset),
        "`interleave_probs` needs one number for each dataset",
        "give as many as there are datasets",
    ),
    Rule(
        ("interleave_probs",),
        lambda c: c.interleave_probs and (min(c.interleave_probs) < 0 or sum(c.interleave_probs) <= 0),
        "`interleave_probs` are shares: none is negative and not all are 0",
        "give each dataset a share",
    ),
    Rule(
        ("mix_strategy", "dataset"),
        lambda c: c.mix_strategy != "concat" and len(c.dataset) == 1,
        "`mix_strategy` needs two datasets to mix",
        "drop mix_strategy, or name a second dataset",
    ),
    Rule(
        ("do_train", "do_eval", "do_predict"),
        lambda c: not (c.do_train or c.do_eval or c.do_predict),
        "nothing to do: `do_train`, `do_eval` and `do_predict` are all false",
        "set one of them",
    ),
    Rule(
        ("stage", "do_predict"),
        lambda c: c.do_predict and c.stage in ("pt", "rm"),
        "`do_predict` writes answers to prompts, which this stage has none of, or scores",
        "drop it; do_eval measures the model, and trueup score applies a reward model",
    ),
    Rule(
        ("predict_with_generate", "do_eval", "do_predict"),
        lambda c: c.predict_with_generate and not (c.do_eval or c.do_predict),
        "`predict_with_generate` has no effect: nothing is evaluated or predicted",
        "set do_eval or do_predict, or drop it",
    ),
    Rule(
        ("do_predict", "predict_with_generate", "train_on_prompt"),
        lambda c: c.stage == "sft" and c.train_on_prompt and (c.do_predict or c.predict_with_generate),
        "with `train_on_prompt` the tokens of a row do not say where its answer begins",
        "predict in a run of its own, without train_on_prompt",
    ),
    Rule(
        ("streaming", "max_steps"),
        lambda c: c.streaming and c.do_train and c.max_steps <= 0,
        "`streaming` does not know how long an epoch is",
        "set max_steps",
    ),
    Rule(
        ("booster", "flash_attn"),
        lambda c: c.booster == "flash_attn" and c.flash_attn in ("disabled", "sdpa"),
        "`booster: flash_attn` asks for flash-attention, and `flash_attn` for another kernel",
        "drop one of the two",
    ),
    Rule(
        ("batch_tokens", "stage"),
        lambda c: c.batch_tokens == "auto" and c.stage in _ONLINE,
        "`batch_tokens: auto` counts tokens of rows; this stage's answers are still to be written",
        "set per_device_train_batch_size; a step that runs out of memory is done again in smaller pieces",
    ),
    Rule(
        ("streaming", "stage"),
        lambda c: c.streaming and c.stage in _ONLINE,
        "`streaming` reads answers to learn from; this stage answers prompts itself",
        "drop streaming: prompts alone are small",
    ),
    Rule(
        ("streaming", "val_size"),
        lambda c: c.streaming and 0 < c.val_size < 1,
        "`val_size` is a share, and nobody knows how many rows `streaming` will read",
        "hold out a number of rows, as in val_size: 500; they are taken from the beginning",
    ),
    Rule(
        ("streaming", "eval_strategy"),
        lambda c: c.streaming and (c.do_eval or c.eval_strategy != "no") and not (c.val_size or c.eval_dataset),
        "an evaluation is asked for, and with `streaming` there is no share of rows to hold out",
        "set val_size to a number of rows, or an eval_dataset",
    ),
    Rule(
        ("streaming", "precompute_ref_log_probs"),
        lambda c: c.streaming and c.precompute_ref_log_probs and "precompute_ref_log_probs" in c.explicit,
        "`precompute_ref_log_probs: true` asks about every row before the first step; `streaming` reads them later",
        "drop precompute_ref_log_probs: the reference runs beside the model",
    ),
    Rule(
        ("streaming", "tokenized_path"),
        lambda c: c.streaming and c.tokenized_path,
        "`tokenized_path` keeps all tokens, and `streaming` never has all of them",
        "drop one of the two",
    ),
    Rule(
        ("freeze_trainable_layers", "finetuning_type"),
        lambda c: c.finetuning_type == "freeze" and c.freeze_trainable_layers == 0 and not c.freeze_extra_modules,
        "`freeze_trainable_layers: 0` trains nothing",
        "set it to the number of last layers to train",
    ),
    MODEL,
    Rule(
        ("dataset",),
        lambda c: c.do_train and not c.dataset,
        "`dataset` is missing",
        "name a dataset of dataset_info.json, a built-in sample such as dpo_en_demo, or a file",
    ),
    Rule(
        ("dataset", "eval_dataset"),
        lambda c: not c.do_train and (c.do_eval or c.do_predict) and not (c.dataset or c.eval_dataset),
        "`eval_dataset` is missing: there is nothing to evaluate on",
        "name a dataset",
    ),
]
