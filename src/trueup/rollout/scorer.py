"""Log-probabilities of given tokens, with the likeliest at each place: what completions with `echo` report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trueup.models.logprobs import Head, vocabulary_of
from trueup.rollout.drawing import token_logps
from trueup.rollout.sampling import Scored

MOST_LOGITS = 1 << 25  # fp32 numbers held at once


def score_rows(model: PreTrainedModel, head: Head, sequences: Sequence[Sequence[int]], top: int) -> list[Scored]:
    """Every token of some sequences (none empty), in one forward of the backbone."""
    hidden = _hidden(model, sequences)
    stretch = max(1, MOST_LOGITS // vocabulary_of(head.module))
    found = []
    for row, ids in enumerate(sequences):
        places, targets = hidden[row, : len(ids) - 1], torch.tensor(list(ids[1:]), device=hidden.device)
        tokens = [
            token
            for states, target in zip(places.split(stretch), targets.split(stretch), strict=True)
            for token in token_logps(head.finish(head.module(states).float()), target, [top] * len(target))
        ]
        found.append(Scored(tuple(int(token) for token in ids), tuple(tokens)))
    return found


def _hidden(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[S, T, H] right-padded: what is padding comes after all that is read, and is not attended to."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    rows = [torch.tensor([int(token) for token in ids]) for ids in sequences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    inputs = {"input_ids": input_ids}
    if int(lengths.min()) < input_ids.shape[1]:
        columns = torch.arange(input_ids.shape[1])
        inputs["attention_mask"] = (columns < lengths[:, None]).long().to(model.device)
        inputs["position_ids"] = columns.expand(input_ids.shape).to(model.device)
    return model.get_decoder()(use_cache=False, **inputs).last_hidden_state
