"""GGUF files, judged by who reads them: transformers' own reader, and llama.cpp where it is installed."""

from __future__ import annotations

import json
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.data.tiny_tokenizers import TEXTS, make_tokenizer
from tests.models.tiny import tiny_model
from tests.recipes.conftest import CHATML
from trueup.config.load import load_config
from trueup.errors import UserError
from trueup.inference.export.export import Exported, export

gguf = pytest.importorskip("gguf")

from trueup.inference.export import gguf_file  # noqa: E402

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
TRICKY = [
    *TEXTS[:7], "naïve café 123456 3.14", "  two  spaces ", "<|im_start|>user\nx<|im_end|>\n", "\n\n\n", "🙂好，世界",
    "don't I'LL we've", "a\r\nb\tc", "</s><s>[INST]", "x" * 90,
]  # fmt: skip


def save(directory: Path, model: str, tokenizer: PreTrainedTokenizerFast | None = None, **config) -> Path:
    tokenizer = tokenizer or make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    tokenizer.save_pretrained(directory)
    # The special tokens' ids of the tokenizer, as every published model's config has them.
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = {"vocab_size": len(tokenizer) + 5, "hidden_size": 64, "intermediate_size": 96, **ids}
    tiny_model(model, **{**sizes, **config}).save_pretrained(directory)
    return directory


def run(base: Path, target: Path, kind: str = "f32") -> Exported:
    keys = {"model_name_or_path": str(base), "export_dir": str(target), "export_gguf": kind}
    return export(load_config(None, keys=keys, verb="export"))


def file_of(directory: Path) -> Path:
    (path,) = directory.glob("*.gguf")
    return path


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_another_reader_finds_the_same_model(name: str, tmp_path: Path):
    architecture, config = MODELS[name]
    base = save(tmp_path / "base", architecture, **config)
    done = run(base, tmp_path / "out")
    assert done.differences["gguf"].within(1e-5) and done.differences["gguf"].agreement == 1.0
    assert file_of(tmp_path / "out").name == "out-f32.gguf"


@pytest.mark.parametrize(("kind", "share"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.0045)])
def test_weights_read_back_are_the_models_within_the_formats_rounding(kind: str, share: float, tmp_path: Path):
    base = save(tmp_path / "base", "qwen2")
    done = run(base, tmp_path / "out", kind)
    assert done.facts["gguf"] == kind
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=file_of(tmp_path / "out").name, dtype=torch.float32
    ).state_dict()
    for key, weight in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict().items():
        allowed = (share if weight.dim() > 1 else 0.0) * weight.abs().max() + 1e-6 * (share > 0)
        assert (read[key] - weight).abs().max() <= allowed, key


def test_a_file_that_holds_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save(tmp_path / "base", "llama")
    monkeypatch.setattr(gguf_file, "interleaved", lambda weight, heads: weight.flip(0))
    write = gguf_file.write_gguf

    def wrongly(path, model, about):
        write(path, model, about)
        monkeypatch.undo()

    monkeypatch.setattr(gguf_file, "write_gguf", wrongly)
    with pytest.raises(UserError, match="attn_q.weight in the GGUF file is"):
        run(base, tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen", "llama2"])
def test_another_reader_finds_the_same_tokens(family: str, tmp_path: Path):
    kind = "sentencepiece" if family == "llama2" else "byte_level"
    base = save(tmp_path / "base", "llama" if family == "llama2" else "qwen2", tokenizer(family, kind))
    run(base, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(base)
    fields = gguf.GGUFReader(file_of(tmp_path / "out")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens[index] for index in range(len(ours))] == ours.convert_ids_to_tokens(list(range(len(ours))))
    assert len(tokens) == len(ours) + 5 and fields["tokenizer.ggml.eos_token_id"].contents() is not None
    assert fields["tokenizer.chat_template"].contents() == CHATML
    if kind == "byte_level":
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file_of(tmp_path / "out").name)
        for text in TRICKY:
            assert theirs(text).input_ids == ours(text).input_ids, text


def tokenizer(family: str, kind: str) -> PreTrainedTokenizerFast:
    """Of a kind; sentencepiece's merges are those that its vocabulary allows, each, as a real one's are."""
    made = make_tokenizer(family, kind)
    if kind == "byte_level":
        return made
    state = json.loads(made.backend_tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
    rank = {left + right: number for number, (left, right) in reversed(list(enumerate(merges)))}
    pairs = [
        (rank[token], (token[:cut], token[cut:]))
        for token in rank
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    state["model"]["merges"] = [list(pair) for _, pair in sorted(pairs)]
    special = {"bos_token": made.bos_token, "eos_token": made.eos_token, "unk_token": made.unk_token}
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)


# --- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config", "kind", "said"),
    [
        ("gemma", {}, "f16", "gemma is no architecture that is written as GGUF here"),
        ("mistral", {"sliding_window": 8}, "f16", "attends to a window of 8 tokens"),
        ("llama", {"mlp_bias": True}, "f16", "no biases in its MLP"),
        ("llama", {"hidden_act": "gelu"}, "f16", "computes with silu, and this model with gelu"),
        ("qwen2", {"intermediate_size": 72}, "q8_0", "blocks of 32"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "f16", "dynamic"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_weights(
    architecture: str, config: dict, kind: str, said: str, tmp_path: Path
):
    base = save(tmp_path / "base", architecture, **config)
    with pytest.raises(UserError) as caught:
        run(base, tmp_path / "out", kind)
    assert said in str(caught.value) and caught.value.problems[0].where == "export_gguf"
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_no_file_can_describe_is_refused(tmp_path: Path):
    base = save(tmp_path / "base", "llama", make_tokenizer("llama2", "sentencepiece"))
    with pytest.raises(UserError, match="its merges are no sentencepiece vocabulary's"):
        run(base, tmp_path / "out")


def test_weights_beyond_f16_are_refused(tmp_path: Path):
    base = save(tmp_path / "base", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(base)
    with pytest.raises(UserError, match="beyond f16's largest"):
        run(base, tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- llama.cpp itself ------------------------------------------------------------------------------


@contextmanager
def llama_cpp(path: Path):
    """Asks llama.cpp's server, in this process: path, body → what it answers."""
    library = pytest.importorskip("xllamacpp")
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(path), 512, 1, 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = library.Server(params)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(route: str, **body):
        request = urllib.request.Request(
            server.listening_address + route, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with direct.open(request, timeout=60) as response:
            return json.loads(response.read())

    yield ask


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_the_same_tokens_and_computes_the_same(name: str, tmp_path: Path):
    architecture, config = MODELS[name]
    spoken = tokenizer("llama2", "sentencepiece") if name == "mistral" else None
    base = save(tmp_path / "base", architecture, spoken, **config)
    run(base, tmp_path / "out")
    ours, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    with llama_cpp(file_of(tmp_path / "out")) as ask:
        for text in TRICKY:
            found = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert found == ours(text).input_ids, text
        ids = list(range(5, 120))  # longer than where Llama 3's positions are stretched
        said = ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=5)["completion_probabilities"][0]
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    for top in said["top_logprobs"]:
        assert top["logprob"] == pytest.approx(float(logps[top["id"]]), abs=2e-2)  # it keeps keys and values in f16
