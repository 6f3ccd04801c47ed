"""Choices of people: kept whole, once, by whoever asks at the same time; asked by chance, and some twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from trueup.errors import ConfigError  # noqa: E402
from trueup.web.labels import Item, Label, Project, add_vote, projects  # noqa: E402


def filled(root: Path, count: int = 5, repeats: float = 0.0) -> Project:
    project = Project(root, "first")
    project.set_up(repeats)
    project.add_items([Item.of(f"question {number}", ["one", f"other {number}"]) for number in range(count)])
    return project


def answer(project: Project, annotator: str = "ann", choice: int | str = 0) -> Label | None:
    turn = project.next(annotator)
    if turn is None:
        return None
    label = Label(turn.item.id, choice, annotator, turn.round, turn.order)
    assert project.add(label)
    return label


def test_a_vote_is_an_item_with_its_label_and_a_second_one_takes_its_place(tmp_path: Path):
    kept = {"answers": [{"model": "a"}, {"model": "b"}], "seed": 3}
    add_vote(tmp_path, "arena", "Who?", ["me", "you"], 0, " ann  b ", kept)
    identity = add_vote(tmp_path, "arena", "Who?", ["me", "you"], "tie", "ann b", kept)
    add_vote(tmp_path, "arena", [{"role": "user", "content": "Who?"}], ["me", "you"], 1, "bob")
    project = Project(tmp_path, "arena")
    assert projects(tmp_path) == ["arena"]
    (item,) = project.items.values()
    assert item.prompt == ({"role": "user", "content": "Who?"},) and item.provenance == kept
    assert [(label.annotator, label.choice) for label in project.labels.values()] == [("ann b", "tie"), ("bob", 1)]
    assert identity in project.labels


@pytest.mark.parametrize("choice", [2, -1, True, "left", None, 0.0])
def test_what_is_no_choice_is_refused(tmp_path: Path, choice):
    with pytest.raises(ConfigError):
        add_vote(tmp_path, "arena", "Who?", ["me", "you"], choice)


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "%2e%2e", "a\\b"])
def test_projects_lie_nowhere_else(tmp_path: Path, name: str):
    with pytest.raises(ConfigError):
        add_vote(tmp_path, name, "Who?", ["me", "you"], 0)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_every_item_is_asked_once_and_a_share_twice_the_other_way_round(tmp_path: Path):
    project = filled(tmp_path, 30, repeats=0.2)
    seen: dict[tuple[str, int], tuple[int, ...]] = {}
    while turn := project.next("ann"):
        seen[turn.item.id, turn.round] = turn.order
        assert answer(project)
    assert project.progress("ann") == (36, 36)
    again = [item for item, number in seen if number == 1]
    assert len(again) == 6
    assert all(seen[item, 1] == seen[item, 0][::-1] for item in again)
    assert len({order for (_, number), order in seen.items() if number == 0}) == 2  # both sides, by chance
    assert [item for item, _ in project.plan("ann")] != [item for item, _ in project.plan("bob")]


def test_undo_asks_again_and_nothing_is_overwritten(tmp_path: Path):
    project = filled(tmp_path)
    answer(project)
    before = (project.path / "labels.jsonl").read_bytes()
    label = answer(project, choice="skip")
    assert label and project.undo("bob") is None
    undone = project.undo("ann")
    assert undone and undone.item == label.item
    turn = project.next("ann")
    assert turn and turn.item.id == label.item and len(project.labels) == 1
    assert (project.path / "labels.jsonl").read_bytes().startswith(before)
    assert list(Project(tmp_path, "first").labels) == list(project.labels)


def test_two_tabs_answer_a_question_once(tmp_path: Path):
    one = filled(tmp_path)
    other = Project(tmp_path, "first")
    turn = other.next("ann")
    assert turn and answer(one)
    assert not other.add(Label(turn.item.id, 1, "ann", turn.round, turn.order))
    assert other.is_answered("ann", turn) and other.next("ann") != turn
    assert len(Project(tmp_path, "first").labels) == 1


def test_lines_that_a_crash_tore_are_counted_and_the_next_is_whole(tmp_path: Path):
    project = filled(tmp_path)
    answer(project)
    with open(project.path / "labels.jsonl", "ab") as file:
        file.write(b'{"id": "torn", "item": ')
    again = Project(tmp_path, "first")
    assert len(again.labels) == 1 and again.torn == 0  # it may still be being written
    answer(again)
    assert len(again.labels) == 2 and again.torn == 1
    with open(project.path / "labels.jsonl", "ab") as file:
        file.write(b'3\n{"undo": 4}\n{"id": 1}\n\xff\n')
    assert len(Project(tmp_path, "first").labels) == 2 and Project(tmp_path, "first").torn == 5


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom trueup.web.labels import add_vote\n"
        "for number in range(20):\n"
        "    add_vote(Path(sys.argv[1]), 'arena', f'question {number}', ['a', 'b'], number % 2, sys.argv[2])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*words, name]) for name in ("ann", "bob", "cy")]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    project = Project(tmp_path, "arena")
    assert (len(project.items), len(project.labels), project.torn) == (20, 60, 0)
    lines = (project.path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20 and all(map(json.loads, lines))
