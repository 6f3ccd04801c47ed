"""Which rows, and how they become batches."""

from __future__ import annotations

from trueup.config.methods import ONLINE
from trueup.config.rules.rule import Rule

RULES = [
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
        ("streaming", "max_steps"),
        lambda c: c.streaming and c.do_train and c.max_steps <= 0,
        "`streaming` does not know how long an epoch is",
        "set max_steps",
    ),
    Rule(
        ("batch_tokens", "stage"),
        lambda c: c.batch_tokens == "auto" and c.stage in ONLINE,
        "`batch_tokens: auto` counts tokens of rows; this stage's answers are still to be written",
        "set per_device_train_batch_size; a step that runs out of memory is done again in smaller pieces",
    ),
    Rule(
        ("streaming", "stage"),
        lambda c: c.streaming and c.stage in ONLINE,
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
