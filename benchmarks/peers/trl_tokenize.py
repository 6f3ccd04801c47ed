"""Times TRL's dataset preparation: `trl_tokenize.py TOKENIZER PAIRS.jsonl RESULT.json PROCESSES`."""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer


class Timed(DPOTrainer):
    seconds = 0.0

    def _prepare_dataset(self, *args, **kwargs):
        begun = time.perf_counter()
        dataset = super()._prepare_dataset(*args, **kwargs)
        type(self).seconds += time.perf_counter() - begun
        return dataset


def main(tokenizer: str, pairs: str, result: str, processes: str) -> None:
    datasets.disable_caching()
    small = Qwen2Config(vocab_size=151936, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True)  # fmt: skip
    with TemporaryDirectory() as folder:
        begun = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=pairs, split="train", cache_dir=folder)
        reading = time.perf_counter() - begun
        number = int(processes)
        config = DPOConfig(output_dir=folder, max_length=1024, dataset_num_proc=number if number > 1 else None,
                           bf16=False, use_cpu=True, report_to="none")  # fmt: skip
        Qwen2ForCausalLM(small).save_pretrained(folder)
        Timed(
            folder,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
        )
    Path(result).write_text(json.dumps({"": reading + Timed.seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
