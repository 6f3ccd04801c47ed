"""Keys about generating, exporting and scoring on benchmarks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import (
    Bits,
    Float,
    Lower,
    Names,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Split,
)


class GenerateSection(Section):
    do_sample: bool = True
    """Draw tokens at random; false always takes the likeliest."""
    temperature: NonNegativeFloat = 0.95
    """How much chance: 0 is none."""
    top_p: Annotated[PositiveFloat, Field(le=1)] = 0.7
    """Draw only from the likeliest tokens that together reach this probability."""
    top_k: NonNegative = 50
    """Draw only from this many likeliest tokens; 0 is no limit."""
    num_beams: Positive = 1
    """Beams of a beam search; 1 is none."""
    max_new_tokens: Positive = 1024
    """Longest answer in tokens."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes repetition less likely."""
    length_penalty: Float = 1.0
    """Above 0 favours longer beams."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    token_logprobs: bool = False
    """Write the log-probability of every token, beside their sum."""


MergeMethod = Literal[
    "sum", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd", "ties_svd", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip


class ExportSection(Section):
    export_dir: str | None = None
    """Where the exported model goes: a directory that is new or empty."""
    overwrite_export_dir: bool = False
    """When export_dir holds something, move it aside."""
    export_size: PositiveFloat = 5
    """Largest file of the exported model, in GB."""
    export_device: Annotated[Literal["cpu", "auto"], Lower] = "cpu"
    """Where the merge is computed."""
    merge_method: Annotated[MergeMethod, Lower] = "sum"
    """How several adapters become one change of the weights: sum adds what each does, exactly; the others are peft's
    (linear, ties, dare_linear …, and on whole matrices …_svd)."""
    merge_weights: Annotated[list[Float], Split] = []
    """Weight of each adapter; unset: 1."""
    merge_density: Annotated[PositiveFloat, Field(le=1)] = 0.5
    """Share of an adapter's values that ties, dare_linear, dare_ties and magnitude_prune keep."""
    num_expand: Positive | None = None
    """Insert so many new blocks, spread evenly, that leave what the model says as it is (LLaMA-Pro): for training with
    use_llama_pro."""
    export_quantization_bit: Bits | None = None
    """Quantise the exported model to this many bits."""
    export_quantization_method: Annotated[Literal["bnb", "gptq", "awq"], Lower] | None = None
    """Library that does it: bnb (bitsandbytes), gptq (gptqmodel) or awq (llm-compressor); unset: gptq where there is
    export_quantization_dataset, else bnb."""
    export_quantization_dataset: str | None = None
    """Text to calibrate that quantisation on."""
    export_quantization_nsamples: Positive = 128
    """Rows of it to use."""
    export_quantization_maxlen: Positive = 1024
    """Longest of those rows in tokens."""
    export_gguf: Annotated[Literal["f32", "f16", "bf16", "q8_0"], Lower] | None = None
    """Write a GGUF file too, with weights in this format, for llama.cpp and Ollama."""
    export_hub_model_id: str | None = None
    """Push the exported model to this hub repository."""


Measure = Annotated[Literal["preference", "perplexity", "divergence", "answers", "wins", "task"], Lower]


class EvaluateSection(Section):
    eval_models: Names = []
    """Models to measure side by side: run directories, checkpoints, adapters, models, URL#MODEL (answers only), or
    start, which is model_name_or_path with its adapters; the others are compared with the first. Unset: the start."""
    eval_measures: Annotated[list[Measure], Split] = []
    """What to measure: preference, perplexity, divergence (KL, entropy), answers, wins, task; unset: what the data and
    the other keys ask for."""
    eval_prompts: Positive = 200
    """Prompts that each model answers, spread evenly over the rows."""
    eval_group_by: str = "subset"
    """Column by whose values preference accuracy is told apart, where the data has it."""
    bootstrap_samples: NonNegative = 1000
    """Draws of rows behind each 95 % interval; 0 leaves intervals out."""

    # lm-evaluation-harness
    task: Names = []
    """Tasks of lm-evaluation-harness, such as arc_easy, gsm8k or one of your own in task_dir."""
    task_dir: str = "evaluation"
    """Folder with tasks of your own (YAML); what they import is run."""
    task_limit: Positive | None = None
    """Questions of each task; unset: all."""
    task_chat: bool = False
    """Ask through the model's chat template."""
    batch_size: Positive = 4
    """Questions at a time. For training it is per_device_train_batch_size."""
    n_shot: NonNegative | None = None
    """Worked examples in front of each question; unset: the task's own number."""
    save_dir: str | None = None
    """Where results go: another name of output_dir."""
    lang: Annotated[Literal["en", "zh"], Lower] = "en"
    """Language of the questions' frame; a task has its own."""
    download_mode: str = "reuse_dataset_if_exists"
    """Whether a downloaded benchmark is used again; a task decides."""
