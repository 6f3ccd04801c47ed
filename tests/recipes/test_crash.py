"""`trueup train` on a real (tiny) model: killed, out of disk, told to stop, damaged. It always goes
on from a valid checkpoint, and ends with the same bits.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.recipes import attempts
from trueup.config.schema import RunConfig, dump_yaml
from trueup.training import checkpoint as checkpoints
from trueup.training import durable
from trueup.training.loop import WALL_CLOCK
from trueup.training.run_directory import read_status

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")

Config = Callable[..., RunConfig]
TUNINGS = {
    "lora": {"lora_dropout": 0.1},
    "full": {
        **{"finetuning_type": "full", "lora_rank": None},
        **{"load_best_model_at_end": True, "eval_steps": 1},
    },
}
KEYS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_dataset": "held",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_steps": 3,
    "plot_loss": False,
}
#: What the clock, the machine or the command line decides.
OWN = {"status.json", "environment.json", "README.md", "logs", ".lock", ".owner.json"}
CLOCK = WALL_CLOCK | {"elapsed_time", "remaining_time", "throughput"}


@dataclass
class Case:
    """A config on disk, the directory it trains in, and where its output goes."""

    file: Path
    output: Path
    log: Path

    def words(self, *overrides: str) -> list[str]:
        return ["train", str(self.file), "resume_from_checkpoint=auto", *overrides]

    def call(self, *overrides: str, **environment: str) -> int:
        """Train, or go on. What an earlier call printed is forgotten."""
        self.log.unlink(missing_ok=True)
        return attempts.call(self.words(*overrides), self.log, **environment)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@pytest.fixture
def make_case(config: Config, tmp_path: Path) -> Callable[..., Case]:
    def make(**keys) -> Case:
        cfg = config(**{**KEYS, **keys})
        file = tmp_path / "run.yaml"
        file.write_text(dump_yaml(cfg), encoding="utf-8")
        return Case(file, Path(cfg.train.output_dir), tmp_path / "said.txt")

    return make


def contents(directory: Path) -> dict[str, object]:
    """Every file of a run, to the bit; text that holds times without them."""
    found: dict[str, object] = {}
    for path in durable.walk_files(directory):
        name = path.relative_to(directory)
        if name.parts[0] in OWN:
            continue
        if path.suffix == ".jsonl":
            found[str(name)] = [_timeless(json.loads(line)) for line in path.open("rb")]
        elif name.parent == Path() and path.suffix == ".json":
            found[str(name)] = _timeless(durable.read_json(path))
        else:
            found[str(name)] = durable.sha256(path)
    return found


def _timeless(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("_runtime", "_per_second"))}
        return {k: _timeless(v) for k, v in kept.items() if k not in CLOCK}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def assert_same(case: Case, whole: dict[str, object], hint: object = "") -> None:
    """The directory is the uninterrupted run's, and nothing of the crash is left in it."""
    found = contents(case.output)
    assert found.keys() == whole.keys(), hint
    assert [name for name in whole if found[name] != whole[name]] == [], hint
    assert not list(case.output.glob(".*.tmp-*")), hint
    assert read_status(case.output)["state"] == "finished"


def uninterrupted(case: Case) -> dict[str, object]:
    """What the run leaves when nobody touches it; the directory and the cache are removed again."""
    assert case.call() == 0, case.said
    whole = contents(case.output)
    assert "metrics.jsonl" in whole and "train_results.json" in whole
    begin_anew(case)
    return whole


def begin_anew(case: Case) -> None:
    shutil.rmtree(case.output, ignore_errors=True)
    shutil.rmtree(os.environ["TRUEUP_CACHE"], ignore_errors=True)


# --- kill -9 at write boundaries --------------------------------------------------------------


