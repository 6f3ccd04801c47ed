"""KTO's mismatched rows: drawn once an epoch, and the same whether or not a run was interrupted."""

from __future__ import annotations

import numpy as np
import pytest

from trueup.data.encode import prepare
from trueup.models.load import load_policy, load_tokenizer
from trueup.recipes import feedback
from trueup.recipes.entropy import EntropyGauge
from trueup.recipes.feedback import FeedbackLesson, partners
from trueup.recipes.references import build_references
from trueup.training.backend import Single


@pytest.fixture
def lesson(config) -> FeedbackLesson:
    cfg = config(stage="kto", dataset="labels")
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare(cfg, tokenizer)
    loaded = load_policy(cfg.model, cfg.tuning, cfg.train, tokenizer)
    datasets = {"train": prepared.train, "eval": prepared.train}
    references = build_references(cfg, loaded, datasets, {n: [np.arange(24)] for n in datasets}, Single("cpu"))
    return FeedbackLesson(cfg, loaded.policy, datasets, references, Single("cpu"), 6, EntropyGauge(cfg.train, 6))


def test_partners_are_drawn_once_an_epoch_and_split(lesson: FeedbackLesson, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(feedback, "partners", lambda *given: drawn.append(given[1:]) or partners(*given))
    found = [lesson._partners_of(split, epoch) for epoch in (0, 0, 1, 1) for split in ("train", "train", "eval")]
    assert drawn == [(lesson.seed, 0), (lesson.seed, 0), (lesson.seed, 1), (lesson.seed, 1)]
    assert all((a == b).all() for a, b in zip(found[:6:3], found[1:6:3], strict=True))
    assert (found[0] != found[6]).any()
    # Whoever begins at a later epoch, or goes back to evaluate, draws the same.
    assert (lesson._partners_of("train", 0) == found[0]).all()
    assert (lesson._partners_of("train", 1) == found[6]).all()
