from __future__ import annotations

import json

import pytest

from trueup.builtin import BUILTIN_DATA
from trueup.builtin.sql import make_tasks, read_tasks, write_pairs
from trueup.builtin.sql.tasks import split_of


def test_the_same_seed_gives_the_same_tasks_and_another_seed_others():
    assert make_tasks(50, seed=3) == make_tasks(50, seed=3)
    assert make_tasks(50, seed=3) != make_tasks(50, seed=4)
    assert make_tasks(50, seed=3)[:20] == make_tasks(20, seed=3)


def test_train_and_heldout_share_no_request_and_no_query():
    train = [task for seed in (1, 2, 3) for task in make_tasks(2000, seed)]
    heldout = make_tasks(500, seed=1, split="heldout")
    assert not {task.request for task in train} & {task.request for task in heldout}
    assert not {task.bare for task in train} & {task.bare for task in heldout}


def test_no_request_comes_twice_and_both_languages_are_asked():
    tasks = make_tasks(1000, seed=0)
    assert len({task.request for task in tasks}) == 1000
    english = sum(task.language == "en" for task in tasks)
    assert 400 < english < 600
    assert all(task.request.isascii() == (task.language == "en") for task in tasks)


def test_tasks_survive_a_file(tmp_path):
    tasks = make_tasks(20, seed=0)
    write_pairs(tasks, tmp_path / "pairs.jsonl")
    assert read_tasks(tmp_path / "pairs.jsonl") == tasks


@pytest.mark.parametrize(("name", "split"), [("sql_pairs", "train"), ("sql_heldout", "heldout")])
def test_bundled_pairs_are_of_their_split(name, split):
    path = BUILTIN_DATA / f"{name}.jsonl"
    tasks = read_tasks(path)
    assert len(tasks) >= 100
    assert {split_of(task.bare) for task in tasks} == {split}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [task.pair() for task in tasks] == rows