def kill_at_boundaries(case: Case, point: str, stride: int = 1) -> int:
    """Run afresh for each boundary, killed there, and go on. Returns how many there were."""
    whole = uninterrupted(case)
    number, killed = 1, 0
    while (code := case.call(TRUEUP_FAULT_AT=f"{point}:{number}")) != 0:
        assert code == -signal.SIGKILL, case.said
        valid = [checkpoint.step for checkpoint in checkpoints.all_valid(case.output)]
        assert case.call() == 0, (number, case.said)
        if valid:  # it went on from there
            assert "saved checkpoint-1\n" not in case.said, number
        assert_same(case, whole, (point, number))
        begin_anew(case)
        number, killed = number + stride, killed + 1
    return killed


def test_killed_at_write_boundaries_of_a_save_goes_on_to_the_bit(make_case) -> None:
    assert kill_at_boundaries(make_case(**TUNINGS["lora"]), "checkpoint:write", stride=23) >= 3


@pytest.mark.prove
@pytest.mark.parametrize("point", ["checkpoint:write", "file:write", "metrics:write"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_killed_at_every_write_boundary_goes_on_to_the_bit(make_case, tuning: str, point) -> None:
    killed = kill_at_boundaries(make_case(**TUNINGS[tuning]), point)
    print(f"\n{tuning}: killed at each of {killed} boundaries {point}")
    assert killed >= {"checkpoint:write": 50, "file:write": 40, "metrics:write": 4}[point]


# --- kill -9 at any time ----------------------------------------------------------------------


def phase(case: Case) -> str:
    """How far a killed run had come, by what it said."""
    said = case.said if case.log.exists() else ""
    if "finished at step" in said:
        return "after the end"
    if "training: " not in said:
        return "reference table" if "reference log-prob" in said else "start-up"
    last = f"/{LONG['max_steps']} "
    return "last step and final model" if f"step {LONG['max_steps']}{last}" in said else "steps"


LONG = {"max_steps": 40, "logging_steps": 1, "eval_steps": 4, "save_steps": 2, "save_total_limit": 3}


def kill_at_random_times(case: Case, times: int, seed: int) -> Counter[str]:
    """Kill one run again and again, a cache of its own each round; whatever is left goes on."""
    whole = uninterrupted(case)
    begun = time.monotonic()
    assert uninterrupted(case) == whole  # timed when the server is warm
    seconds = time.monotonic() - begun
    dice = random.Random(seed)
    phases: Counter[str] = Counter()
    while phases.total() < times:
        process = attempts.start(case.words(), case.log)
        process.join(dice.uniform(0.0, 1.1 * seconds))
        process.kill()  # SIGKILL; nothing happens if it has ended
        code = attempts.finish(process)
        assert code in (0, -signal.SIGKILL), case.said
        if code:
            phases[phase(case)] += 1
            if checkpoints.checkpoints(case.output):
                assert checkpoints.newest_valid(case.output) is not None
        else:
            assert_same(case, whole)
            begin_anew(case)
        case.log.unlink(missing_ok=True)
    assert case.call() == 0, case.said
    assert_same(case, whole)
    return phases


@pytest.mark.prove
@pytest.mark.parametrize(("tuning", "seed"), [("lora", 1), ("full", 2)])
def test_killed_at_random_times_goes_on_to_the_bit(make_case, tuning: str, seed: int) -> None:
    phases = kill_at_random_times(make_case(**{**LONG, **TUNINGS[tuning]}), 60, seed)
    print(f"\n{tuning}: killed {phases.total()} times: {dict(phases)}")
    assert {"start-up", "steps"} <= phases.keys()


# --- a disk that refuses ----------------------------------------------------------------------


def refuse_at_boundaries(case: Case, point: str, error: str, stride: int = 1) -> int:
    """Run afresh for each boundary, the disk refusing there, and go on. Returns how many."""
    whole = uninterrupted(case)
    text = os.strerror(getattr(errno, error))
    number, refused = 1, 0
    while True:
        code = case.call(TRUEUP_FAULT_AT=f"{point}:{number}:{error}")
        if text not in case.said:
            assert code == 0, case.said
            return refused
        if code == 0:  # nothing that a resume needs: a warning, and it went on
            assert "warning: " in case.said and weights(contents(case.output)) == weights(whole)
        else:
            assert_one_clear_error(case, code)
            assert case.call() == 0, (number, case.said)
            assert_same(case, whole, (point, number))
        begin_anew(case)
        number, refused = number + stride, refused + 1


def weights(found: dict[str, object]) -> dict[str, object]:
    return {name: content for name, content in found.items() if name.endswith(".safetensors")}


def assert_one_clear_error(case: Case, code: int) -> None:
    """Exit code 4, one error with the way out, the last good checkpoint and no stage."""
    said = case.said
    assert code == 4, said
    assert said.count("\nerror: ") == 1 and "Traceback" not in said, said
    assert "resume_from_checkpoint: auto" in said, said
    assert not list(case.output.glob(".*.tmp-*"))
    saved = checkpoints.checkpoints(case.output)
    assert len(checkpoints.all_valid(case.output)) == len(saved)


@pytest.mark.prove
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("point", ["checkpoint:write", "file:write", "metrics:write"])
def test_a_disk_that_refuses_is_one_error_and_the_last_checkpoint_stays(make_case, point: str, error: str) -> None:
    case = make_case(**TUNINGS["lora"])
    print(f"\n{point} {error}: {refuse_at_boundaries(case, point, error)} boundaries")


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(make_case) -> None:
    assert refuse_at_boundaries(make_case(**TUNINGS["lora"]), "checkpoint:write", "ENOSPC", 40) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size, or gives the mounted one another size."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(size: str) -> Path:
        how = f"size={size}" + (",remount" if directory.is_mount() else "")
        words = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(directory)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"there is no mount: {error}")
        if done.returncode:
            pytest.skip(f"may not mount a small disk: {done.stderr.strip()}")
        return directory

    yield mount
    if directory.is_mount():
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.prove
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_disk_that_is_really_full_is_one_error_and_the_run_goes_on_when_there_is_room(
    make_case, small_disk, tuning: str
) -> None:
    """The disk fills up during start-up, a save, a log line, the final model, depending on size."""
    directory = small_disk("64m")
    case = make_case(**TUNINGS[tuning], output_dir=str(directory / "out"))
    whole = uninterrupted(case)
    kilobytes, times = 4.0, 0
    small_disk("4k")
    while code := case.call():
        assert_one_clear_error(case, code)
        small_disk("64m")
        assert case.call() == 0, (kilobytes, case.said)
        assert_same(case, whole, kilobytes)
        begin_anew(case)
        kilobytes, times = kilobytes * 1.15, times + 1
        small_disk(f"{kilobytes:.0f}k")
    print(f"\n{tuning}: {times} disks were too small, {kilobytes:.0f} kB was enough")
    assert_same(case, whole)
    assert times > 20


# --- signals ----------------------------------------------------------------------------------

SLOW = {"max_steps": 4000, "logging_steps": 1, "save_steps": 1000, "eval_strategy": "no"} | {"eval_dataset": None}
MODULE = ["-m", "trueup"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *MODULE]


def start_process(case: Case, *words: str, launcher: list[str] = MODULE, **environment: str):
    """A real `python -m trueup` in a process group of its own; its output goes to `case.log`."""
    with open(case.log, "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, *(words or case.words())],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )


def wait_until(case: Case, text: str, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while text not in case.said:
        assert process.poll() is None and time.monotonic() < end, case.said
        time.sleep(0.02)


def printed_command(case: Case) -> str:
    [line] = [line for line in case.said.splitlines() if "resume with: " in line]
    return line.partition("resume with: ")[2]


def type_in(command: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """A line as a person pastes it into a shell on whose PATH `trueup` is."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    script = folder / "trueup"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m trueup "$@"\n', "utf-8")
    script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.prove
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("options", [[], ["--new_run"]], ids=["plain", "new-run"])
def test_a_signal_saves_and_the_printed_command_goes_on(
    make_case, tmp_path: Path, name: str, options: list[str]
) -> None:
    case = make_case(**{**TUNINGS["lora"], **SLOW, "max_steps": 60})
    # A name that a shell would take apart, and a directory that `new_run` finds taken.
    output = case.output.with_name("out of time")
    words = ["train", str(case.file), f"output_dir={output}", *options]
    if options:
        (output / "earlier").mkdir(parents=True)
        output = output.with_name("out of time-2")
    process = start_process(case, *words)
    wait_until(case, "step 3/60", process)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == {"SIGINT": 130, "SIGTERM": 143}[name], case.said
    step = read_status(output)["step"]
    assert checkpoints.newest_valid(output).step == step < 60
    assert f"stopped at step {step} of 60; saved checkpoint-{step}" in case.said
    done = type_in(printed_command(case), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open("rb")]
    assert steps == list(range(1, 61))
    assert read_status(output)["state"] == "finished"


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stays(make_case) -> None:
    case = make_case(**{**SLOW, "save_steps": 1, "save_total_limit": 2})
    process = attempts.start(case.words(), case.log)
    wait_for(lambda: len(checkpoints.checkpoints(case.output)) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    begun = time.monotonic()
    assert attempts.finish(process) in (130, 143)
    assert time.monotonic() - begun < 5
    assert checkpoints.newest_valid(case.output) is not None
    assert len(checkpoints.all_valid(case.output)) == len(checkpoints.checkpoints(case.output))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.prove
@pytest.mark.parametrize("who", ["the launcher", "everyone", "everyone, without the launcher"])
@pytest.mark.parametrize("launcher", ["torchrun", "trueup"])
def test_sigterm_stops_two_processes_and_they_go_on_together(
    make_case, tmp_path: Path, launcher: str, who: str
) -> None:
    """As `kill`, Slurm and a machine that is taken away send it; one save, no process left."""
    case = make_case(**{**TUNINGS["lora"], **SLOW, "max_steps": 60})
    words = ["train", str(case.file)]
    if launcher == "torchrun":
        process = start_process(case, *words, launcher=TORCHRUN)
    else:
        process = start_process(case, *words, NPROC_PER_NODE="2")
    wait_until(case, "step 3/60", process)
    workers = psutil.Process(process.pid).children(recursive=True)
    if who != "the launcher":
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
    if who != "everyone, without the launcher":
        process.terminate()
    code = process.wait(120)
    assert code == 143 or launcher == "torchrun" and code, case.said  # torchrun's own code is 1
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    step = read_status(case.output)["step"]
    assert checkpoints.newest_valid(case.output).step == step < 60, case.said
    done = type_in(printed_command(case), tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (case.output / "metrics.jsonl").open("rb")]
    assert steps == list(range(1, 61))


# --- damage, changes, company -----------------------------------------------------------------


@pytest.fixture
def saved_case(make_case) -> Case:
    """A finished LoRA run with three checkpoints."""
    case = make_case(**TUNINGS["lora"], save_total_limit=None)
    assert case.call() == 0, case.said
    return case


def damage(checkpoint: Path) -> tuple[Path, str, str]:
    """Flip one bit. Returns the file, the hash it had and the one it has."""
    file = checkpoint / "optimizer.safetensors"
    data, before = file.read_bytes(), durable.sha256(file)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return file, before, durable.sha256(file)


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_named(saved_case: Case) -> None:
    case, whole = saved_case, contents(saved_case.output)
    file, before, after = damage(case.output / "checkpoint-3")
    named = f"resume_from_checkpoint={file.parent}"
    assert attempts.call(["train", str(case.file), named], case.log) == 7, case.said
    assert all(text in case.said for text in (str(file), before, after)), case.said
    assert case.call() == 0, case.said
    assert "warning: checkpoint-3 cannot be trusted and is passed over" in case.said
    aside = case.output / "checkpoint-3.set-aside-1"
    assert (aside / file.name).is_file()  # nothing is deleted
    shutil.rmtree(aside)
    assert_same(case, whole)


def test_what_may_change_between_the_checkpoint_and_its_resume(saved_case: Case) -> None:
    case, data = saved_case, saved_case.file.with_name("data") / "pairs.jsonl"
    before = contents(case.output)

    def refused(*overrides: str, text: str) -> None:
        assert case.call(*overrides) == 7, case.said
        assert text in case.said and "Traceback" not in case.said, case.said
        assert contents(case.output) == before, "a refusal writes nothing"

    refused("lora_rank=2", text="lora_rank was 4, is 2")
    refused("lora_rank=2", "allow_changed=lora_rank", text="trained parameters differ")
    refused("per_device_train_batch_size=4", text="effective_batch was 4, is 8")
    rows = data.read_text(encoding="utf-8")
    data.write_text(rows.replace("sun", "moon"), encoding="utf-8")
    refused(text="data_fingerprint")
    data.write_text(rows, encoding="utf-8")
    assert case.call("logging_steps=1") == 0, case.said
    assert "warning" not in case.said and "changed" not in case.said, case.said
    assert case.call("max_steps=4", "lora_alpha=4", "allow_changed=lora_alpha") == 0, case.said
    assert "lora_alpha was 8, is 4" in case.said and "max_steps was 3, is 4" in case.said


def test_another_number_of_threads_is_said(saved_case: Case) -> None:
    case = saved_case
    assert case.call("max_steps=4", OMP_NUM_THREADS="2") == 0, case.said
    assert "not exact to the bit: threads was 1, is 2" in case.said


def test_a_second_trainer_is_refused_at_once(make_case) -> None:
    case = make_case(**SLOW)
    owner = attempts.start(case.words(), case.log)
    wait_for(lambda: read_status(case.output)["state"] == "running")
    second = case.log.with_name("second.txt")
    try:
        for words in (case.words(), ["train", str(case.file)], case.words("max_steps=7")):
            second.unlink(missing_ok=True)
            assert attempts.call(words, second) == 4
            said = second.read_text(encoding="utf-8")
            assert f"another process works in this directory: pid {owner.pid} " in said
            assert "p95" not in said, "the data was read before it was said"
    finally:
        owner.kill()
        attempts.finish(owner)
    assert case.call("max_steps=1") == 0, case.said  # a dead owner's lock is free


# --- the cache of the reference's log-probabilities -------------------------------------------


def test_two_runs_that_fill_one_cache_end_as_one_alone(make_case, tmp_path: Path) -> None:
    case = make_case(**TUNINGS["full"])
    whole = weights(uninterrupted(case))
    outputs = [tmp_path / f"side-by-side-{i}" for i in range(3)]
    logs = [output.with_suffix(".txt") for output in outputs]
    running = [
        attempts.start(case.words(f"output_dir={output}"), log) for output, log in zip(outputs, logs, strict=True)
    ]
    codes = [attempts.finish(process) for process in running]
    assert codes == [0, 0, 0], [log.read_text(encoding="utf-8") for log in logs]
    for output in outputs:
        assert weights(contents(output)) == whole
    assert not list(Path(os.environ["TRUEUP_CACHE"]).rglob(".*"))


def test_a_run_with_other_batches_shares_the_table_and_changes_no_bit(make_case, tmp_path: Path) -> None:
    """Whoever fills the cache first, a run ends the same: the table is computed in a layout that is no run's own."""
    case = make_case(**TUNINGS["lora"])
    whole = uninterrupted(case)
    other = ["per_device_train_batch_size=3", f"output_dir={tmp_path / 'other'}"]
    assert case.call(*other) == 0, case.said
    assert case.call() == 0, case.said
    assert_same(case, whole)


@pytest.mark.parametrize("damaged", [False, True], ids=["lost", "damaged"])
def test_a_resume_without_the_cache_goes_on_to_the_bit(make_case, damaged: bool) -> None:
    case = make_case(**TUNINGS["full"])
    whole = uninterrupted(case)
    assert case.call(TRUEUP_FAULT_AT="metrics:write:4") == -signal.SIGKILL
    tables = list(Path(os.environ["TRUEUP_CACHE"]).rglob("*.safetensors"))
    assert len(tables) == 2
    for table in tables:
        if damaged:
            table.write_bytes(table.read_bytes()[:-8] + bytes(8))
        else:
            table.unlink()
    assert case.call() == 0, case.said
    assert case.said.count("are computed again") == (2 if damaged else 0)
    assert_same(case, whole)
