"""`resize_vocab`: new tokens through whole runs, from their first rows to what is chatted with, served and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.tiny import tiny_model
from tests.recipes.conftest import labelled, pairs
from tests.recipes.test_adapter_matrix import STAGES, loaded_with, read_lines, starts_as_its_reference
from tests.recipes.test_equivalence import program_of, step
from trueup.config.load import load_config
from trueup.config.schema import RunConfig
from trueup.data.forest import BatchPlan
from trueup.errors import ConfigError, CorruptStateError, ModelError
from trueup.inference.export.export import export
from trueup.models.load import load_for_inference, load_policy, load_tokenizer
from trueup.models.tokenizer import UNCHANGED
from trueup.models.vocabulary import num_rows
from trueup.models.voices import BASE, Voices
from trueup.recipes.check import check
from trueup.recipes.offline import identity_of
from trueup.recipes.program import OfflineProgram
from trueup.recipes.references import live_reference
from trueup.recipes.run import run

Config = Callable[..., RunConfig]
NEW = ["<cold>", "<warm>", "<hot>"]
ADDED = {"add_tokens": "<cold>", "add_special_tokens": "<warm>,<hot>"}
GROWN = {**ADDED, "resize_vocab": True, "split_special_tokens": False}
OLD = 308  # tokens of the tiny tokenizer
ALL = OLD + len(NEW)
WHOLE = {"lora_rank": None, "finetuning_type": "full"}


@pytest.fixture(autouse=True)
def new_words(data_dir: Path) -> None:
    """Data that use the new tokens."""
    rows = [
        {**row, "instruction": f"{row['instruction']} {NEW[i % 3]}", "chosen": f"{NEW[i % 2]} {row['chosen']}",
         "rejected": f"{row['rejected']} {NEW[2]}"}
        for i, row in enumerate(pairs(21))
    ]  # fmt: skip
    for name, wanted in {"pairs": rows, "labels": labelled(rows)}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wanted)
        (data_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    chats = [{"instruction": row["instruction"], "output": row["chosen"]} for row in rows]
    (data_dir / "chats.json").write_text(json.dumps(chats, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def untied_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer over a Llama with a head of its own."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.save_pretrained(directory)
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0, std=0.1).save_pretrained(directory)
    assert len(tokenizer) == OLD
    return directory


def keys_of(stage: str, **more) -> dict:
    return {
        **STAGES[stage], **GROWN, "per_device_train_batch_size": 24, "max_steps": 3, "learning_rate": 3e-3,
        "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "plot_loss": False, **more,
    }  # fmt: skip


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    """Of a row of tokens with the last ones in it, the new ones among them."""
    last = num_rows(getattr(model, "base", None) or model)
    model = getattr(model, "model", model) if hasattr(model, "verify_layout") else model
    return model(input_ids=torch.tensor([[3, 4, last - 3, 5, last - 2, last - 1, 6]])).logits.float()


def trained_by(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits of the policy in memory at the end of a run."""
    seen, save = {}, OfflineProgram.save_model

    def spy(self: OfflineProgram, directory: Path, masters) -> None:
        save(self, directory, masters)
        training = self.policy.model.training
        self.policy.model.eval()
        if cfg.objective.stage != "rm":
            with self.policy.generating():
                seen["logits"] = logits_of(self.policy)
        self.policy.model.train(training)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineProgram, "save_model", spy)
        run(cfg)
    return seen.get("logits", torch.empty(0))


@pytest.mark.parametrize("stage, tied", [("dpo", True), ("dpo", False), ("rm", True)])
def test_new_rows_start_as_their_reference_learn_alone_and_resume(
    stage, tied, config: Config, tiny_dir, untied_dir, tmp_path, monkeypatch
):
    keys = keys_of(stage, model_name_or_path=str(tiny_dir if tied else untied_dir))
    starts_as_its_reference(config(**keys))
    first, again = tmp_path / "first", tmp_path / "again"
    trained = trained_by(config(**keys, output_dir=str(first)), monkeypatch)
    losses = [row["loss"] for row in read_lines(first / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=str(first / "checkpoint-2")))
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()

    saved = {key: tensor for key, tensor in load_file(first / name).items() if "lora" not in key}
    rows = [key for key in saved if key.endswith("token_adapter.trainable_tokens_delta")]
    assert len(rows) == (1 if tied or stage == "rm" else 2)
    assert all(len(saved[key]) == 3 for key in rows) and all(key in rows or "score" in key for key in saved)
    loaded = loaded_with(config(**keys), first)
    assert [loaded.tokenizer.encode(token, add_special_tokens=False) for token in NEW] == [[OLD], [OLD + 1], [OLD + 2]]
    if stage == "rm":
        return
    with loaded.policy.generating():
        torch.testing.assert_close(logits_of(loaded.policy), trained, atol=1e-4, rtol=1e-4)
    assert trained.shape[-1] == ALL


