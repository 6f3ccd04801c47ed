"""Answers to held-out rows, and how like the rows' own they are: `do_predict`, and `predict_with_generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from trueup.config.schema import RunConfig
from trueup.data.encode import Prepared
from trueup.data.encoded import Encoded, EncodedDataset
from trueup.data.templates import ChatTemplate
from trueup.errors import ConfigError
from trueup.models.load import Loaded
from trueup.models.policy import Policy
from trueup.recipes.batches import Batch
from trueup.rollout.engines import Engine, Sampling
from trueup.rollout.similarity import NAMES, Similarity, require
from trueup.training.backend import Backend
from trueup.training.run_directory import RunDirectory
from trueup.training.signals import StopRequest
from trueup.training.watchdog import Watchdog
from trueup.types import Metrics
from trueup.waiting import waiting

PREDICTIONS_FILE = "generated_predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """An answer beside the row's own; `label` is None where the row has none to be like."""

    prompt: str
    predict: str
    label: str | None
    row: str


class Predictor:
    """Answers rows of the evaluation sets with the run's generation settings.

    Raises:
        ConfigError: there is no row, or a library that compares answers is missing.
    """

    def __init__(
        self,
        cfg: RunConfig,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        datasets: Mapping[str, EncodedDataset],
    ) -> None:
        self.engine = Engine(policy, tokenizer, template.stop_ids)
        self.tokenizer, self.datasets, self.policy = tokenizer, datasets, policy
        g = cfg.generate
        temperature = g.temperature if g.do_sample else 0.0
        self.sampling = Sampling(temperature, g.top_p, g.top_k, g.repetition_penalty, g.max_new_tokens)
        self.skip_special_tokens = g.skip_special_tokens
        self.rows_at_a_time = cfg.train.per_device_eval_batch_size
        self.seed = cfg.train.seed
        self.similarity = Similarity()
        key = "do_predict" if cfg.train.do_predict else "predict_with_generate"
        if not any(map(len, datasets.values())):
            raise ConfigError(
                "there is nothing to predict", where=key, fix="set eval_dataset, or dataset with val_size"
            )
        require(key, (label for dataset in datasets.values() for e in dataset if (label := self._label(e)) is not None))

    def answer(self, split: str, indices: Sequence[int]) -> list[Prediction]:
        """One answer to each of these rows of an evaluation set. Seed, rows and weights alone say which."""
        examples = [self.datasets[split][int(i)] for i in indices]
        prompts = [_parts(example)[0] for example in examples]
        seed = np.random.SeedSequence([self.seed, *split.encode(), *map(int, indices)]).generate_state(1)
        found = zip(examples, prompts, self._draw(prompts, int(seed[0])), strict=True)
        return [Prediction(self._text(p, False), self._text(ids), self._label(e), e.row) for e, p, ids in found]

    def _draw(self, prompts: Sequence[np.ndarray], seed: int) -> list[list[int]]:
        if self.sampling.repetition_penalty == 1.0:
            drawn = self.engine.sample(prompts, self.sampling, seed=seed)
            return [group[0].ids[: len(group[0].ids) - group[0].ended].tolist() for group in drawn]
        device = self.policy.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.engine.generate([prompt.tolist() for prompt in prompts], self.sampling)

    def _label(self, example: Encoded) -> str | None:
        ids = _parts(example)[1]
        return None if ids is None else self._text(self.engine.until_stop(ids.tolist()))

    def _text(self, ids: Sequence[int] | np.ndarray, clean: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=clean and self.skip_special_tokens)

    def compare(self, predictions: Sequence[Prediction]) -> dict[str, tuple[float, float]]:
        """(sum, count) of each measure, over the rows that have an answer."""
        pairs = [(p.predict, p.label) for p in predictions if p.label is not None]
        found = [self.similarity(answer, label) for answer, label in pairs]
        return {name: (sum(values[name] for values in found), float(len(found))) for name in NAMES}

    def metrics(self, batch: Batch) -> Metrics:
        """What an evaluation reports of generated answers to a micro-batch."""
        sums = self.compare(self.answer(batch.split, batch.indices.tolist()))
        return {name: (torch.tensor(value, dtype=torch.float64), count) for name, (value, count) in sums.items()}

    def batches(self) -> Iterator[tuple[str, list[int]]]:
        """All evaluation sets. A chat that was cut into an example for each answer is asked for its last one."""
        for name, dataset in self.datasets.items():
            last = list({row: i for i, row in enumerate(dataset.rows)}.values())
            for start in range(0, len(last), self.rows_at_a_time):
                yield name, last[start : start + self.rows_at_a_time]


