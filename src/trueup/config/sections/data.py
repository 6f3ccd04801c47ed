"""Keys about the data: which rows, how they become tokens, what happens to misfits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import Lower, Names, NonNegativeFloat, Numbers, Positive, Section

Truncation = Literal["keep_start", "keep_end", "drop", "error"]
Mixing = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]


class DataSection(Section):
    # which rows
    dataset: Names = []
    """Datasets to train on: registered names, built-in samples, files, folders or hub ids."""
    eval_dataset: Names = []
    """Datasets to evaluate on, named like dataset."""
    dataset_dir: str = "data"
    """Folder with dataset_info.json and the files it names."""
    max_samples: Positive | None = None
    """Use at most this many rows of each dataset."""
    val_size: NonNegativeFloat = 0.0
    """Hold this much back for evaluation: a share below 1, or a number of rows."""
    eval_on_each_dataset: bool = False
    """Evaluate on each dataset by itself."""
    mix_strategy: Annotated[Mixing, Lower] = "concat"
    """How several datasets are mixed: one after another, or interleaved (until the first or the
    last runs out, or once)."""
    interleave_probs: Numbers = []
    """How often each dataset is drawn from when interleaving."""
    streaming: bool = False
    """Read the data while training instead of before it, in flat memory. Needs max_steps; val_size is then a number of
    rows, taken from the beginning."""
    buffer_size: Positive = 16384
    """Rows kept in memory to shuffle a stream."""
    disable_shuffling: bool = False
    """Train on the rows in the order of the files."""
    on_bad_rows: Annotated[Literal["skip", "error"], Lower] = "skip"
    """Rows that cannot be used: skip them (counted and shown), or stop."""

    # from rows to tokens
    template: str | None = None
    """Chat template by name or a .jinja file; the tokenizer's own when unset."""
    default_system: str | None = None
    """System message for conversations that bring none."""
    tool_format: str | None = None
    """How tool calls are written; the template's own when unset."""
    enable_thinking: bool | None = True
    """Thinking blocks: true trains them, false leaves them out, null takes them as they come."""
    preserve_thinking: bool = False
    """Keep thinking blocks of earlier turns."""
    mask_thinking: bool = False
    """Leave thinking blocks of answers out of the loss; they stay in the text."""
    cutoff_len: Annotated[Positive, Field(ge=8)] = 2048
    """Longest example in tokens, prompt and answer together."""
    truncation: Annotated[Truncation, Lower] = "keep_start"
    """A longer example keeps its answer's start (keep_start) or end (keep_end), is left out (drop),
    or stops the run (error). The prompt is never cut: one that leaves no room drops the row."""
    train_on_prompt: bool = False
    """Train on the prompt's tokens too."""
    mask_history: bool = False
    """Train on the last answer of a conversation only."""
    ignore_pad_token_for_loss: bool = True
    """Leave padding out of the loss; nothing is padded here."""

    # batches and caches
    packing: bool | None = None
    """Fill each row up to cutoff_len with several examples, which never see each other; on for
    stage pt when unset."""
    neat_packing: bool = False
    """The same as packing."""
    batch_tokens: Annotated[Positive | Literal["auto"] | None, Lower] = None
    """Tokens of a micro-batch, instead of a number of rows; examples per step stay the same. auto: as many as the
    device takes."""
    tokenized_path: str | None = None
    """Folder to keep the tokenised data in, used again only while data, template and lengths are unchanged;
    when unset, larger data are kept in the user's cache."""
    overwrite_cache: bool = False
    """Tokenise again even when the cache fits."""
    preprocessing_batch_size: Positive = 1000
    """Rows tokenised at a time."""
    preprocessing_num_workers: Positive | None = None
    """Processes that tokenise; when unset, one for each core if there are enough rows. The result is the same."""
    data_shared_file_system: bool = False
    """All machines of the run see the same files."""
    eval_num_beams: Positive | None = None
    """Beams when answers are generated at evaluation."""
