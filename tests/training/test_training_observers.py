"""Observers see everything and can hurt nothing; what people are shown; signs of ill health."""

from __future__ import annotations

import io
import logging
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console
from toy_program import run_toy

from trueup.training import trackers
from trueup.training.events import (
    Ended,
    Evaluated,
    EvaluationProgress,
    Logged,
    Saved,
    Started,
    Stepped,
)
from trueup.training.health import Health, Thresholds
from trueup.training.plots import smooth, write_plots
from trueup.training.progress import LiveDisplay, PlainLines, shown, shown_evaluation

ROW = {
    "step": 20, "epoch": 0.5, "loss": 0.53217, "grad_norm": 1.2, "learning_rate": 4.5e-5,
    "rewards/accuracies": 0.78125, "rewards/margins": 1.24321, "rewards/chosen": 0.2123,
    "rewards/rejected": -1.0309, "kl": 0.3124, "num_tokens": 123456, "tokens_per_second": 1234.5,
    "memory_gb": 8.512,
}  # fmt: skip


def started(step=0, total=400):
    return Started(Path("saves/run"), "run", {"stage": "dpo"}, step, total, 40)


class Recorder:
    def __init__(self):
        self.events = []

    def observe(self, event):
        self.events.append(event)


class Broken:
    def __init__(self):
        self.calls = 0

    def observe(self, event):
        self.calls += 1
        raise ConnectionError("service is down")


def test_a_failing_observer_costs_one_warning_and_nothing_else(tmp_path, caplog):
    broken, recorder = Broken(), Recorder()
    with caplog.at_level(logging.WARNING, "trueup"):
        run_toy(tmp_path / "run", observers=[broken, recorder], max_steps=4, logging_steps=1)
    assert broken.calls == 1
    assert caplog.text.count("Broken failed (ConnectionError: service is down)") == 1
    kinds = [type(event).__name__ for event in recorder.events]
    assert kinds[0] == "Started" and kinds[-1] == "Ended" and kinds.count("Logged") == 4


def test_observers_hear_of_a_failure(tmp_path):
    recorder = Recorder()
    with pytest.raises(Exception, match="not finite"):
        run_toy(tmp_path / "run", observers=[recorder], program={"poison_row": 1, "rows": 8})
    assert recorder.events[-1].state == "failed"


# --- trackers ---------------------------------------------------------------------------------


def test_an_absent_tracker_is_said_once(caplog):
    assert trackers.make_trackers(["wandb", "none", "nonsense"]) == [] or "wandb" in sys.modules
    assert caplog.text.count("report_to: wandb is not installed") == 1
    assert "nonsense is not known" in caplog.text


def test_a_tracker_that_fails_at_any_time_is_said_once(tmp_path, caplog):
    class Down:
        def log(self, metrics, step):
            raise TimeoutError("no answer")

        def finish(self):
            raise AssertionError("not reached")

    tracker = trackers.Tracker("wandb", lambda *arguments: Down())
    run_toy(tmp_path / "run", observers=[tracker], max_steps=4, logging_steps=1)
    assert caplog.text.count("wandb failed (TimeoutError: no answer)") == 1


def test_a_tracker_that_hangs_does_not_hold_the_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "_FAREWELL_SECONDS", 0.2)
    release = threading.Event()
    tracker = trackers.Tracker("mlflow", lambda *arguments: release.wait(60))
    result, _ = run_toy(tmp_path / "run", observers=[tracker], max_steps=3, logging_steps=1)
    release.set()
    assert result.steps == 3
    assert "mlflow did not answer in time" in caplog.text