def test_plain_peft_and_plain_transformers_have_the_same_model(config: Config, untied_dir, tmp_path, monkeypatch):
    keys = keys_of("dpo", model_name_or_path=str(untied_dir), max_steps=2, save_strategy="no")
    trained = trained_by(config(**keys), monkeypatch)
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(untied_dir)
    base.resize_token_embeddings(len(tokenizer))
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, str(out))), trained, atol=1e-4, rtol=1e-4)

    written = {"model_name_or_path": str(out), "template": "chatml", "export_gguf": "f32"}
    done = export(load_config({**written, "export_dir": str(tmp_path / "merged")}, verb="export"))
    assert done.differences["gguf"].within(1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == num_rows(merged) == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-4, rtol=1e-4)


def test_only_new_rows_move(config: Config, untied_dir):
    """The rest of the matrices stands, also in the policy's log-probabilities of what never meets a new token."""
    program = program_of(config(**keys_of("sft", model_name_or_path=str(untied_dir))))
    names = [name for name in program.trainable if "lora" not in name]
    assert sorted(name.split(".")[-4] for name in names) == ["embed_tokens", "lm_head"]
    assert {tuple(program.trainable[name].shape) for name in names} == {(3, 32)}


@pytest.mark.parametrize("tied, live", [(True, True), (False, False)])
def test_all_weights_train_on_a_grown_base(tied, live, config: Config, tiny_dir, untied_dir, tmp_path):
    keys = keys_of("dpo", **WHOLE, model_name_or_path=str(tiny_dir if tied else untied_dir), max_steps=3)
    first, again = tmp_path / "first", tmp_path / "again"
    run(config(**keys, output_dir=str(first), precompute_ref_log_probs=not live))
    losses = [row for row in read_lines(first / "metrics.jsonl") if "loss" in row]
    assert abs(losses[0]["rewards/margins"]) < 1e-5
    checkpoint = str(first / "checkpoint-2")
    run(config(**keys, output_dir=str(again), resume_from_checkpoint=checkpoint, precompute_ref_log_probs=not live))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    saved = load_file(first / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape[0] == ALL and ("lm_head.weight" in saved) == (not tied)
    assert json.loads((first / "config.json").read_text(encoding="utf-8"))["vocab_size"] == ALL


def test_a_reference_of_its_own_reads_the_same_tokens(config: Config, tiny_dir, tmp_path):
    words = tmp_path / "words.yaml"
    words.write_text('"<hot>": "red fire"\n"<warm>": "sun"\n', encoding="utf-8")
    cfg = config(**keys_of("dpo"), ref_model=str(tiny_dir), new_special_tokens_config=str(words),
                 init_special_tokens="desc_init")  # fmt: skip
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, load_tokenizer(cfg.model))
    with loaded.policy.generating(), live_reference(cfg, loaded).policy.generating() as reference:
        torch.testing.assert_close(logits_of(loaded.policy), logits_of(reference), atol=1e-5, rtol=1e-5)


