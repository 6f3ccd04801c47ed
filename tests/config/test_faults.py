"""Rows C1 to C6 and C15 of the fault catalogue: the message, the place, exit code 2."""

from __future__ import annotations

import pytest

from trueup.config.load import load_config
from trueup.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d"}


def problems(source=None, *words, **how):
    with pytest.raises(ConfigError) as caught:
        load_config(source, words, **how)
    assert caught.value.exit_code == 2
    return caught.value.problems


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_unknown_key_has_its_line_and_the_nearest_key(tmp_path):
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\n\nleraning_rate: 1e-5\n")
    (problem,) = problems(path)
    assert str(problem) == (f"{path}:4: unknown key 'leraning_rate'; did you mean 'learning_rate'?")


def test_unknown_key_near_a_synonym_names_the_canonical_key():
    assert "did you mean 'pref_beta'?" in problems(BASE, "--dpo_bata", "0.1")[0].what


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("learning_rate", "no", "a number"),
        ("learning_rate", True, "a number"),
        ("lora_rank", "eight", "a whole number"),
        ("lora_rank", 2.5, "a whole number"),
        ("bf16", "maybe", "true or false"),
        ("stage", "dpoo", "one of pt, sft, dpo"),
        ("eval_strategy", "step", "one of no, steps, epoch"),
        ("report_to", "wandbb", "one of all, tensorboard"),
        ("lr_scheduler_type", "cosin", "one of linear, cosine"),
        ("optim", "adamv", "one of adamw_torch"),
        ("device", "gpu", "auto, cpu, cuda, cuda:N or mps"),
        ("run_name", ["a"], "text"),
        ("lr_scheduler_kwargs", 3, "a mapping"),
        ("learning_rate", "nan", "greater than 0"),
        ("learning_rate", "inf", "a finite number"),
    ],
)
def test_wrong_type_or_word_names_key_value_and_what_was_expected(key, value, said):
    (problem,) = problems({**BASE, key: value})
    assert f"`{key}" in problem.what and said in (problem.expected or "")


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("seed: 1\nseed: 2\n", 2, "given twice"),
        ("seed: 1\n\tdataset: d\n", 2, "tab used for indentation"),
        ("seed: [1, 2\nx: 1", 2, "not YAML"),
        ("seed: !!python/object:os.system x\n", 1, "tag"),
        ("a: &a [1]\nb: *c\n", 2, "not YAML"),
        ("- a\n- b\n", 1, "`key: value`"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", 1, "given twice"),
        ("? [a, b]\n: 1\n", 1, "a key is one word"),
    ],
)
def test_broken_yaml_has_its_line(tmp_path, text, line, said):
    path = write(tmp_path, text)
    first = problems(path)[0]
    assert first.where.startswith(f"{path}:{line}") and said in first.what


def test_anchor_bombs_end_quickly(tmp_path):
    levels = "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 30))
    path = write(tmp_path, f"k0: &k0 [x]\n{levels}\n")
    assert "aliases" in problems(path)[0].what
    loop = write(tmp_path, "lr_scheduler_kwargs: &a {b: *a}\n")
    assert "levels" in problems(loop)[0].what
    deep = write(tmp_path, "dataset: " + "[" * 5000)
    assert problems(deep)


def test_files_that_are_no_config(tmp_path):
    assert "no such config file" in problems(tmp_path / "absent.yaml")[0].what
    (tmp_path / "big.yaml").write_text("a: " + "x" * 1_000_001)
    assert "bytes" in problems(tmp_path / "big.yaml")[0].what
    (tmp_path / "latin.yaml").write_bytes("dataset: dé".encode("latin-1"))
    assert "not UTF-8" in problems(tmp_path / "latin.yaml")[0].what
    (tmp_path / "c.json").write_text('{"seed": 1,}')
    assert problems(tmp_path / "c.json")[0].where.startswith(f"{tmp_path}/c.json:1")
    (tmp_path / "d.json").write_text('{"seed": 1,\n"seed": 2}')
    assert problems(tmp_path / "d.json")[0].where == f"{tmp_path}/d.json:2"


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"bf16": True, "fp16": True}, ("`bf16`", "`fp16`")),
        ({"load_in_4bit": True, "finetuning_type": "full"}, ("`quantization_bit`", "full")),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, ("`warmup_steps`", "`warmup_ratio`")),
        ({"new_run": True, "overwrite": True}, ("`new_run`", "`overwrite_output_dir`")),
        ({"resume": True, "new_run": True}, ("`resume_from_checkpoint`", "`new_run`")),
        ({"load_best_model_at_end": True}, ("evaluations",)),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 30},
            ("multiple",),
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            ("save_strategy", "eval_strategy"),
        ),
        ({"early_stopping_steps": 3}, ("evaluations",)),
        ({"val_size": 0.1, "eval_dataset": "e"}, ("`val_size`", "`eval_dataset`")),
        ({"use_galore": True, "use_muon": True, "finetuning_type": "full"}, ("one optimizer",)),
        ({"use_galore": True, "optim": "lion_8bit", "finetuning_type": "full"}, ("one optimizer",)),
        ({"use_galore": True}, ("adapters are small",)),
        ({"use_galore": True, "optim_args": "rank=3", "finetuning_type": "full"}, ("`optim_args`",)),
        ({"optim": "sgd", "optim_args": "rank=3"}, ("`optim_args`",)),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "cosine"}, ("schedule-free",)),
        ({"optim": "schedule_free_radam", "warmup_ratio": 0.1}, ("warms up by itself",)),
        ({"layer_lr_decay": 1.5}, ("`layer_lr_decay`",)),
        ({"lr_multipliers": {"embed": "much"}}, ("`lr_multipliers`",)),
        ({"use_cpu": True, "device": "cuda"}, ("`device`",)),
        ({"interleave_probs": "1,2", "mix_strategy": "interleave_over", "dataset": "a,b,c"},
         ("`interleave_probs`",)),
        ({"do_train": False}, ("nothing to do",)),
        ({"dpo_beta": 0.1, "pref_beta": 0.2, "stage": "dpo"}, ("`dpo_beta`", "`pref_beta`")),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(keys, said):
    found = problems({**BASE, **keys})
    assert any(all(word in p.what for word in said) and p.fix for p in found), found


