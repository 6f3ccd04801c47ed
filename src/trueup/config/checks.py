"""What follows from a config, and what is wrong with it as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

from trueup.config.explain import alternative, closest_choice, condition_words
from trueup.config.losses import loss_defaults
from trueup.config.methods import (
    ACTS_WITH,
    IDLE_WITH,
    IN_TRAINING,
    LATER,
    LATER_VALUES,
    NOT_ACTING_YET,
    ONLINE,
    OTHER_VERBS,
    QUIET,
    STEPS,
    is_off,
    missing_condition,
    other_verb,
)
from trueup.config.optimizers import switched
from trueup.config.rules import RULES
from trueup.config.rules.model import MODEL, QUANTISATION
from trueup.config.rules.rule import Rule
from trueup.config.schema import SECTION_OF, RunConfig, default
from trueup.config.sections.online import SAMPLING, unset_values
from trueup.errors import Problem

log = logging.getLogger("trueup")

Place = Callable[[str], str | None]
"""Where the user set a key."""

#: sections that matter when nothing is trained.
INFERENCE_SECTIONS = ("model", "data", "generate", "export")
_READ_BY_INFERENCE = {key for key, section in SECTION_OF.items() if section in INFERENCE_SECTIONS} | {
    "finetuning_type", "stage", "bf16", "fp16", "seed", "on_unused_keys"
}  # fmt: skip


# What follows from what was given


def derive(cfg: RunConfig) -> RunConfig:
    """Fill in what other keys imply: the loss and its values, the jobs, the directory, LoRA's scale, evaluation."""
    changes: dict[str, Any] = loss_defaults(cfg)
    if cfg.tuning.finetuning_type == "lora" and cfg.tuning.lora_alpha is None:
        changes["lora_alpha"] = 2 * cfg.tuning.lora_rank
    if 0 < cfg.train.warmup_steps < 1:
        changes |= {"warmup_steps": 0, "warmup_ratio": cfg.train.warmup_steps}
    elif cfg.train.warmup_steps >= 1:
        changes["warmup_steps"] = int(cfg.train.warmup_steps)
    if cfg.data.streaming and "precompute_ref_log_probs" not in cfg.explicit:
        changes["precompute_ref_log_probs"] = False  # nobody knows yet of which rows
    if cfg.train.output_dir is None and cfg.model.model_name_or_path:
        model, method = str(cfg.model.model_name_or_path), cfg.tuning.finetuning_type
        changes["output_dir"] = default_output_dir(model, method, cfg.objective.stage)
    return cfg.replace(**changes, **switched(cfg), **_jobs(cfg), **_evaluation(cfg), **_online(cfg))


def with_length(cfg: RunConfig) -> RunConfig:
    """How far a model is stretched, which every verb has to find alike."""
    if not cfg.model.rope_scaling or cfg.model.rope_scaling_length:
        return cfg
    return cfg.replace(rope_scaling_length=cfg.data.cutoff_len)


def with_folder(cfg: RunConfig) -> RunConfig:
    """Adapters under the name of the folder in which they lie: from here on a name is all there is to know.

    Two slashes part the folder from a hub's repository; in a path they are one. A name that has the folder already is
    of a run's own record.
    """
    folder, names = cfg.model.adapter_folder, cfg.model.adapter_name_or_path
    if not folder or not names:
        return cfg
    end = f"//{folder}"
    return cfg.replace(adapter_name_or_path=[n if n.endswith(end) else n.rstrip("/") + end for n in names])


def with_one_rope(cfg: RunConfig) -> RunConfig:
    """What a training takes for a stretch that would read a row otherwise beside longer rows, and after them."""
    if cfg.model.rope_scaling != "dynamic":
        return cfg
    log.warning(
        "`rope_scaling: dynamic` would read a row otherwise beside a longer one: training takes `ntk` for it, the "
        "frequencies that it has at full length, for every row"
    )
    return cfg.replace(rope_scaling="ntk")


def _online(cfg: RunConfig) -> dict[str, Any]:
    """What unset keys mean to a stage that answers prompts itself."""
    if cfg.objective.stage not in ONLINE:
        return {}
    sampling = {key: value for key, value in SAMPLING.items() if key not in cfg.explicit}
    return {**sampling, **unset_values(cfg.objective.stage, cfg.online)}


