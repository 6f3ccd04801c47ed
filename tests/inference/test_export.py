"""What `trueup export` writes, judged by plain transformers and peft; what may go wrong (T18)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.data.tiny_tokenizers import make_tokenizer
from tests.models.tiny import tiny_model
from tests.recipes.conftest import CHATML
from trueup.config.load import load_config
from trueup.errors import ConfigError, ModelError, ResourceError, UserError
from trueup.inference.export import export as exporting
from trueup.inference.export import plan as planning
from trueup.inference.export import stage as staging
from trueup.inference.export.export import Exported, export

ROWS = torch.arange(3, 60)[None]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tied model in fp32 with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("base") / "tiny"
    save_base(directory)
    return directory


def save_base(directory: Path, **config) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    tiny_model("qwen2", vocab_size=len(tokenizer) + 4, **config).save_pretrained(directory)


def adapter(base: Path, directory: Path, seed: int = 1, grow: int = 0, **lora) -> Path:
    """An adapter as peft writes it, of random weights that matter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow, mean_resizing=False)
    attached = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **lora}))
    torch.manual_seed(seed)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    attached.save_pretrained(directory, save_embedding_layers=False)
    return directory


def run(target: Path, **keys) -> Exported:
    return export(load_config(None, keys={"export_dir": str(target), **keys}, verb="export"))


def wrong(target: Path, **keys) -> UserError:
    """What an export is refused for, once it is seen that nothing was written."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run(target, **keys)
    assert sorted(path.name for path in target.parent.iterdir()) == before
    return caught.value


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=ROWS).logits


def written(directory: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def by_peft(base: Path, *adapters: Path) -> torch.Tensor:
    """Base and adapter beside one another, as peft itself loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, adapters[0]))


# --- merged = base + adapter ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"r": 8, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["plain", "rslora", "patterns", "dora", "pissa", "tied-whole", "tied-head", "tied-embeddings"],
)
def test_what_is_written_is_base_and_adapter(base: Path, tmp_path: Path, lora: dict):
    trained = adapter(base, tmp_path / "adapter", **lora)
    done = run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(trained))
    expected = by_peft(base, trained)
    assert torch.allclose(written(tmp_path / "out"), expected, atol=1e-4 * float(expected.abs().max()))
    assert done.differences["model"].within(1e-4)
    report = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert report["largest_logit_difference"]["model"]["largest"] == done.differences["model"].largest


def test_tied_embeddings_stay_tied_where_nothing_parts_them(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path / "adapter")
    run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(trained))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_an_adapter_trained_after_tokens_were_added_brings_their_rows(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path / "adapter", grow=6, modules_to_save=["embed_tokens", "lm_head"])
    done = run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(trained))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained(base).config.vocab_size + 6
    assert done.differences["model"].within(1e-4)


def test_a_directory_with_an_adapter_alone_is_enough(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path / "adapter")
    run(tmp_path / "out", model_name_or_path=str(trained))
    assert torch.allclose(written(tmp_path / "out"), by_peft(base, trained), atol=1e-3)


def test_what_is_written_talks_as_the_run_did(base: Path, tmp_path: Path):
    run(tmp_path / "out", model_name_or_path=str(base))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in settings["eos_token_id"]


# --- several adapters --------------------------------------------------------------------------------


def test_several_adapters_add_up(base: Path, tmp_path: Path):
    one, other = adapter(base, tmp_path / "a"), adapter(base, tmp_path / "b", seed=2, r=8, target_modules=["up_proj"])
    names = f"{one},{other}"
    run(tmp_path / "sum", model_name_or_path=str(base), adapter_name_or_path=names)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one)
    model = peft.PeftModel.from_pretrained(model.merge_and_unload(), other)
    assert torch.allclose(written(tmp_path / "sum"), logits(model), atol=1e-3)
    run(tmp_path / "w", model_name_or_path=str(base), adapter_name_or_path=names, merge_weights="1,0")
    assert torch.allclose(written(tmp_path / "w"), by_peft(base, one), atol=1e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "svd"])