def test_exclusive_options_name_both_places(tmp_path):
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\nbf16: true\n")
    (problem,) = problems(path, "--fp16")
    assert problem.where == f"{path}:3 and --fp16"


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("pref_beta", 0, "greater than 0"),
        ("pref_beta", -0.1, "greater than 0"),
        ("dpo_label_smoothing", 0.5, "less than 0.5"),
        ("dpo_label_smoothing", -0.1, "at least 0"),
        ("learning_rate", 0, "greater than 0"),
        ("per_device_train_batch_size", 0, "greater than 0"),
        ("lora_dropout", 1, "less than 1"),
        ("max_steps", -2, "at least -1"),
        ("top_p", 1.5, "at most 1"),
        ("cutoff_len", 2, "at least 8"),
        ("val_size", -1, "at least 0"),
    ],
)
def test_out_of_range_names_the_range(key, value, expected):
    (problem,) = problems({**BASE, "stage": "dpo", key: value})
    assert problem.what == f"`{key}` cannot be {value!r}" and problem.expected.startswith(expected)


def test_a_bad_value_under_a_synonym_shows_both_names():
    assert problems({**BASE, "stage": "dpo"}, "--dpo_beta", "0")[0].what.startswith("`dpo_beta` (`pref_beta`)")


def test_missing_keys_are_named():
    assert {p.what for p in problems({})} == {
        "`model_name_or_path` is missing",
        "`dataset` is missing",
    }
    (problem,) = problems({}, verb="infer")
    assert "model_name_or_path" in problem.what


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"stage": "dpo", "simpo_gamma": 0.5}, ("simpo_gamma", "`pref_loss: sigmoid`")),
        ({"stage": "sft", "pref_beta": 0.1}, ("pref_beta", "`stage: sft`")),
        ({"stage": "pt", "mask_history": True}, ("mask_history", "`stage: pt`")),
        ({"stage": "dpo", "train_on_prompt": True}, ("train_on_prompt", "`stage: dpo`")),
        ({"finetuning_type": "full", "lora_rank": 8}, ("lora_rank", "`finetuning_type: full`")),
        ({"freeze_trainable_layers": 2}, ("freeze_trainable_layers", "`finetuning_type: lora`")),
        ({"stage": "dpo", "ref_model_adapters": "a"}, ("ref_model_adapters", "no `ref_model`")),
        ({"stage": "dpo", "kto_chosen_weight": 2.0}, ("kto_chosen_weight", "`stage: dpo`")),
        ({"ref_model": "r"}, ("ref_model", "`stage: sft`")),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_an_error(keys, what):
    (problem,) = problems({**BASE, **keys})
    key, now = what
    assert problem.what == f"`{key}` has no effect with {now}" and "it acts with" in problem.fix


def test_the_way_out_names_only_what_there_is():
    def fix(**keys):
        return problems({**BASE, **keys})[0].fix

    losses = "`pref_loss: sigmoid | robust | hinge | ipo | ipo_sum | …`"
    stages = "`stage: dpo | kto | orpo | simpo | cpo | …`"
    assert fix(pref_beta=0.1) == f"set stage: dpo, or drop it; it acts with {stages} and {losses}"
    assert fix(pref_beta=0.1, stage="sft") == f"drop it; it acts with {stages} and {losses}"
    assert fix(kto_chosen_weight=2.0).startswith("drop it; it acts with `stage: kto`")
    assert fix(simpo_gamma=1.0, stage="dpo").endswith("`pref_loss: simpo | alphapo`")
    assert fix(optim="lomo").startswith("use adafactor")
    assert fix(push_to_hub=True) == "upload output_dir with the hub's own tool"


