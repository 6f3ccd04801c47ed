"""Keys about building preference data: who answers, who ranks the answers, which become pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import (
    Float,
    Fraction,
    Lower,
    Mapping,
    Names,
    NonNegative,
    NonNegativeFloat,
    Numbers,
    Patterns,
    Positive,
    PositiveFloat,
    Section,
)


class BuildSection(Section):
    # who answers
    sample_from: Names = []
    """Models that answer each prompt: directories, hub ids, or URL#MODEL of OpenAI-compatible endpoints; unset:
    model_name_or_path with its adapters."""
    sample_key_env: str | None = None
    """Environment variable that holds the API key of the endpoints in sample_from."""
    sample_price: Numbers = []
    """What a million tokens cost at the endpoints in sample_from, read and written (2.5,10): the cost is then shown."""

    # who ranks
    rank_by: Annotated[Literal["judge", "scores", "logps"], Lower] | None = None
    """Who ranks the answers: judge (a strong model), scores (rules, reward_funcs and reward_model added up), logps
    (log-probabilities under model_name_or_path, less those under ref_model); unset: what the other keys give."""
    judge_model: str | None = None
    """The judge: a model's directory or hub id, or URL#MODEL of an OpenAI-compatible endpoint."""
    judge_key_env: str | None = None
    """Environment variable that holds the API key of judge_model."""
    judge_price: Numbers = []
    """What a million tokens cost at judge_model, read and written (2.5,10): the cost is then shown, in that money."""
    judge_mode: Annotated[Literal["pairs", "scores"], Lower] = "pairs"
    """What the judge is asked: which of two answers is better, in both orders (pairs), or a score for each."""
    judge_rubric: str | None = None
    """File with what makes an answer good, in words; unset: helpful, correct, clear, no longer than it needs."""
    judge_max_tokens: Positive = 512
    """Longest reply of the judge in tokens."""

    # rules: an answer gets a point for each it keeps
    rule_min_chars: NonNegative | None = None
    """Rule: an answer has at least so many characters."""
    rule_max_chars: Positive | None = None
    """Rule: an answer has at most so many characters."""
    rule_keywords: Names = []
    """Rule: an answer holds these words (the share that it holds counts; case does not)."""
    rule_forbidden: Names = []
    """Rule: an answer holds none of these words."""
    rule_regex: Patterns = []
    """Rules: each of these regular expressions is found in an answer (dots match line breaks)."""
    rule_not_regex: Patterns = []
    """Rules: none of these regular expressions is found in an answer."""
    rule_format: Annotated[Literal["json", "sql"], Lower] | None = None
    """Rule: an answer, or its last code fence, is valid JSON, or is SQL that SQLite can parse."""
    rule_sql_schema: str | None = None
    """File with CREATE statements that the SQL of rule_format: sql has to fit."""

    # endpoints
    request_timeout: PositiveFloat = 120.0
    """Seconds an endpoint may take for one reply."""
    request_tries: Positive = 5
    """How often a request is made before its prompt waits for the next run; pauses in between double."""
    requests_at_once: Positive = 4
    """Requests that are under way at the same time."""
    request_options: Mapping = {}
    """More fields of every request to an endpoint, such as {"reasoning_effort": "low"}; null drops one of ours."""

    # pairs
    build_format: Annotated[Literal["pairs", "all_pairs", "rankings", "feedback"], Lower] = "pairs"
    """Rows to write: best against worst (pairs), every two that differ (all_pairs), all answers with their scores
    (rankings), or the two of a pair as single answers with a label (feedback, for KTO)."""
    min_margin: NonNegativeFloat = 0.0
    """Leave out pairs whose scores differ by less; equal scores are always a tie."""
    max_length_ratio: Annotated[Float, Field(ge=1)] | None = None
    """Leave out pairs of which one answer is more than so many times as long as the other, in characters."""
    max_similarity: Fraction | None = None
    """Leave out pairs whose answers are more alike than this (1: the same text)."""
    register_as: str | None = None
    """Name under which the result is entered in dataset_dir's dataset_info.json."""