def test_other_ways_to_combine_are_pefts(base: Path, tmp_path: Path, method: str):
    one, other = adapter(base, tmp_path / "a"), adapter(base, tmp_path / "b", seed=2)
    density = {} if method in ("linear", "svd") else {"density": 0.6}
    run(
        tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=f"{one},{other}", seed=5,
        merge_method=method, merge_weights="0.7,0.4", **{f"merge_{key}": value for key, value in density.items()},
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, adapter_name="a")
    model.load_adapter(other, "b")
    torch.manual_seed(5)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=method, **density)
    model.set_adapter("both")
    expected = logits(model)
    assert torch.allclose(written(tmp_path / "out"), expected, atol=1e-3 * float(expected.abs().max()))


def test_rslora_is_scaled_once(base: Path, tmp_path: Path):
    """peft scales what it has combined once more where the first adapter is rank-stabilised."""
    one = adapter(base, tmp_path / "a", use_rslora=True)
    run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=f"{one},{one}", merge_weights="0.5,0.5")
    assert torch.allclose(written(tmp_path / "out"), by_peft(base, one), atol=1e-3)


# --- formats ---------------------------------------------------------------------------------------


def test_weights_are_rounded_once_and_files_are_no_larger_than_asked(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path / "adapter")
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": str(trained)}
    run(tmp_path / "full", **keys)
    done = run(tmp_path / "out", **keys, infer_dtype="bf16", export_size=0.00003)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).state_dict()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(file.get_tensor(name), full[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert 0 < done.differences["model"].relative < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_by_bitsandbytes_and_read_back(tmp_path: Path, bits: int):
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "wide"
    save_base(base, hidden_size=64, intermediate_size=128)
    done = run(tmp_path / "out", model_name_or_path=str(base), export_quantization_bit=bits)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"][f"load_in_{bits}bit"] is True
    assert done.differences["model before quantising"].within(1e-4)
    assert 0 < done.differences["quantised model"].relative < 1
    assert not list((tmp_path / "out").glob(".*"))
    again = run(tmp_path / "again", model_name_or_path=str(tmp_path / "out"))  # in full, as rounded as it is
    assert again.differences["model"].within(1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))


def finds(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    """Of the libraries that write formats only these are installed."""
    wanted = {module for module, _ in planning.LIBRARIES.values()} | {"gguf"}
    find = planning.importlib.util.find_spec

    def found(name: str, package: str | None = None):
        return (object() if name in present else None) if name in wanted else find(name, package)

    monkeypatch.setattr(planning.importlib.util, "find_spec", found)


def test_gptq_and_awq_are_called_as_they_are_documented(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for the libraries: the first argument of every call, and what they look at."""
    calls = []
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Hello there, how are you today?"}\n' * 3, encoding="utf-8")

    class Loaded:
        tokenizer = AutoTokenizer.from_pretrained(base)

        def quantize(self, rows):
            calls.append(("quantize", rows))

        def save(self, target):
            tiny_model("qwen2", vocab_size=len(self.tokenizer) + 4).save_pretrained(target)

    def load(source, config):
        assert (Path(source) / "model.safetensors").is_file()
        calls.append(("load", config))
        return Loaded()

    def oneshot(*, model, dataset, recipe, output_dir, **how):
        calls.append(("oneshot", dataset["text"], how))
        tiny_model("qwen2", vocab_size=len(Loaded.tokenizer) + 4).save_pretrained(output_dir)

    def modifier(**how):
        return how

    modules = {
        "gptqmodel": {"GPTQModel": SimpleNamespace(load=load), "QuantizeConfig": lambda **how: how},
        "llmcompressor": {"oneshot": oneshot},
        "llmcompressor.modifiers.awq": {"AWQModifier": modifier},
        "llmcompressor.modifiers.quantization": {"QuantizationModifier": modifier},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    finds(monkeypatch, *modules)
    keys = {"model_name_or_path": str(base), "export_quantization_bit": 4, "export_quantization_dataset": str(rows)}
    keys |= {"export_quantization_nsamples": 2, "export_quantization_maxlen": 3}
    done = run(tmp_path / "gptq", **keys)
    assert calls[0] == ("load", {"bits": 4, "group_size": 128})
    assert [len(row["input_ids"]) for row in calls[1][1]] == [3, 3]
    assert done.facts["quantised"] == "4 bits by gptq" and "quantised model" in done.differences
    run(tmp_path / "awq", **keys, export_quantization_method="awq")
    name, texts, how = calls[2]
    assert list(texts) == ["Hello there, how are you today?"] * 2
    assert how == {"max_seq_length": 3, "num_calibration_samples": 2}


def test_a_library_that_is_missing_is_named_with_its_install_line(base: Path, tmp_path: Path, monkeypatch):
    finds(monkeypatch)
    error = wrong(
        tmp_path / "out", model_name_or_path=str(base), export_quantization_bit=4, export_gguf="f16",
        export_quantization_dataset="x.jsonl",
    )  # fmt: skip
    assert [problem.fix for problem in error.problems] == [
        "pip install 'trueup[gguf]'", "pip install 'trueup[gptq]'",
    ]  # fmt: skip


# --- reward models ----------------------------------------------------------------------------------


def test_a_reward_model_loads_in_plain_transformers(base: Path, tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    attached = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA))
    torch.manual_seed(0)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    attached.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(attached)
    done = run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(tmp_path / "adapter"))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 1 and found.config.pad_token_id is not None
    assert torch.allclose(logits(found), expected, atol=1e-4)
    assert done.differences["model"].agreement is None
    assert not (tmp_path / "out" / "Modelfile").exists()


# --- refused before weights are read ------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "load_beside", lambda *_: pytest.fail("weights were read"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("trueup.inference.export.push.get_token", lambda: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious", encoding="utf-8")
    one, other = adapter(base, tmp_path / "a"), adapter(base, tmp_path / "b", r=8)
    error = wrong(
        tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=f"{one},{other}", merge_method="ties",
        export_hub_model_id="me/model",
    )  # fmt: skip
    assert isinstance(error, ConfigError)
    assert [problem.where for problem in error.problems] == ["export_dir", "export_hub_model_id", "merge_method"]
    assert "overwrite_export_dir" in str(error) and "ties_svd" in str(error)


def test_a_base_that_is_quantised_for_good_is_refused(base: Path, tmp_path: Path):
    """Adapters cannot be folded into GPTQ's weights; of bitsandbytes' they can, which is tested above."""
    save_base(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trained = adapter(base, tmp_path / "adapter")
    error = wrong(
        tmp_path / "out", model_name_or_path=str(tmp_path / "packed"), adapter_name_or_path=str(trained)
    )  # fmt: skip
    assert "is quantised (gptq)" in str(error) and "the model that it was quantised from" in str(error)


def test_weights_that_a_format_cannot_hold_are_refused(base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "large")
    error = wrong(tmp_path / "out", model_name_or_path=str(tmp_path / "large"), infer_dtype="float16")
    assert "beyond float16's largest" in str(error) and "bfloat16" in error.problems[0].fix


def test_a_full_disk_is_seen_before_anything_is_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    error = wrong(tmp_path / "out", model_name_or_path=str(base))
    assert isinstance(error, ResourceError) and "GB left" in str(error)


def test_a_disk_that_fills_up_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRUEUP_FAULT_AT", "export:write:2:ENOSPC")
    assert isinstance(wrong(tmp_path / "out", model_name_or_path=str(base)), ResourceError)


def test_an_adapter_that_does_not_fit_leaves_nothing(base: Path, tmp_path: Path):
    save_base(tmp_path / "other", hidden_size=64)
    trained = adapter(tmp_path / "other", tmp_path / "adapter")
    error = wrong(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(trained))
    assert isinstance(error, ModelError) and "does not fit" in str(error)


def test_files_that_are_not_the_model_are_not_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The probe sees what a library gets wrong: here an export that writes another model."""
    read = exporting.load_written

    def other(*args):
        model = read(*args)
        next(model.parameters()).data[5] += 1
        return model

    monkeypatch.setattr(exporting, "load_written", other)
    assert "what was written is not what was folded" in str(wrong(tmp_path / "out", model_name_or_path=str(base)))


@pytest.mark.parametrize("point", [1, 2, 3])
def test_killed_in_the_middle_nothing_is_at_export_dir(base: Path, tmp_path: Path, point: int):
    command = [sys.executable, "-m", "trueup", "export", str(base), "--export_dir", str(tmp_path / "out")]
    environment = {**os.environ, "TRUEUP_FAULT_AT": f"export:write:{point}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1  # what was being written
    run(tmp_path / "out", model_name_or_path=str(base))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_is_moved_aside_when_asked(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious", encoding="utf-8")
    run(tmp_path / "out", model_name_or_path=str(base), overwrite_export_dir=True)
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "out")
    assert (kept / "mine.txt").read_text(encoding="utf-8") == "precious"
    assert not (tmp_path / "out" / "mine.txt").exists()


# --- the card, and the hub ------------------------------------------------------------------------------


def test_the_card_tells_of_the_run_and_nothing_of_the_machine(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path / "saves" / "dpo")
    (trained / "run.yaml").write_text(
        f"stage: dpo\ndataset: [{tmp_path}/pairs.jsonl, 'https://me:pass@host/rows.json?key=s3cret']\n"
        "pref_beta: 0.25\nhf_hub_token: hf_abcdefghijklmnop\n", encoding="utf-8",
    )  # fmt: skip
    (trained / "eval_results.json").write_text('{"eval_loss": 0.5, "eval_runtime": 3.0}', encoding="utf-8")
    run(tmp_path / "out", model_name_or_path=str(base), adapter_name_or_path=str(trained))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for told in ("preference optimisation", "`pairs.jsonl`", "https://host/rows.json", "| pref_beta | 0.25 |",
                 "| eval_loss | 0.5 |", "largest logit difference"):  # fmt: skip
        assert told in text
    everything = text + (tmp_path / "out" / "export.json").read_text(encoding="utf-8")
    for private in (str(tmp_path), "hf_abc", "s3cret", "pass", "runtime"):
        assert private not in everything


class Hub:
    """A stand-in for the hub's client, up to the network."""

    calls: list[tuple] = []
    refuses = False
    public = False

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create", name, private))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, **how):
        if self.refuses:
            raise ConnectionError("no route to host")
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    def repo_info(self, name):
        return SimpleNamespace(private=not self.public)


def test_pushed_to_a_private_repository_unless_told_otherwise(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("trueup.inference.export.push.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    keys = {"model_name_or_path": str(base), "export_hub_model_id": "me/model", "hf_hub_token": "hf_x"}
    run(tmp_path / "out", **keys)
    assert Hub.calls[:2] == [("token", "hf_x"), ("create", "me/model", True)]
    assert Hub.calls[2][2] == sorted(path.name for path in (tmp_path / "out").iterdir())
    run(tmp_path / "public", **keys, hub_private_repo=False)
    assert ("create", "me/model", False) in Hub.calls
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(ModelError, match="no route to host"):
        run(tmp_path / "kept", **keys)
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_nothing_private_goes_to_a_repository_that_is_public(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("trueup.inference.export.push.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "public", True)
    keys = {"model_name_or_path": str(base), "export_hub_model_id": "me/model", "hf_hub_token": "hf_x"}
    with pytest.raises(ModelError, match="is public; nothing was uploaded"):
        run(tmp_path / "out", **keys)
    assert [call[0] for call in Hub.calls] == ["token", "create"] and (tmp_path / "out" / "README.md").is_file()
    run(tmp_path / "public", **keys, hub_private_repo=False)
    assert Hub.calls[-1][0] == "upload"


def test_other_hubs_are_named_with_their_own_command(base: Path, tmp_path: Path):
    error = wrong(tmp_path / "out", model_name_or_path=str(base), export_hub_model_id="me/m", hub="modelscope")
    assert "modelscope upload" in str(error)