@pytest.mark.parametrize(
    "key, value, verb, fix",
    [
        ("batch_size", 4, "eval", "set per_device_train_batch_size"),
        ("save_dir", "saves/x", "eval", "set output_dir"),
        ("task", "mmlu_test", "eval", "drop it"),
        ("temperature", 0.5, "chat", "drop it"),
        ("infer_backend", "vllm", "chat", "drop it"),
        ("export_dir", "out", "export", "drop it"),
    ],
)
def test_a_key_of_another_verb_is_an_error_in_training(key, value, verb, fix):
    (problem,) = problems({**BASE, key: value})
    assert problem.what == f"`{key}` does nothing in training: it belongs to `trueup {verb}`"
    assert problem.fix == fix


def test_pickled_exports_are_refused_by_every_verb():
    for verb in ("train", "infer"):
        (problem,) = problems({**BASE, "export_legacy_format": True}, verb=verb)
        assert "never pickled" in problem.what


def test_values_that_would_change_something_are_refused_until_they_do():
    schedule = problems({**BASE, "lr_scheduler_type": "greedy"})[0]
    assert "`lr_scheduler_type: greedy` is not supported yet" in schedule.what
    assert "`infer_dtype` is" in problems({**BASE, "infer_dtype": "float16"}, verb="infer")[0].what


def test_keys_without_effect_are_said_once_with_what_happens_instead(caplog):
    with caplog.at_level("INFO", "trueup"):
        load_config({**BASE, "tf32": True, "dataloader_num_workers": 4, "dataloader_pin_memory": True})
    assert [r.message for r in caplog.records] == [
        "accepted, without effect so far: dataloader_num_workers",
        "`tf32: true` has no effect: products of fp32 numbers stay exact; bf16 is the fast format",
    ]


def test_what_only_training_reads_is_said_where_nothing_is_trained(caplog):
    with caplog.at_level("INFO", "trueup"):
        load_config({**BASE, "seed": 1, "save_steps": 9}, ["learning_rate=1e-5"], verb="infer")
        load_config({**BASE, "do_train": False, "do_eval": True, "save_steps": 9})
    assert [r.message for r in caplog.records] == [
        "nothing is trained, so these have no effect: learning_rate",
        "nothing is trained, so these have no effect: save_steps",
    ]


def test_options_set_to_off_are_no_error():
    off = {"stage": "sft", "pref_ftx": 0.0, "ppo_score_norm": False, "mask_history": False,
           "ref_model": None, "use_galore": False, "ld_alpha": None}  # fmt: skip
    assert load_config({**BASE, **off, "stage": "pt"})


def test_unused_keys_can_be_let_pass(caplog, monkeypatch):
    keys = {**BASE, "simpo_gamma": 0.5, "no_such_thing": 1}
    assert len(problems(keys)) == 2
    assert load_config({**keys, "on_unused_keys": "warn"})
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert load_config(keys)


def test_keys_of_the_schedule_without_effect_are_only_said(caplog):
    with caplog.at_level("INFO", "trueup"):
        load_config({**BASE, "eval_steps": 10})
    assert "`eval_steps` has no effect with `eval_strategy: no`" in caplog.text


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path):
    path = write(
        tmp_path,
        "stage: dpo\ndataset: d\nleraning_rate: 1\npref_beta: 0\nbf16: true\nfp16: true\n"
        "use_galore: true\nimage_max_pixels: 1\n",
    )
    found = problems(path, "--lora_rank", "x", "stray")
    assert [p.where for p in found] == [
        f"{path}:3", f"{path}:4", f"{path}:5 and {path}:6", f"{path}:7", f"{path}:8",
        "--lora_rank", None, None,
    ]  # fmt: skip


def test_a_bad_value_is_not_reported_twice():
    assert len(problems({**BASE, "load_best_model_at_end": True, "eval_strategy": "x"})) == 1


def test_words_that_are_no_keys():
    assert "'stray' is no key" in problems(BASE, "stray")[0].what
    assert problems(BASE, "saves/mistyped")[0].what == "there is no file or directory saves/mistyped"
    assert problems(BASE, "--seed")[0].what == "a value is missing"
    assert problems(BASE, "--seed", "--plot_loss")[0].where == "--seed"


def test_an_unknown_word_is_reported_as_such_with_or_without_a_value():
    for words in (["--plot_los"], ["--plot_los", "--seed", "1"], ["--plot_los", "true"]):
        (problem,) = problems(BASE, *words)
        assert "did you mean 'plot_loss'?" in problem.what and problem.where == "--plot_los"
    (problem,) = problems(BASE, "--image_max_pixels", "1024")
    assert "text only" in problem.what


def test_resuming_wins_over_overwriting(caplog):
    with caplog.at_level("INFO", "trueup"):
        assert load_config({**BASE, "overwrite_output_dir": True}, ["--resume"])
    assert "`resume_from_checkpoint` wins" in caplog.text


def test_tokens_are_never_shown():
    (problem,) = problems({**BASE, "hf_hub_token": ["hf_secret"]})
    assert "hf_secret" not in str(problem)