def default_output_dir(model: str, finetuning_type: str, stage: str) -> str:
    """saves/<model>/<finetuning_type>/<stage>, where the studio and the guides look for runs."""
    name = PurePath(model.rstrip("/\\").replace("builtin:", "").replace("memory:", "")).name
    return f"saves/{name}/{finetuning_type}/{stage}"


def _jobs(cfg: RunConfig) -> dict[str, Any]:
    """Without any do_… key a run trains."""
    asked = cfg.train.do_eval or cfg.train.do_predict
    return {} if asked or "do_train" in cfg.explicit else {"do_train": True}


def _evaluation(cfg: RunConfig) -> dict[str, Any]:
    train, changes = cfg.train, {}
    if train.eval_strategy == "steps" and train.eval_steps is None:
        changes["eval_steps"] = train.logging_steps
    judged = cfg.objective.stage == "online_dpo" and cfg.online.judge  # it compares answers; an evaluation has one
    only_predicts = train.do_predict and not train.do_train
    held_out = (cfg.data.eval_dataset or cfg.data.val_size) and not judged and not only_predicts
    if train.eval_strategy != "no" or (held_out and "do_eval" not in cfg.explicit):
        changes["do_eval"] = True
    if _seeks_best(cfg):
        metric = train.metric_for_best_model or "loss"
        changes["metric_for_best_model"] = metric
        if train.greater_is_better is None:
            changes["greater_is_better"] = not metric.endswith(("loss", "perplexity", "kl", "kl/chosen"))
    return changes


def _seeks_best(cfg: RunConfig) -> bool:
    train = cfg.train
    return bool(train.load_best_model_at_end or train.early_stopping_steps or train.save_strategy == "best")


_INFERENCE_RULES = [MODEL, *QUANTISATION]


def check(cfg: RunConfig, place: Place, bad: set[str], *, training: bool) -> tuple[list[Problem], list[Problem]]:
    """All problems across keys, and those about keys without effect, which may be let pass.

    Rules that touch a key already found bad are left out: they would only repeat it.
    """
    problems = not_yet(cfg, place, training)
    if not training:
        return problems + broken(cfg, place, bad, _INFERENCE_RULES), []
    idle = _without_effect(cfg, place, bad) if _supported(cfg) else []
    return problems + broken(cfg, place, bad, RULES), idle + _of_other_verbs(cfg, place, bad)


def broken(cfg: RunConfig, place: Place, bad: set[str], rules: list[Rule]) -> list[Problem]:
    """The rules that a config breaks, with the places of their keys."""
    view = SimpleNamespace(explicit=cfg.explicit, **{key: cfg[key] for key in SECTION_OF})
    found = []
    for rule in rules:
        if not bad.intersection(rule.keys) and rule.broken(view):
            places = dict.fromkeys(filter(None, (place(key) for key in rule.keys if key in cfg.explicit)))
            found.append(Problem(rule.what, " and ".join(places) or None, fix=rule.fix))
    return found


def _supported(cfg: RunConfig) -> bool:
    return not any(LATER_VALUES[key].get(v, "unknown") for key in ("stage", "pref_loss") for v in _listed(cfg[key]))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def not_yet(cfg: RunConfig, place: Place, training: bool, acting: Collection[str] = ()) -> list[Problem]:
    """Keys and values that are known and not supported yet, and values that nobody knows; `acting` are supported."""
    found = []
    for key in sorted(cfg.explicit.difference(acting), key=list(SECTION_OF).index):
        if key in OTHER_VERBS if training else SECTION_OF[key] not in INFERENCE_SECTIONS:
            continue
        value = cfg[key]
        shown = f"`{key}: {_word(value)}`"
        unknown = [v for v in _listed(value) if v not in LATER_VALUES.get(key, ())]
        if key in ("stage", "pref_loss", "optim") and unknown:
            near = closest_choice(key, unknown[0])
            fix = f"did you mean {near}?" if near else None
            found.append(Problem(f"{shown} is unknown", place(key), "one of " + ", ".join(LATER_VALUES[key]), fix))
        elif instead := _instead(key, value):
            found.append(_later(f"{shown} is not supported yet", place(key), instead))
        elif key in LATER and value != default(key) and value not in (None, False, [], {}, 0):
            found.append(_later(f"`{key}` is not supported yet", place(key), LATER[key]))
    return found


def _instead(key: str, value: Any) -> str | None:
    values = LATER_VALUES.get(key, {})
    return next((values[_word(v)] for v in _listed(value) if values.get(_word(v))), None)


