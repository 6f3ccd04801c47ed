"""Long work before a training begins: seen on a terminal, told elsewhere, and short work not at all."""

from __future__ import annotations

import io

import pytest

from trueup import waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time is its last entry."""
    times = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: times[-1])
    return times


def test_long_work_says_how_far_it_is_and_how_long_it_took(clock, caplog) -> None:
    caplog.set_level("INFO", "trueup")
    with waiting.waiting("tokenising", 60_000, "rows") as tell:
        for second in range(1, 61):
            clock.append(float(second))
            tell(1_000 * second)
    assert [record.getMessage() for record in caplog.records] == [
        "tokenising: 5,000 of 60,000 rows, 0:00:55 left",
        "tokenising: 35,000 of 60,000 rows, 0:00:25 left",
        "tokenising: 60,000 rows in 0:01:00",
    ]


def test_short_work_and_other_processes_say_nothing(clock, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "trueup")
    with waiting.waiting("tokenising", 10, "rows") as tell:
        clock.append(2.0)
        tell(5)
        tell(10)
    monkeypatch.setenv("RANK", "1")
    with waiting.waiting("tokenising", 10, "rows") as tell:
        clock.append(99.0)
        tell(5)
    assert not caplog.records


def test_a_terminal_gets_a_bar_that_goes_away(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with waiting.waiting("tokenising", 10, "rows") as tell:
        tell(1)
        assert not terminal.getvalue()
        clock.append(2.0)
        tell(5)
    assert "tokenising" in terminal.getvalue() and "5/10" in terminal.getvalue()


def test_an_error_in_the_work_is_not_hidden(clock) -> None:
    with pytest.raises(ValueError), waiting.waiting("tokenising", 10, "rows"):
        raise ValueError