def test_a_next_stage_keeps_the_rows_and_adds_to_them(config: Config, untied_dir, tmp_path):
    """On top of the first adapter, continued, and continued with one token more; what is saved stands on the base."""
    base = {"model_name_or_path": str(untied_dir), "max_steps": 1, "save_strategy": "no"}
    run(config(**keys_of("sft", **base, output_dir=str(tmp_path / "sft"))))
    start = loaded_with(config(**base), tmp_path / "sft")
    next_stage = {**keys_of("dpo", **base), "adapter_name_or_path": str(tmp_path / "sft")}
    more = {**next_stage, "add_tokens": "<cold>,<icy>"}
    for name, keys in {"on top": {**next_stage, "create_new_adapter": True}, "on": next_stage, "more": more}.items():
        if name != "more":
            keys = {key: value for key, value in keys.items() if key not in GROWN}
        out = tmp_path / name
        program = program_of(config(**keys))
        _, metrics, _ = step(program)
        assert abs(metrics["rewards/margins"]) < 1e-6
        with program.policy.generating(), start.policy.generating():
            before, now = logits_of(start.policy), program.policy.model(
                input_ids=torch.tensor([[3, 4, OLD, 5, OLD + 1, OLD + 2, 6]])).logits.float()  # fmt: skip
        torch.testing.assert_close(now[..., :ALL], before, atol=1e-4, rtol=1e-4)
        program.save_model(out, {})
        saved = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["trainable_token_indices"]
        assert set(map(tuple, saved.values())) == {tuple(range(OLD, ALL + (name == "more")))}
        assert loaded_with(config(**base), out).policy.base.config.vocab_size == ALL + (name == "more")


def test_adapters_of_one_base_speak_with_rows_of_their_own(config: Config, untied_dir, tmp_path):
    """As a server has them: the run's last state, an earlier one, and the base; not on a base that lacks the rows."""
    run(config(**keys_of("dpo", model_name_or_path=str(untied_dir))))

    def spoken_by(*adapters: Path):
        cfg = config(model_name_or_path=str(untied_dir), adapter_name_or_path=[str(path) for path in adapters])
        return load_for_inference(cfg.model, cfg.train)

    def said(policy) -> torch.Tensor:
        with policy.generating():
            return logits_of(policy)

    last, earlier = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    policy = spoken_by(last)
    expected, voices = said(policy), Voices(policy)
    voices.add("earlier", [earlier])
    voices.use("earlier")
    torch.testing.assert_close(said(policy), said(spoken_by(earlier)))
    voices.use(BASE)
    assert not torch.equal(said(policy), expected)
    voices.use(None)
    assert torch.equal(said(policy), expected)
    with pytest.raises(ModelError, match="vocabulary"):
        Voices(spoken_by()).add("other", [last])


@pytest.mark.parametrize(
    "more", [{"finetuning_type": "oft", "lora_rank": None}, {"lora_target": "q_proj,embed_tokens"}]
)
def test_what_cannot_train_single_rows_trains_the_matrices_whole(more: dict, config: Config, untied_dir):
    keys = keys_of("sft", **{"model_name_or_path": str(untied_dir), **more})
    with pytest.raises(ModelError, match="additional_target: .*embed_tokens"):
        program_of(config(**keys))
    if "lora_target" not in more:
        trained = program_of(config(**keys, additional_target="embed_tokens,lm_head")).trainable
        assert {ALL} == {len(p) for name, p in trained.items() if "modules_to_save" in name}


def test_one_matrix_whole_and_the_rows_of_the_other(config: Config, untied_dir, tmp_path, monkeypatch):
    keys = keys_of("sft", model_name_or_path=str(untied_dir), additional_target="embed_tokens", max_steps=2)
    trained = trained_by(config(**keys), monkeypatch)
    loaded = loaded_with(config(**keys), tmp_path / "out")
    with loaded.policy.generating():
        torch.testing.assert_close(logits_of(loaded.policy), trained, atol=1e-4, rtol=1e-4)


def test_freeze_trains_embeddings_and_head_for_new_tokens(config: Config, untied_dir):
    keys = {"finetuning_type": "freeze", "lora_rank": None, "freeze_trainable_layers": 1}
    trained = program_of(config(**keys_of("sft", **keys, model_name_or_path=str(untied_dir)))).trainable
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(trained)


def test_spare_rows_are_used_as_they_are_or_started_and_trained(config: Config, tiny_dir, tmp_path, caplog):
    """A model with more rows than its tokenizer has tokens, as many are published."""
    directory = tmp_path / "padded"
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
    tiny_model("llama", vocab_size=336, eos_token_id=2, pad_token_id=0, std=0.1).save_pretrained(directory)
    keys = {**keys_of("sft", max_steps=2), "model_name_or_path": str(directory)}
    as_it_is = program_of(config(**{**keys, "resize_vocab": False}))
    assert not [name for name in as_it_is.trainable if "lora" not in name] and "<cold>" in caplog.text
    program = program_of(config(**keys))
    assert num_rows(program.policy.base) == 336
    before = AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings().weight
    weight = program.policy.base.get_input_embeddings().weight
    changed = [i for i in range(336) if not torch.equal(before[i], weight[i])]
    assert changed == [OLD, OLD + 1, OLD + 2]
    run(config(**keys))
    assert num_rows(loaded_with(config(**keys), tmp_path / "out").policy.base) == 336


