"""Keys about generating, exporting and scoring on benchmarks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import (
    Bits,
    Float,
    Lower,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
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


class ExportSection(Section):
    export_dir: str | None = None
    """Where the merged model goes."""
    export_size: Positive = 5
    """Largest file of the exported model, in GB."""
    export_device: Annotated[Literal["cpu", "auto"], Lower] = "cpu"
    """Where the merge is computed."""
    export_quantization_bit: Bits | None = None
    """Quantise the exported model to this many bits."""
    export_quantization_dataset: str | None = None
    """Text to calibrate that quantisation on."""
    export_quantization_nsamples: Positive = 128
    """Rows of it to use."""
    export_quantization_maxlen: Positive = 1024
    """Longest of those rows in tokens."""
    export_hub_model_id: str | None = None
    """Push the exported model to this hub repository."""


class EvaluateSection(Section):
    task: str | None = None
    """Benchmark to run, for example mmlu_test."""
    task_dir: str = "evaluation"
    """Folder with the benchmark's files."""
    batch_size: Positive = 4
    """Questions at a time. For training it is per_device_train_batch_size."""
    lang: Annotated[Literal["en", "zh"], Lower] = "en"
    """Language of the questions' frame."""
    n_shot: NonNegative = 5
    """Worked examples in front of each question."""
    save_dir: str | None = None
    """Where results go."""
    download_mode: str = "reuse_dataset_if_exists"
    """Whether a downloaded benchmark is used again."""