def fake_libraries(monkeypatch, calls):
    def record(name):
        return lambda *arguments, **keywords: calls.append((name, arguments, keywords))

    for name in ("wandb", "trackio", "mlflow", "swanlab"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        for call in ("init", "log", "finish", "set_experiment", "start_run", "log_params"):
            setattr(module, call, record(f"{name}.{call}"))
        module.log_metrics, module.end_run = record(f"{name}.log"), record(f"{name}.finish")
        monkeypatch.setitem(sys.modules, name, module)
    run = types.SimpleNamespace(log=record("wandb.log"), finish=record("wandb.finish"))
    sys.modules["wandb"].init = lambda **keywords: calls.append(("wandb.init", (), keywords)) or run


def test_every_tracker_gets_names_steps_and_config(tmp_path, monkeypatch):
    calls = []
    fake_libraries(monkeypatch, calls)
    monkeypatch.setattr(trackers, "_installed", lambda package: True)
    names = ["wandb", "trackio", "mlflow", "swanlab"]
    run_toy(
        tmp_path / "run", observers=trackers.make_trackers(names), max_steps=2, logging_steps=1,
        do_eval=True, run_name="mine",
    )  # fmt: skip
    for name in names:
        logged = [(a, k) for called, a, k in calls if called == f"{name}.log"]
        assert len(logged) == 3, name
        prefix = "" if name == "mlflow" else "train/"
        assert logged[0][0][0][f"{prefix}rewards/accuracies"] >= 0
        assert logged[0][1]["step"] == 1
        evaluated = "eval_loss" if name == "mlflow" else "eval/loss"
        assert evaluated in logged[2][0][0]
        assert f"{name}.finish" in [called for called, *_ in calls]


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    run_toy(
        tmp_path / "run", observers=trackers.make_trackers("tensorboard"), max_steps=2,
        logging_steps=1,
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "runs")).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2]


# --- what people see --------------------------------------------------------------------------


def test_plain_lines_are_one_ascii_line_each():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    lines = PlainLines(stream)
    for event in (
        Started(Path("saves/模型"), "run", {}, 0, 400, 40),
        Stepped(20),
        Logged(20, ROW),
        Evaluated(20, {"step": 20, "epoch": 0.5, "eval_loss": 0.6}, improved=True),
        Saved(20, Path("checkpoint-20")),
        Ended("finished", 400, 400),
    ):
        lines.observe(event)
    stream.seek(0)
    text = stream.read()
    assert len(text.splitlines()) == 5
    row = text.splitlines()[1]
    for word in (
        "step 20/400", "loss 0.5322", "rewards/accuracies 0.7812", "rewards/margins 1.243",
        "rewards/chosen 0.2123", "rewards/rejected -1.031", "kl 0.3124", "tok/s 1234", "GB 8.512",
        "left",
    ):  # fmt: skip
        assert word in row, word


def live_text(width=80, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, **options)
    display = LiveDisplay(console)
    for event in (
        started(),
        Stepped(20),
        Logged(20, ROW),
        EvaluationProgress(20, 0, 1),
        Evaluated(20, {"step": 20, "epoch": 0.5, "eval_loss": 0.6}),
        Saved(20, Path("checkpoint-20")),
        Ended("finished", 20, 400),
    ):
        display.observe(event)
    return stream.getvalue()


