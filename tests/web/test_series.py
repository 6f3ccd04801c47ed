"""A run's files as curves and answers: only what is new is read, and no spike is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nicegui")

from trueup.web import answers, plots, series  # noqa: E402


def append(run: Path, *rows: dict, name: str = "metrics.jsonl") -> None:
    with open(run / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_rows_are_there_as_they_are_appended(tmp_path):
    append(tmp_path, {"step": 1, "loss": 0.5, "note": "text"}, {"step": 2, "loss": None, "ok": True})
    assert series.read(tmp_path).curve("loss") == [[1, 0.5]]
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss"')
        file.flush()
        assert series.read(tmp_path).length == 2
        file.write(': 0.25}\nnot json\n{"step": 4, "eval_loss": 1}\n')
    table = series.read(tmp_path)
    assert table.curve("loss") == [[1, 0.5], [3, 0.25]]
    assert table.curve("eval_loss") == [[4, 1]]
    assert table.last("loss") == 0.25
    assert table.names == ["step", "loss", "eval_loss"]


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    append(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 50)))
    assert series.read(tmp_path).length == 49
    append(tmp_path, {"step": 1, "loss": 2.0}, name="new")
    (tmp_path / "new").replace(tmp_path / "metrics.jsonl")
    assert series.read(tmp_path).curve("loss") == [[1, 2.0]]
    (tmp_path / "metrics.jsonl").unlink()
    assert series.read(tmp_path).length == 0


def test_a_long_curve_keeps_its_spikes_and_its_end():
    values = np.zeros(100_000)
    values[[777, 55_555]] = 9.0, -9.0
    kept = series.thin(values, 800)
    assert len(kept) <= 803
    assert {0, 777, 55_555, 99_999} <= {*kept.tolist(), 0}
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("weight", [0.02, 0.6, 0.98])
def test_smoothing_begins_at_the_first_value(weight: float, tmp_path):
    raw = [3.0, 1.0, 2.0, 5.0]
    append(tmp_path, *({"step": step, "loss": value} for step, value in enumerate(raw)))
    smooth = [y for _, y in series.read(tmp_path).curve("loss", smoothing=weight)]
    powers = [[weight ** (i - j) for j in range(i + 1)] for i in range(len(raw))]
    assert smooth == pytest.approx([np.average(raw[: i + 1], weights=power) for i, power in enumerate(powers)])


def test_part_of_a_long_run_is_shown_in_full(tmp_path):
    append(tmp_path, *({"step": step, "loss": step % 7} for step in range(5000)))
    table = series.read(tmp_path)
    part = table.curve("loss", span=(1000, 1400))
    assert [x for x, _ in part] == list(range(1000, 1401))
    made = plots.options(plots.PLOTS[0], table, plots.Look(span=(0.5, 0.6)), lambda key: key)
    drawn = [x for x, _ in made["series"][0]["data"]]
    assert (drawn[0], drawn[-1], len(drawn)) == (2500, 2999, 500)


def test_every_number_of_a_run_has_a_chart(tmp_path):
    row = {"step": 1, "loss": 1, "rewards/a/mean": 1, "rewards/b/mean": 2, "eval_x": 1, "x": 2, "only": 3}
    append(tmp_path, row)
    table = series.read(tmp_path)
    shown = [plot for plot in [*plots.front(table), *plots.others(table)] for _ in plot.metrics]
    metrics = {metric for plot in shown for metric in plot.metrics.values()}
    assert row.keys() - {"step"} <= metrics


def test_answers_are_found_by_their_step(tmp_path):
    rows = [{"step": step, "completion": f"s{step} a{number} ü"} for step in (1, 2) for number in range(3)]
    append(tmp_path, *rows, name=answers.FILE)
    found = answers.read(tmp_path)
    assert (found.steps, found.count(2)) == ([1, 2], 3)
    assert [row["completion"] for row in found.at(2, 2)] == ["s2 a0 ü", "s2 a1 ü"]
    append(tmp_path, {"step": 3, "completion": "new"}, name=answers.FILE)
    assert answers.read(tmp_path).at(3, 9) == [{"step": 3, "completion": "new"}]