def _later(what: str, where: str | None, instead: str | None) -> Problem:
    return Problem(what, where, fix=alternative(instead or ""))


def _without_effect(cfg: RunConfig, place: Place, bad: set[str]) -> list[Problem]:
    """Keys the user set that do nothing with the chosen method (C6); quiet ones are only said."""
    found = []
    for key in sorted(cfg.explicit & ACTS_WITH.keys() - bad, key=list(SECTION_OF).index):
        condition = missing_condition(key, cfg)
        if condition is None or is_off(key, cfg[key]) or condition[0] in bad or key in LATER:
            continue
        other, _ = condition
        now = f"`{other}: {_word(cfg[other])}`" if cfg[other] not in (None, []) else f"no `{other}`"
        what = f"`{key}` has no effect with {now}"
        if key in QUIET or cfg.objective.stage in IDLE_WITH.get(key, ()):
            log.info("%s", what)
        else:
            found.append(Problem(what, place(key), fix=_how_to_act(cfg, key)))
    return found


def _how_to_act(cfg: RunConfig, key: str) -> str:
    acts = "it acts with " + " and ".join(condition_words(*needed) for needed in ACTS_WITH[key].items())
    unsaid = "stage" not in cfg.explicit and "dpo" in ACTS_WITH[key].get("stage", ())
    meant = "set stage: dpo, or " if unsaid and "not supported" not in acts else ""
    return f"{meant}drop it; {acts}"


def _of_other_verbs(cfg: RunConfig, place: Place, bad: set[str]) -> list[Problem]:
    """Keys the user set that this training does not read."""
    found = []
    for key in sorted(cfg.explicit & OTHER_VERBS.keys() - bad, key=list(SECTION_OF).index):
        verb = other_verb(key, cfg)
        if verb is None or is_off(key, cfg[key]):
            continue
        fix = f"set {IN_TRAINING[key]}" if key in IN_TRAINING else "drop it"
        found.append(Problem(f"`{key}` does nothing in training: it belongs to `trueup {verb}`", place(key), fix=fix))
    return found


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def say(cfg: RunConfig) -> None:
    """What is no error in a training, but should be known: what overrules what, and what does not act."""
    train, asked = cfg.train, _changed(cfg)
    _say_not_acting(cfg, asked)
    if not train.do_train:
        _say_idle(asked & STEPS)
        return
    if train.metric_for_best_model and not _seeks_best(cfg):
        log.info(
            "`metric_for_best_model` acts with load_best_model_at_end, early_stopping_steps or save_strategy: best"
        )
    if train.max_steps > 0 and "num_train_epochs" in cfg.explicit:
        log.info("`max_steps: %d` wins over `num_train_epochs`", train.max_steps)
    if train.resume_from_checkpoint and train.overwrite_output_dir:
        log.info("`resume_from_checkpoint` wins over `overwrite_output_dir`")
    if "do_eval" not in cfg.explicit and train.do_eval and train.eval_strategy == "no":
        log.info("held-out data is evaluated at the end; eval_strategy: steps shows it on the way")


def say_inference(cfg: RunConfig, words: Collection[str]) -> None:
    """The same for a verb that trains nothing. Its file may hold a whole run; `words`, the keys of its
    command line, are meant.
    """
    asked = _changed(cfg)
    _say_not_acting(cfg, {key for key in asked if SECTION_OF[key] == "model"})
    _say_idle(asked & set(words) - _READ_BY_INFERENCE)


def _changed(cfg: RunConfig) -> set[str]:
    """What the user set to something other than what happens anyway."""
    return {key for key in cfg.explicit if cfg[key] != default(key)}


def _say_not_acting(cfg: RunConfig, asked: Collection[str]) -> None:
    idle = [key for key in SECTION_OF if key in asked and key in NOT_ACTING_YET]
    if plain := [key for key in idle if not NOT_ACTING_YET[key]]:
        log.info("accepted, without effect so far: %s", ", ".join(plain))
    for key in idle:
        if NOT_ACTING_YET[key]:
            log.info("`%s: %s` has no effect: %s", key, _word(cfg[key]), NOT_ACTING_YET[key])


def _say_idle(keys: Collection[str]) -> None:
    if keys:
        log.info("nothing is trained, so these have no effect: %s", ", ".join(k for k in SECTION_OF if k in keys))