def test_without_resize_vocab_more_tokens_than_rows_are_an_error_that_names_it(config: Config):
    for work in (program_of, check):
        with pytest.raises(ModelError, match="resize_vocab: true"):
            work(config(**ADDED))
    assert check(config(**keys_of("dpo"))).estimate.trainable > check(config(stage="dpo")).estimate.trainable


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", '"<a>": 3\n', "", '"<a>": "  "\n'])
def test_a_file_of_descriptions_that_describes_nothing_is_refused(text: str, config: Config, tmp_path):
    path = tmp_path / "words.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="words.yaml|new_special_tokens_config"):
        program_of(config(resize_vocab=True, new_special_tokens_config=str(path), init_special_tokens="desc_init"))


def test_edited_descriptions_are_another_experiment(config: Config, tmp_path):
    """Rows that a run started from its descriptions are in its reference: other words make another one."""
    words = tmp_path / "words.yaml"
    words.write_text('"<hot>": "red fire"\n"<warm>": "sun"\n', encoding="utf-8")
    keys = keys_of("dpo", new_special_tokens_config=str(words), init_special_tokens="desc_init")
    run(config(**keys, output_dir=str(tmp_path / "out")))
    again = {**keys, "output_dir": str(tmp_path / "again"), "max_steps": 3,
             "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}  # fmt: skip
    words.write_text('# a remark\n"<hot>":   red fire\n"<warm>": sun\n', encoding="utf-8")
    run(config(**again))
    words.write_text('"<hot>": "red fire"\n"<warm>": "rain"\n', encoding="utf-8")
    with pytest.raises(CorruptStateError, match="new_special_tokens_config") as refused:
        run(config(**{**again, "output_dir": str(tmp_path / "other")}))
    assert "another experiment" in str(refused.value) and "allow_changed: [new_special_tokens_config]" in str(
        refused.value
    )
    run(config(**{**again, "output_dir": str(tmp_path / "allowed")}, allow_changed="new_special_tokens_config"))


def test_words_that_start_no_row_may_change(config: Config, tmp_path):
    words = tmp_path / "words.yaml"
    cfg = config(**keys_of("dpo"), new_special_tokens_config=str(words))

    def identity() -> dict:
        return identity_of(cfg, "data", BatchPlan(np.zeros(4, dtype=np.int64), 1, 2, 0))

    words.write_text('"<hot>": "red fire"\n', encoding="utf-8")
    first = identity()
    words.write_text('"<hot>": "sun"\n', encoding="utf-8")
    assert identity() == first
    words.write_text('"<hot>": "sun"\n"<icy>": "ice"\n', encoding="utf-8")
    assert identity() != first


def test_descriptions_need_a_file_and_new_rows(config: Config, tmp_path):
    with pytest.raises(ConfigError, match="new_special_tokens_config"):
        config(**GROWN, init_special_tokens="desc_init")
    with pytest.raises(ConfigError, match="resize_vocab"):
        config(**ADDED, new_special_tokens_config=str(tmp_path / "words.yaml"))


def test_new_tokens_have_rows_where_a_model_only_answers(config: Config):
    cfg = config(**GROWN)
    policy = load_for_inference(cfg.model, cfg.train)
    assert num_rows(policy.base) == len(load_tokenizer(cfg.model)) == ALL


def test_what_changes_the_policy_leaves_other_models_as_they_are(config: Config, tiny_dir: Path):
    """A reward model's tokenizer, and whatever else is loaded beside the policy."""
    changed = config(**GROWN).model
    plain = changed.model_copy(update={**UNCHANGED, "model_name_or_path": str(tiny_dir)})
    assert len(load_tokenizer(changed)) == ALL and len(load_tokenizer(plain)) == OLD
    assert num_rows(load_for_inference(plain, config().train).base) == OLD
