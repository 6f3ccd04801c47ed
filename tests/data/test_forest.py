"""A batch holds every common beginning once, and still every sequence whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trueup.data.encoded import Answer, Encoded
from trueup.data.forest import build_forest


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def example(prompt: np.ndarray, *answers: np.ndarray) -> Encoded:
    return Encoded("x:0", prompt, tuple(Answer(answer, np.ones(len(answer), bool)) for answer in answers))


def sequences(forest) -> list[list[int]]:
    """The tokens on each path from root to leaf."""
    return [
        [int(t) for s in path for t in forest.input_ids[forest.segments[s].start : forest.segments[s].stop]]
        for path in forest.paths
    ]


tokens = st.lists(st.integers(0, 1), max_size=40).map(lambda x: ids(*x))
examples = st.lists(
    st.tuples(tokens, st.lists(tokens.filter(len), min_size=1, max_size=3)).map(lambda x: example(x[0], *x[1])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(examples)
def test_every_sequence_is_whole_and_read_where_it_is_predicted(batch: list[Encoded]) -> None:
    forest = build_forest(batch)
    wanted = [[*e.prompt, *a.ids] for e in batch for a in e.answers]
    assert sequences(forest) == wanted
    for path, whole in zip(forest.paths, wanted, strict=True):
        at = np.concatenate([np.arange(forest.segments[s].start, forest.segments[s].stop) for s in path])
        assert forest.position_ids[at].tolist() == list(range(len(whole)))
    for index, segment in enumerate(forest.segments):
        assert segment.parent < index and segment.start < segment.stop
    read = 0
    for number, (e, a) in enumerate((x, y) for x in batch for y in x.answers):
        first = max(len(e.prompt), 1)  # the very first token of a sequence has nothing to be read from
        count = len(e.prompt) + len(a.ids) - first
        assert forest.owner[read : read + count].tolist() == [number] * count
        assert forest.target[read : read + count].tolist() == wanted[number][first:]
        assert forest.position_ids[forest.read_at[read : read + count]].tolist() == [
            *range(first - 1, first - 1 + count)
        ]
        read += count
    assert read == len(forest.target)


def test_a_system_prompt_a_prompt_and_an_answers_beginning_are_there_once() -> None:
    system, first, second = (np.arange(start, start + 20, dtype=np.int32) for start in (0, 100, 200))
    opening = np.arange(300, 330, dtype=np.int32)
    batch = [
        example(np.concatenate([system, first]), ids(7), ids(8)),
        example(np.concatenate([system, second]), np.concatenate([opening, ids(1)]), np.concatenate([opening, ids(2)])),
        example(np.concatenate([system, first]), ids(9)),
    ]
    forest = build_forest(batch)
    assert len(forest.input_ids) == 20 + 20 + 20 + 30 + 5
    assert max(len(path) for path in forest.paths) == 4


def test_a_few_common_tokens_are_not_worth_a_segment() -> None:
    forest = build_forest([example(ids(1, 2, 3, 4), ids(5)), example(ids(1, 2, 3, 9), ids(5))])
    assert len(forest.input_ids) == 10


def test_an_answer_of_the_same_tokens_is_one_segment_read_twice() -> None:
    forest = build_forest([example(ids(1, 2), ids(5, 6), ids(5, 6))])
    assert forest.paths == ((0, 1), (0, 1)) and len(forest.target) == 4


def test_a_batch_without_a_token_is_an_empty_forest() -> None:
    forest = build_forest([example(ids(), ids())])
    assert len(forest.input_ids) == len(forest.target) == 0 and forest.num_sequences == 1