def make_predictor(
    cfg: RunConfig, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> Predictor | None:
    """For a run that wants answers. Raises what `Predictor` raises."""
    if not (cfg.train.do_predict or cfg.train.predict_with_generate):
        return None
    return Predictor(cfg, loaded.policy, tokenizer, prepared.template, prepared.eval)


def predict(predictor: Predictor, run: RunDirectory, backend: Backend, console: Console) -> dict[str, float]:
    """Answer every held-out row; writes generated_predictions.jsonl and predict_results.json.

    Returns `predict_…` metrics (of several sets, `predict_<dataset>_…`). Raises Stopped after a signal.
    """
    begun = time.monotonic()
    todo = list(predictor.batches())
    mine = range(backend.rank, len(todo), backend.world_size)
    found: dict[int, list[Prediction]] = {}
    run.status(state="running")
    with StopRequest() as stop, Watchdog(run) as watchdog, waiting("predicting", len(todo), "batches") as tell:
        for number in range(-(-len(todo) // backend.world_size)):
            watchdog.beat()
            run.heartbeat()
            if backend.any(stop()):
                raise stop.stopped(backend, "the prediction was stopped; it wrote nothing", str(run.path))
            if number < len(mine):
                found[mine[number]] = predictor.answer(*todo[mine[number]])
            tell(min((number + 1) * backend.world_size, len(todo)))
    every = {place: answers for part in backend.gather(found) for place, answers in part.items()}
    by_set: dict[str, list[Prediction]] = {}
    for place, (name, _) in enumerate(todo):
        by_set.setdefault(name, []).extend(every[place])
    predictions = [prediction for of_set in by_set.values() for prediction in of_set]
    lines = (json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    run.write_text(PREDICTIONS_FILE, "".join(lines))
    results = {}
    for name, of_set in by_set.items():
        prefix = "predict" + name.removeprefix("eval")
        sums = predictor.compare(of_set)
        results |= {f"{prefix}_{key}": round(value / count, 4) for key, (value, count) in sums.items() if count}
    seconds = max(time.monotonic() - begun, 1e-9)
    results["predict_runtime"] = round(seconds, 4)
    results["predict_samples_per_second"] = round(len(predictions) / seconds, 3)
    run.write_results("predict", results)
    run.status(state="finished", exit_code=0)
    shown = ", ".join(f"{name} {value:g}" for name, value in results.items())
    console.print(f"predicted {len(predictions):,} answers: {shown}", markup=False, highlight=False)
    return results


def _parts(example: Encoded) -> tuple[np.ndarray, np.ndarray | None]:
    """What is to be answered and the row's own answer: the chosen one, or a chat's last; no unwanted one."""
    if not example.answers:
        return example.prompt, None
    answer = example.answers[0]
    trained = np.flatnonzero(answer.mask)
    if not len(trained):
        return np.concatenate([example.prompt, answer.ids]), None
    stop = int(trained[-1]) + 1
    untrained = np.flatnonzero(~answer.mask[:stop])
    start = int(untrained[-1]) + 1 if len(untrained) else 0
    unwanted = len(example.answers) == 1 and example.scores == (0.0,)
    return np.concatenate([example.prompt, answer.ids[:start]]), None if unwanted else answer.ids[start:stop]