def test_the_live_display_fits_eighty_columns_and_shows_the_names():
    from rich.text import Text

    text = live_text()
    plain = Text.from_ansi(text).plain
    for word in ("rewards/accuracies 0.7812", "rewards/margins 1.243", "kl 0.3124", "20/400"):
        assert word in plain, word
    assert all(len(line) <= 80 for line in plain.splitlines())


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in live_text()
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[36m" in live_text(color_system="standard")


# --- health -----------------------------------------------------------------------------------


def warnings_of(rows, evaluations=(), limits=None):
    said = []
    health = Health(lambda text, step: said.append(text), limits)
    evaluations = dict(evaluations)
    for row in rows:
        health.observe(Logged(row["step"], row))
        if row["step"] in evaluations:
            health.observe(Evaluated(row["step"], evaluations[row["step"]]))
    return said


def trajectory(steps, margin, chosen, peak):
    """Rows of a run that ends at `margin` and `chosen`; the chosen reward peaks on the way."""
    for step in range(5, steps + 1, 5):
        part = step / steps
        yield {
            "step": step,
            "rewards/margins": margin * part,
            "rewards/chosen": 4 * peak * part * (1 - part) + chosen * part**2,
            "rewards/accuracies": 0.5 + 0.5 * min(1.0, 3 * part),
            "kl": 0.5,
        }


# the table of the quickstart's trial: steps, margin and chosen reward at the end, collapsed or not
TRIALS = [
    (80, 0.24, 0.21, False),
    (120, 2.5, 1.65, False),
    (120, 3.3, 0.34, False),
    (150, 8.4, 1.05, False),
    (300, 10.2, -1.24, True),
    (150, 12.2, -1.64, True),
]


@pytest.mark.parametrize(("steps", "margin", "chosen", "collapsed"), TRIALS)
def test_collapse_is_told_where_it_happened_and_only_there(steps, margin, chosen, collapsed):
    said = warnings_of(trajectory(steps, margin, chosen, peak=0.3))
    assert len(said) == int(collapsed), said
    if collapsed:
        assert "chosen reward falls below zero" in said[0] and "learning_rate" in said[0]


def test_rewards_without_a_reference_are_below_zero_and_no_alarm():
    rows = [{"step": s, "rewards/margins": 0.1 * s, "rewards/chosen": -4 + 0.05 * s, "rewards/rejected": -4 - 0.05 * s}
            for s in range(30)]  # fmt: skip
    assert warnings_of(rows) == []
    falling = [{**row, "rewards/chosen": -4 - 0.05 * row["step"]} for row in rows]
    assert warnings_of(falling) == []
    own_answers = [{**row, "completions/mean_length": 20.0} for row in falling]
    assert any("chosen reward falls below zero" in text for text in warnings_of(own_answers))


def thresholds(**config) -> Thresholds:
    return Thresholds.of({"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.1, **config})


def test_thresholds_are_of_log_ratios_whatever_beta_makes_of_them():
    assert thresholds() == thresholds(pref_beta=0.5) == Thresholds(compares=True)
    bold = thresholds(pref_beta=0.01)
    assert (bold.collapse_margin, bold.fallen) == pytest.approx((0.1, -0.03))
    rows = list(trajectory(300, 0.9, -0.124, peak=0.03))  # the trial's fifth row at a tenth of its beta
    assert warnings_of(rows) == []
    assert len(warnings_of(rows, limits=bold)) == 1
    assert thresholds(pref_loss="ipo").collapse_margin == pytest.approx(0.025)  # nats a token
    assert thresholds(stage="kto", pref_loss="kto").compares
    assert Thresholds.of({"stage": "online_dpo", "pref_loss": "sigmoid", "pref_beta": 0.1}).compares
    assert Thresholds.of({"stage": "sft", "pref_loss": "sigmoid", "pref_beta": 0.1}) == Thresholds()


def test_in_a_sum_of_losses_the_first_says_what_rewards_are():
    """CPO's rewards are likelihoods; the KL is that of the sigmoid loss beside it."""
    collapsing = [
        {**row, "rewards/rejected": -row["rewards/margins"]} for row in trajectory(300, 10.2, -1.24, peak=0.3)
    ]
    alarms = {("cpo", "sigmoid"): 0, ("sft", "cpo"): 0, ("sft", "sigmoid"): 1, ("sigmoid", "cpo"): 1, ("apo_down",): 0}
    for losses, count in alarms.items():
        assert len(warnings_of(collapsing, limits=thresholds(pref_loss=list(losses)))) == count, losses


def test_what_a_preference_pushes_away_may_be_far():
    rows = [{"step": s, "kl": 10.0**s, "kl/chosen": 2.0 + 30.0 * (s == 9)} for s in range(1, 20)]
    assert warnings_of(rows) == []
    said = warnings_of([{**row, "kl/chosen": 12.0} for row in rows])
    assert len(said) == 1 and "12.0 on chosen answers" in said[0]


def test_noise_of_the_first_steps_is_no_collapse():
    rows = [{"step": s, "rewards/margins": 0.01 * s, "rewards/chosen": -0.02} for s in range(20)]
    assert warnings_of(rows) == []


def test_accuracy_that_stays_at_one_half_is_told():
    rows = [{"step": 5 * i, "rewards/accuracies": 0.5 + 0.03 * (-1) ** i, "rewards/margins": 0.0} for i in range(30)]
    assert ["accuracy stays at 0.50" in text for text in warnings_of(rows)] == [True]
    assert warnings_of(rows[:10]) == []


def test_a_large_kl_is_told_once():
    said = warnings_of([{"step": s, "kl": float(s)} for s in range(1, 40)])
    assert len(said) == 1 and "KL to the reference" in said[0]


def test_learning_by_heart_is_told():
    rows = [{"step": s, "rewards/accuracies": 0.6 + 0.01 * s} for s in range(1, 31)]
    held_out = {10: 0.72, 20: 0.70, 30: 0.55}
    said = warnings_of(rows, {s: {"eval_rewards/accuracies": v} for s, v in held_out.items()})
    assert len(said) == 1 and "held-out accuracy fell" in said[0]


def test_a_gap_that_opens_between_training_and_held_out_pairs_is_told():
    rows = [{"step": s, "rewards/accuracies": min(1.0, 0.5 + 0.02 * s)} for s in range(1, 31)]
    said = warnings_of(rows, {s: {"eval_rewards/accuracies": 0.6} for s in (5, 15, 30)})
    assert len(said) == 1 and "the gap opens" in said[0]
    learns = {s: {"eval_rewards/accuracies": min(0.95, 0.5 + 0.018 * s)} for s in (5, 15, 30)}
    assert warnings_of(rows, learns) == []


def test_both_answers_falling_is_told_before_the_margin_tells():
    rows = [{"step": s, "rewards/chosen": -0.05 * s, "rewards/rejected": -0.06 * s, "rewards/margins": 0.01 * s,
             "kl": 0.1} for s in range(1, 21)]  # fmt: skip
    said = warnings_of(rows)
    assert len(said) == 1 and "both become less likely" in said[0]
    healthy = [{**row, "rewards/chosen": 0.05 * row["step"]} for row in rows]
    assert warnings_of(healthy) == []


def test_length_learnt_in_place_of_quality_is_told():
    rows = [{"step": s, "rewards/accuracies": 0.6, "rewards/longer_wins": 0.85} for s in range(1, 15)]
    said = warnings_of(rows)
    assert len(said) == 1 and "length in place of quality" in said[0]
    # where chosen answers are longer, learning them is not learning length
    assert warnings_of([{**row, "rewards/accuracies": 0.85} for row in rows]) == []


def test_answers_that_grow_and_groups_that_teach_nothing_are_told():
    rows = [{"step": s, "completions/mean_length": 20.0 + 3 * s} for s in range(1, 15)]
    assert ["answers have grown" in text for text in warnings_of(rows)] == [True]
    rows = [{"step": s, "frac_reward_zero_std": 0.95} for s in range(1, 6)]
    assert ["all answers have the same reward" in text for text in warnings_of(rows)] == [True]


def test_health_warnings_reach_the_log_and_the_status(tmp_path, caplog):
    from trueup.training.run_directory import RunDirectory, read_status

    with RunDirectory.open(tmp_path / "run") as run:
        health = Health(lambda text, step: run.warn(text, step))
        for row in trajectory(300, 10.2, -1.24, peak=0.3):
            health.observe(Logged(row["step"], row))
    assert "chosen reward falls below zero" in caplog.text
    assert "chosen reward" in read_status(tmp_path / "run")["warnings"][0]["text"]


def test_a_kl_that_counts_what_is_pushed_away_is_not_shown():
    row = {"kl": 1581.0, "kl/chosen": 2.5}
    assert shown(row) == ["kl/chosen 2.5"]
    assert shown_evaluation({"step": 3, **{f"eval_{name}": value for name, value in row.items()}}) == [
        "eval_kl/chosen 2.5"
    ]
    assert shown({"kl": 0.5}) == ["kl 0.5"]


# --- pictures ---------------------------------------------------------------------------------


def test_pictures_of_every_known_metric(tmp_path):
    rows = [{**ROW, "step": s, "loss": 1.0 / s} for s in range(1, 30)]
    rows += [{"step": 10, "eval_loss": 0.5, "eval_rewards/accuracies": 0.7}]
    names = {path.name for path in write_plots(rows, tmp_path)}
    assert {
        "training_loss.png", "training_eval_loss.png", "training_rewards_accuracies.png",
        "training_rewards_margins.png", "training_rewards_chosen.png", "training_kl.png",
    } <= names  # fmt: skip
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert not list(tmp_path.glob(".*"))


def test_smoothing_begins_at_the_first_value_and_follows():
    assert smooth([3.0]) == [3.0]
    values = smooth([0.0] * 50 + [1.0] * 50)
    assert values[0] == 0.0 and 0.99 < values[-1] <= 1.0


# --- stalls -----------------------------------------------------------------------------------


def test_a_stall_is_seen_with_stacks_and_ends_with_the_next_step(tmp_path, caplog, monkeypatch):
    import time

    from trueup.training import watchdog as module
    from trueup.training.run_directory import RunDirectory, read_status

    monkeypatch.setattr(module, "_LEAST_SECONDS", 0.2)
    with RunDirectory.open(tmp_path / "run") as run:
        run.status(state="running")
        with module.Watchdog(run, check_seconds=0.05) as watchdog:
            for _ in range(5):
                watchdog.beat()
            time.sleep(0.6)
            assert read_status(tmp_path / "run")["state"] == "stalled"
            assert "no progress" in caplog.text
            stacks = (tmp_path / "run" / "logs" / "stall.txt").read_text("utf-8")
            assert "test_a_stall_is_seen" in stacks
            watchdog.beat()
            assert read_status(tmp_path / "run")["state"] == "running"
