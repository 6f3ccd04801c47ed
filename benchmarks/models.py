"""Model directories that every tool loads: random bf16 weights in the shapes of Qwen 2.5, and the built-in tiny model.

The tokenizer is Qwen's own vocabulary, which the package `dashscope` carries; no model hub is asked. The chat
template is ChatML without line breaks between turns, so that an answer ends with the token that all tools train
last: with the usual line break behind it some train one token more per answer than others.

`python -m benchmarks.models SHAPE` makes one directory and prints its path.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import HOME, Failed, ask

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True
    hybrid: bool = False  # three layers of four have linear attention (Qwen3.5's text model)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, without embeddings and head."""
        keys = self.hidden * self.kv_heads // self.heads
        return self.layers * (self.hidden * (2 * self.hidden + 2 * keys) + 3 * self.hidden * self.intermediate)

    def config(self) -> dict:
        """Arguments of Qwen2Config, or of Qwen3_5TextConfig."""
        state = self.hidden // 64  # heads of the linear layers, 64 wide
        linear = {
            "head_dim": self.hidden // self.heads, "linear_num_key_heads": state, "linear_num_value_heads": state,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        }  # fmt: skip
        return {
            **(linear if self.hybrid else {}),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "initializer_range": 0.02,
        }


SHAPES = {
    "tiny": Shape(256, 4, 4, 2, 704, 1000),  # of builtin:sql-tiny
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, tied=False),
    "hybrid": Shape(512, 8, 8, 2, 1536, 151936, hybrid=True),
}


def model_directory(shape: str) -> Path:
    """The directory of a shape's model; made in a process of its own if it is not there."""
    directory = HOME / "models" / shape
    if not (directory / "tokenizer.json").exists():
        print(f"making the {shape} model in {directory}", file=sys.stderr)
        ask("benchmarks.models", shape)
    return directory


def make(shape: str) -> Path:
    """Write weights, then the tokenizer, whose file says that the directory is complete."""
    directory = HOME / "models" / shape
    directory.mkdir(parents=True, exist_ok=True)
    if shape == "tiny":
        _tiny(directory)
    else:
        _random(SHAPES[shape], directory)
    return directory


def _tiny(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trueup

    source = Path(trueup.__file__).parent / "builtin" / "models" / "sql-tiny"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _random(shape: Shape, directory: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    kinds = (Qwen3_5TextConfig, Qwen3_5ForCausalLM) if shape.hybrid else (Qwen2Config, Qwen2ForCausalLM)
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.convert_tokens_to_ids(END), "pad_token_id": tokenizer.convert_tokens_to_ids(PAD)}
    config = kinds[0](**shape.config(), **ids, bos_token_id=None, dtype="bfloat16")
    kinds[1](config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def qwen_tokenizer():
    """Qwen's tokenizer from its ranks: every split of a token into two tokens is a merge, at the token's rank."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in _ranks().splitlines())}
    merges: list[tuple[str, str]] = []
    for token in ranks:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        splits = sorted((ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks)
        merges += [(text(a), text(b)) for _, _, a, b in splits]
    return Qwen2Tokenizer(
        vocab={text(token): rank for token, rank in ranks.items()},
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=TEMPLATE,
    )


def _ranks() -> str:
    """Qwen's ranks, one `base64 rank` a line, kept in HOME after the first time."""
    kept = HOME / "qwen.tiktoken"
    if not kept.exists():
        with TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, "dashscope"]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                raise Failed("the package dashscope, which carries Qwen's vocabulary, could not be downloaded")
            with zipfile.ZipFile(next(Path(folder).glob("dashscope-*.whl"))) as wheel:
                kept.write_bytes(wheel.read("dashscope/resources/qwen.tiktoken"))
    return kept.read_text(encoding="ascii")


if __name__ == "__main__":
    print(json.dumps(str(make(sys.argv[1]))))
