"""Building preference data: nothing is lost, whatever a judge, a disk or a kill does; the same seed, the same pairs."""

from __future__ import annotations

import difflib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import trueup
from tests.rollout.judge_server import Raw, Silence, Status, serving
from trueup.config.load import load_config
from trueup.errors import ConfigError, ResourceError
from trueup.recipes.preferences import BuildReport, build
from trueup.recipes.run import run
from trueup.recipes.scoring import score
from trueup.rollout import endpoint

Build = Callable[..., BuildReport]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0.05)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def keys(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> dict:
    """A tiny random model that answers 21 prompts thrice."""
    return {
        "model_name_or_path": str(tiny_dir), "dataset": "pairs", "dataset_dir": str(data_dir), "device": "cpu",
        "bf16": False, "num_generations": 3, "max_new_tokens": 12, "generation_batch_size": 12,
        "output_dir": str(tmp_path / "built"), "rule_keywords": "e",
    }  # fmt: skip


@pytest.fixture
def made(keys: dict) -> Build:
    """Build with more or other keys; None leaves one out."""

    def make(**more) -> BuildReport:
        given = {key: value for key, value in {**keys, **more}.items() if value is not None}
        return build(load_config(given, verb="build"))

    return make


def rows_of(report: BuildReport) -> list[dict]:
    return [json.loads(line) for line in Path(report.output).read_text(encoding="utf-8").splitlines()]


def adds_up(report: BuildReport) -> bool:
    told = json.loads(Path(report.output).with_name("build_report.json").read_text(encoding="utf-8"))["prompts"]
    parts = [part["count"] for kind in ("dropped", "waiting") for part in told[kind].values()]
    return told["read"] == told["kept"] + sum(parts) == 21


def _length_ratio(row: dict) -> float:
    lengths = sorted((row["chars_chosen"], row["chars_rejected"]))
    return lengths[1] / lengths[0]


def _likeness(row: dict) -> float:
    one, other = (row[side][0]["content"] for side in ("chosen", "rejected"))
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _middle(values: Iterable[float]) -> float:
    """Between the least and the largest of what this machine's arithmetic happened to draw."""
    found = sorted(values)
    assert found[0] < found[-1]
    return (found[0] + found[-1]) / 2


def verdict(request: dict) -> str:
    """A judge with an opinion: the answer with more letters e, however they are placed."""
    text = request["messages"][-1]["content"]
    first, second = (re.search(rf"<answer_{s}>\n(.*?)\n</answer_{s}>", text, re.DOTALL)[1].count("e") for s in "AB")
    better = "A" if first > second else "B" if second > first else "tie"
    return json.dumps({"reason": "letters", "better": better})


JUDGED = {"rule_keywords": None, "request_timeout": 60.0, "request_tries": 2}


# --- what comes out --------------------------------------------------------------------------------


def test_pairs_have_both_sides_scores_lengths_and_provenance(made):
    report = made()
    assert adds_up(report) and report.kept == report.rows > 3
    row = rows_of(report)[0]
    assert row["score_chosen"] == 1.0 > row["score_rejected"] == 0.0
    assert "e" in row["chosen"][0]["content"] and "e" not in row["rejected"][0]["content"].lower()
    assert row["chars_chosen"] == len(row["chosen"][0]["content"]) and row["tokens_chosen"] <= 12
    source = row["provenance"]["chosen"]
    assert source["temperature"] == 1.0 and source["seed"] != row["provenance"]["rejected"]["seed"]
    assert row["provenance"]["row"].startswith("pairs:")
    assert row["provenance"]["ranked_by"] == {"by": "scores", "rules": {"keywords": ["e"]}}
    assert "read" in report.render() and str(report.kept) in report.render()


@pytest.mark.parametrize(
    "format, stage, rows", [("pairs", "dpo", 1), ("all_pairs", "dpo", 1), ("rankings", "rm", 1), ("feedback", "kto", 2)]
)
def test_every_format_is_registered_and_read_by_its_stage(made, keys, format, stage, rows):
    from trueup.data.load import load_examples_for

    report = made(build_format=format, register_as="mine")
    assert made(build_format=format, register_as="mine").rows == report.rows  # and again, in the same place
    assert report.rows >= rows * report.kept
    for name in ("mine", report.output):
        cfg = load_config(
            {"model_name_or_path": "m", "stage": stage, "dataset": name, "dataset_dir": keys["dataset_dir"]}
        )
        data = load_examples_for(cfg)
        assert len(data.train) == report.rows and not next(iter(data.report.datasets.values())).dropped
    with pytest.raises(ConfigError, match="'pairs' is taken"):
        made(register_as="pairs")


def test_filters_leave_out_what_they_say(made):
    everything = made()
    kept, rows = everything.kept, rows_of(everything)
    longer = made(max_length_ratio=_middle(map(_length_ratio, rows)))
    assert longer.dropped["length ratio"].count > 0 and longer.kept < kept
    alike = made(max_similarity=_middle(map(_likeness, rows)))
    assert alike.dropped["too alike"].count > 0 and alike.kept < kept
    assert all(adds_up(report) for report in (longer, alike))
    with pytest.raises(ResourceError, match="no prompt gave a row"):
        made(min_margin=1.5)


def test_repeated_prompts_are_answered_once_and_accounted_for(made, keys):
    path = Path(keys["dataset_dir"]) / "pairs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:19], lines[0], '{"instruction": " ", "chosen": "a", "rejected": "b"}']) + "\n")
    report = made()
    assert adds_up(report) and report.reasons["repeated prompt"] == report.reasons["empty prompt"] == 1


# --- the same seed, the same pairs ------------------------------------------------------------------


def test_neither_order_nor_batches_nor_neighbours_change_an_answer(made, keys, tmp_path):
    """In fp32 on one machine; batches may change the last bits of a probability, and so, rarely, a draw."""
    answers = sorted(r["chosen"][0]["content"] for r in rows_of(made()))
    path = Path(keys["dataset_dir"]) / "pairs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    other = made(output_dir=str(tmp_path / "other"), generation_batch_size=3)
    assert sorted(r["chosen"][0]["content"] for r in rows_of(other)) == answers
    again = made(output_dir=str(tmp_path / "more"), num_generations=4, build_format="rankings")
    texts = {a[0]["content"] for r in rows_of(again) for a in r["answers"]}
    assert texts >= set(answers)


def test_another_seed_gives_other_answers(made, tmp_path):
    one, two = made(), made(seed=7, output_dir=str(tmp_path / "two"))
    assert rows_of(one)[0]["chosen"] != rows_of(two)[0]["chosen"] or len(rows_of(one)) != len(rows_of(two))


def test_a_finished_build_is_not_done_again(made, monkeypatch):
    first = made()
    monkeypatch.setattr("trueup.recipes.candidates.load_for_inference", lambda *_: pytest.fail("weights were loaded"))
    before = Path(first.output).read_bytes()
    assert made().kept == first.kept and Path(first.output).read_bytes() == before
    with pytest.raises(ResourceError, match="no prompt gave a row"):  # another rule, the same answers
        made(rule_keywords="\N{SNOWMAN}")


CLI = "import sys; from trueup.cli import main; main(sys.argv[1:])"


def run_cli(keys: dict, fault: str | None = None) -> subprocess.CompletedProcess:
    words = ["data", "build", *(f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in keys.items())]
    environment = {**os.environ, "PYTHONPATH": str(Path(trueup.__file__).parents[1])}
    environment |= {"TRUEUP_FAULT_AT": fault} if fault else {}
    return subprocess.run([sys.executable, "-c", CLI, *words], env=environment, capture_output=True, timeout=300)


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_is_as_if_it_had_not_been(keys, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_cli({**keys, "output_dir": whole}).returncode == 0
    for number in (5, 17):  # answers of the first run, then of the second, in the middle of a group
        assert run_cli({**keys, "output_dir": cut}, f"journal:put:{number}").returncode == -9
        assert not (cut / "pairs.jsonl").exists()
    with open(cut / "journal.jsonl", "ab") as journal:
        journal.write(b'{"key": "abc", "val')  # torn by a crash
    done = run_cli({**keys, "output_dir": cut})
    assert done.returncode == 0, done.stderr
    assert (cut / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert sorted((cut / "journal.jsonl").read_bytes().splitlines()) == sorted(
        (whole / "journal.jsonl").read_bytes().splitlines()
    )


# --- judges -----------------------------------------------------------------------------------------


def test_a_judge_compares_in_both_orders(made):
    with serving(lambda request, number: verdict(request)) as server:
        report = made(**JUDGED, judge_model=server.url)
        assert adds_up(report) and report.complete and report.kept > 3
        for row in rows_of(report):
            assert row["chosen"][0]["content"].count("e") > row["rejected"][0]["content"].count("e")
            assert row["provenance"]["ranked_by"]["model"] == "judge"
        told = report.ranked_by
        assert told["decided_by_place"] == 0 and len(server.requests) == 2 * told["comparisons"]
        assert report.spent["judge"]["prompt_tokens"] == 7 * len(server.requests)
        assert made(**JUDGED, judge_model=server.url).kept == report.kept
        assert len(server.requests) == 2 * told["comparisons"]  # nothing was asked twice


def test_what_a_judge_costs_is_told_in_money(made):
    with serving(lambda request, number: verdict(request)) as server:
        report = made(**JUDGED, judge_model=server.url, judge_price="20000,0")
        assert report.spent["judge"]["cost"] == pytest.approx(0.14 * len(server.requests))
        assert f"out: {0.14 * len(server.requests):,.2f}\n" in report.render()
        again = made(**JUDGED, judge_model=server.url, judge_price="20000,0").spent["judge"]
        assert again["cost"] == pytest.approx(0.14 * len(server.requests)) and again["this_run"]["cost"] == 0


def test_what_is_spent_adds_up_over_a_kill_and_a_resume(keys, tmp_path):
    keys = {**keys, "rule_keywords": None, "max_samples": 6, "requests_at_once": 1, "judge_price": "20000,1000"}
    with serving(lambda request, number: verdict(request)) as server:
        keys |= {"judge_model": server.url}
        answers = 18  # each put into the journal before the judge is asked
        assert run_cli(keys, f"journal:put:{answers + 4}").returncode == -9
        done = run_cli(keys)
        assert done.returncode == 0, done.stderr
        told = json.loads((tmp_path / "built" / "build_report.json").read_text(encoding="utf-8"))["spent"]["judge"]
    # The kill came when four replies were in the journal; more may have been on their way there.
    now = told["this_run"]["requests"]
    assert 4 <= told["requests"] - now <= len(server.requests) - now
    assert 7 * (now + 4) <= told["prompt_tokens"] <= 7 * told["requests"]
    assert told["cost"] == pytest.approx((told["prompt_tokens"] * 20000 + told["completion_tokens"] * 1000) / 1e6)
    assert f"of these {told['this_run']['requests']:,} requests in this run" in done.stdout.decode()


def test_a_price_is_two_numbers(made):
    with pytest.raises(ConfigError, match="a price is two numbers"):
        made(**JUDGED, judge_model="http://127.0.0.1:1#judge", judge_price="3")


def test_a_judge_that_goes_by_place_decides_nothing(made):
    with serving(lambda *_: '{"better": "A"}') as server, pytest.raises(ResourceError, match="tie"):
        made(**JUDGED, judge_model=server.url)


def test_a_judge_that_gives_scores(made):
    def scored(request, number):
        answer = re.search(r"<answer>\n(.*?)\n</answer>", request["messages"][-1]["content"], re.DOTALL)[1]
        return json.dumps({"score": 1 + min(answer.count("e"), 9)})

    with serving(scored) as server:
        report = made(**JUDGED, judge_model=server.url, judge_mode="scores")
        assert all(1 <= r["score_rejected"] < r["score_chosen"] <= 10 for r in rows_of(report))
        assert len(server.requests) <= 63


def test_a_rubric_of_ones_own_is_read_hashed_and_changes_the_question(made, tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Only letters count.", encoding="utf-8")
    with serving(lambda request, number: verdict(request)) as server:
        plain = made(**JUDGED, judge_model=server.url)
        asked = len(server.requests)
        own = made(**JUDGED, judge_model=server.url, judge_rubric=str(rubric))
        assert len(server.requests) == 2 * asked and own.ranked_by["rubric"] != plain.ranked_by["rubric"]
        assert "Only letters count." in server.requests[-1]["messages"][0]["content"]


@pytest.mark.parametrize(
    "fault",
    [Status(429), Status(500), Silence(), "I cannot decide.", Raw(b"<html>busy</html>"), Raw(b"{", 100)],
    ids=str,
)
def test_a_judge_that_fails_now_and_then_loses_nothing(made, fault, tmp_path, monkeypatch):
    """Every fifth comparison fails in the first run; the second has the same pairs as one without faults."""
    monkeypatch.setattr(endpoint, "IN_A_ROW", 1000)
    rng = random.Random(3)
    unlucky: dict[str, bool] = {}

    def sometimes(request, number):
        text = request["messages"][-1]["content"]
        return fault if unlucky.setdefault(text, rng.random() < 0.2) else verdict(request)

    few = {**JUDGED, "max_samples": 8} if isinstance(fault, Silence) else JUDGED
    with serving(lambda request, number: verdict(request)) as server:
        calm = made(**few, judge_model=server.url, output_dir=str(tmp_path / "calm"))
    port = int(re.search(r":(\d+)/", server.url)[1])
    with serving(sometimes, port=port) as server:
        first = made(**{**few, "request_timeout": 0.4}, judge_model=server.url)
        assert not first.complete and first.reasons["judge failed"] > 0
        assert first.read == first.kept + sum(first.reasons.values())
        asked = len(server.requests)
    with serving(lambda request, number: verdict(request), port=port) as server:
        second = made(**few, judge_model=server.url)
        assert second.complete and 0 < len(server.requests) < asked  # only what was missing
    assert Path(second.output).read_bytes() == Path(calm.output).read_bytes()


def test_a_judge_that_is_gone_ends_soon_and_keeps_the_answers(made):
    with serving(lambda request, number: verdict(request)) as server:
        pass
    with pytest.raises(ResourceError, match="no prompt gave a row") as caught:
        made(**JUDGED, judge_model=server.url)
    assert "judge failed" in str(caught.value) and "run the same command again" in str(caught.value)


def test_a_wrong_key_stops_at_once_and_is_in_no_file(made, keys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    refusal = Status(401, text="sk-very-secret is wrong")
    with serving(lambda *_: refusal) as server, pytest.raises(ConfigError, match="HTTP 401"):
        made(**JUDGED, judge_model=server.url, judge_key_env="MY_KEY")
    for path in Path(keys["output_dir"]).iterdir():
        assert b"sk-very-secret" not in path.read_bytes()


def test_a_local_judge_that_talks_nonsense_is_asked_thrice_and_then_waits(made, keys):
    with pytest.raises(ResourceError) as caught:
        made(rule_keywords=None, judge_model=keys["model_name_or_path"], judge_max_tokens=4, max_samples=3)
    assert "judge failed" in str(caught.value)


def test_a_local_judge_is_heard(made, keys, monkeypatch):
    from trueup.rollout.engines import Engine

    decode = Engine.sample

    def reply(engine, prompts, sampling, num_answers=1, seed=0):
        drawn = decode(engine, prompts, sampling, num_answers, seed)
        if num_answers > 1:
            return drawn
        texts = [engine.tokenizer.decode(p) for p in prompts]
        for (answer,), text in zip(drawn, texts, strict=True):
            said = verdict({"messages": [{"content": text}]})
            object.__setattr__(answer, "ids", engine.tokenizer(said)["input_ids"])
        return drawn

    monkeypatch.setattr(Engine, "sample", reply)
    report = made(rule_keywords=None, judge_model=keys["model_name_or_path"], judge_max_tokens=4, max_samples=6)
    assert report.complete and report.kept > 0
    assert all(r["chosen"][0]["content"].count("e") > r["rejected"][0]["content"].count("e") for r in rows_of(report))


# --- other sources and rankers ----------------------------------------------------------------------


def test_endpoints_answer_with_seeds_and_what_fails_waits(made, keys):
    def answer(request, number):
        words = request["messages"][-1]["content"].split()
        if words[0] == first_word:
            return Status(400)
        return random.Random(request["seed"]).choice(words) + "e" * (request["seed"] % 3)

    path = Path(keys["dataset_dir"]) / "pairs.jsonl"
    first_word = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["instruction"].split()[0]
    with serving(answer, model="weak") as server:
        report = made(model_name_or_path=None, sample_from=server.url, rule_regex="ee", rule_keywords=None)
        assert adds_up(report) and report.reasons["no answer"] > 0 and report.kept > 0
        seeds = [request["seed"] for request in server.requests]
        assert len(set(seeds)) == len(seeds) and max(seeds) < 2**31
    row = rows_of(report)[0]
    assert row["provenance"]["chosen"]["model"] == "weak" and row["tokens_chosen"] == 3


def test_several_models_answer_and_the_pair_tells_whose_is_whose(made, keys):
    with serving(lambda request, number: "eee", model="strong") as server:
        report = made(
            model_name_or_path=None, sample_from=f"{keys['model_name_or_path']},{server.url}", num_generations=1,
            rule_keywords=None, rule_regex="^eee$",
        )  # fmt: skip
    # The random model draws by seeds that its path is part of, and now and then nothing but its end.
    assert adds_up(report) and set(report.reasons) <= {"no two answers that differ"} and report.kept > 0
    for row in rows_of(report):
        assert row["provenance"]["chosen"]["model"] == "strong"
        assert row["provenance"]["rejected"]["model"] == keys["model_name_or_path"]


def test_functions_of_ones_own_rank_and_a_file_that_changes_ranks_again(made, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(completions, chosen): return [c.count('e') for c in completions]", encoding="utf-8")
    report = made(rule_keywords=None, reward_funcs=f"{file}:score")
    assert all(r["score_chosen"] == r["chosen"][0]["content"].count("e") for r in rows_of(report))
    file.write_text("def score(completions, chosen): return [-c.count('e') for c in completions]", encoding="utf-8")
    turned = made(rule_keywords=None, reward_funcs=f"{file}:score")
    assert all(r["score_chosen"] == -r["chosen"][0]["content"].count("e") for r in rows_of(turned))
    with pytest.raises(ConfigError, match="has no function"):
        made(rule_keywords=None, reward_funcs=f"{file}:nothing")


def test_log_probabilities_rank_alone_or_against_a_reference(made, keys, tmp_path):
    alone = made(rule_keywords=None, rank_by="logps")
    assert adds_up(alone) and alone.kept > 15
    assert all(r["score_rejected"] < r["score_chosen"] < 0 for r in rows_of(alone))
    with pytest.raises(ResourceError, match="tie"):  # a model against itself
        made(rule_keywords=None, rank_by="logps", ref_model=keys["model_name_or_path"])


@pytest.mark.parametrize("key", ["rule_sql_schema", "judge_rubric"])
def test_a_file_that_is_missing_is_told_before_anything_is_written(made, keys, key):
    needs = {
        "rule_sql_schema": {"rule_format": "sql"},
        "judge_rubric": {**JUDGED, "judge_model": "http://localhost:9/v1#j"},
    }
    with pytest.raises(ConfigError, match=f"{key}: nowhere.txt cannot be read"):
        made(**needs[key], **{key: "nowhere.txt"})
    assert not Path(keys["output_dir"]).exists()


def test_a_build_keeps_out_of_a_runs_directory(made, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("stage: dpo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="training run"):
        made(output_dir=str(tmp_path / "run"))


def test_a_reward_model_ranks_as_it_scores(made, config, tmp_path):
    """What `trueup score` says of the pairs is what they were ranked by."""
    model = str(run(config(stage="rm", max_steps=2, output_dir=str(tmp_path / "rm"))).output_dir)
    report = made(rule_keywords=None, reward_model=model)
    assert adds_up(report) and report.kept > 15
    cfg = load_config(
        {"model_name_or_path": model, "dataset": report.output, "device": "cpu", "bf16": False}, verb="infer"
    )
    _, lines = score(cfg, None)
    found = [pytest.approx(line["rewards"], abs=1e-5) for line in lines]
    assert [[row["score_chosen"], row["score_rejected"]] for row in rows_of(report)] == found


def test_an_adapter_answers_by_its_directory(made, config, keys, tmp_path):
    adapter = str(run(config(max_steps=2, learning_rate=1e-2, output_dir=str(tmp_path / "dpo"))).output_dir)
    base = keys["model_name_or_path"]
    report = made(model_name_or_path=None, sample_from=f"{base},{adapter}", build_format="rankings")
    sources = {source["model"] for row in rows_of(report) for source in row["provenance"]["answers"]}
    assert sources == {base, adapter}
    listed = made(adapter_name_or_path=adapter, build_format="rankings", output_dir=str(tmp_path / "listed"))
    assert rows_of(listed)[0]["provenance"]["answers"][0]["adapters"] == [adapter]


def test_an_interrupt_ends_soon_and_keeps_what_there_is(keys, tmp_path):
    """Also while a judge is silent."""
    keys = {**keys, "max_samples": 4, "rule_keywords": None}
    with serving(lambda request, number: Silence() if number > 5 else verdict(request)) as server:
        keys |= {"judge_model": server.url, "requests_at_once": 1}
        words = [f"{key}={value}" for key, value in keys.items() if value is not None]
        environment = {**os.environ, "PYTHONPATH": str(Path(trueup.__file__).parents[1])}
        command = [sys.executable, "-c", CLI, "data", "build", *words]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 6 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and time.monotonic() - started < 10
    assert "the same command goes on from there" in said
    journal = (tmp_path / "built" / "journal.jsonl").read_text(encoding="utf-8")
    assert journal.count('"better"') == 5
