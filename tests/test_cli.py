"""The command line as a user meets it: verbs, messages, exit codes, terminals of every kind."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from trueup import __version__, cli, launch
from trueup.cli import LATER, main
from trueup.cli_options import split_source
from trueup.console import Session, show_problems
from trueup.errors import ConfigError, DataError, Problem, UserError


def run(*words: str, **how) -> Result:
    return CliRunner().invoke(main, list(words), **how)


def run_process(*words: str, **how) -> subprocess.CompletedProcess:
    environment = {**os.environ, **how.pop("env", {})}
    command = [sys.executable, "-m", "trueup", *words]
    how = {"capture_output": True, "text": True, "timeout": 120, "check": False, **how}
    return subprocess.run(command, env=environment, **how)


# --- verbs -------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_what_is_to_come():
    shown = run("--help").output
    for name in main.commands:
        assert f"  {name} " in shown
    assert shown == run("-h").output == run("help").output


@pytest.mark.parametrize("words", [(), ("data",)])
def test_without_a_verb_the_help_is_shown_and_no_error(words: tuple[str, ...]):
    shown = run(*words)
    assert shown.exit_code in (0, 2)  # as click has it
    assert "Usage:" in shown.output and "error" not in shown.output


@pytest.mark.parametrize("name", [name for name in main.commands if name not in LATER])
def test_every_verb_has_help(name: str):
    short, long = run(name, "-h"), run(name, "--help")
    assert short.exit_code == 0
    assert short.output == long.output == run("help", name).output


def test_version_in_all_its_spellings():
    assert run("version").output == run("--version").output == run("-V").output == f"trueup {__version__}\n"


@pytest.mark.parametrize("name", LATER)
def test_a_verb_to_come_says_what_to_use_until_then(name: str):
    result = run(name, "--model_name_or_path", "x", "--whatever")
    assert result.exit_code == 2
    assert "arrives with" in result.stderr
    assert "until then" in result.stderr


@pytest.mark.parametrize("name", ["webui", "webchat"])
def test_the_studio_has_other_names(name: str):
    assert main.get_command(click.Context(main), name) is main.commands["web"]


def test_env_is_doctor():
    assert main.get_command(click.Context(main), "env") is main.commands["doctor"]


def test_a_mistyped_verb_is_told_the_near_one():
    result = run("trian")
    assert result.exit_code == 2
    assert "did you mean `trueup train`?" in result.stderr


def test_a_config_without_a_verb_is_told_the_verb():
    result = run("dpo.yaml")
    assert result.exit_code == 2
    assert "`trueup train dpo.yaml`" in result.stderr


def test_help_explains_a_key_and_names_near_ones():
    assert "default: 0.1" in run("help", "pref_beta").output
    assert run("help", "--pref-beta").output == run("help", "pref_beta").output
    wrong = run("help", "pref_betta")
    assert wrong.exit_code == 2
    assert "pref_beta" in wrong.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_TRUEUP_COMPLETE" in result.output


def test_completion_knows_verbs_and_config_keys():
    def complete(words: str, number: int) -> str:
        env = {"_TRUEUP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        return run_process(env=env).stdout

    assert "plain,train" in complete("trueup tra", 1)
    assert "plain,pref_beta=" in complete("trueup train a.yaml pref_b", 3)
    assert "plain,--pref_beta" in complete("trueup train --pref_b", 2)
    assert "file," in complete("trueup train exa", 2)


@pytest.mark.parametrize(
    ("words", "number", "offered"),
    [
        ("trueup train stage=dp", 2, "plain,stage=dpo"),
        ("trueup train a.yaml stage = dp", 5, "plain,dpo"),  # as bash cuts it
        ("trueup train --finetuning_type fr", 3, "plain,freeze"),
        ("trueup train --plot_loss f", 3, "plain,false"),
    ],
)
def test_completion_knows_the_values_of_a_key(words: str, number: int, offered: str):
    env = {"_TRUEUP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    assert run_process(env=env).stdout.split() == [offered]


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "source", "overrides"),
    [
        ([], None, []),
        (["a.yaml"], "a.yaml", []),
        (["dir with space/A.YML", "seed=1"], "dir with space/A.YML", ["seed=1"]),
        (["a.json", "--seed", "1"], "a.json", ["--seed", "1"]),
        (["dataset=a.json"], None, ["dataset=a.json"]),
        (["--dataset", "a.json"], None, ["--dataset", "a.json"]),
        (["--config", "a.cfg", "seed=1"], "a.cfg", ["seed=1"]),
        (["--seed", "1", "--config=a.yaml"], "a.yaml", ["--seed", "1"]),
    ],
)
def test_only_a_first_word_that_is_a_file_name_is_the_config(words, source, overrides):
    assert split_source(words) == (source, overrides)


def test_a_first_word_that_is_a_directory_or_another_file_is_told_so(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert f"{tmp_path / 'run.yaml'} is the config of the run" in run("train", str(tmp_path)).stderr
    (tmp_path / "notes.txt").write_text("seed: x\n", encoding="utf-8")
    shown = run("train", str(tmp_path / "notes.txt")).stderr
    assert f"`--config {tmp_path / 'notes.txt'}` reads it anyway" in shown
    assert "seed" in run("train", "--config", str(tmp_path / "notes.txt")).stderr


def test_words_reach_the_config_as_they_were_typed(monkeypatch: pytest.MonkeyPatch):
    seen: list = []

    def load_config(source, overrides, **how):
        seen.append((source, overrides))
        raise ConfigError("enough")

    monkeypatch.setattr("trueup.config.load.load_config", load_config)
    words = [
        "--fp16",
        "--learning_rate",
        "-1e-5",
        "--default_system",
        "You are kind.",
        "lora_target=[a,b]",
        "--x=-h",
    ]
    run("train", "a.yaml", *words)
    run("--json", "check", "a.yaml", *words, "--debug")
    assert seen == [("a.yaml", words)] * 2


# --- errors ------------------------------------------------------------------------------------


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    def load_config(*_, **__):
        raise error

    monkeypatch.setattr("trueup.config.load.load_config", load_config)
    return run("check", *words)


def test_a_user_error_is_a_message_and_an_exit_code_without_traceback(
    monkeypatch: pytest.MonkeyPatch,
):
    error = DataError("no column `chosen`", where="pairs.json:3", expected="prompt, chosen", fix="rename it")
    result = fail_with(error, monkeypatch)
    assert result.exit_code == 3
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first == "error: pairs.json:3: no column `chosen`"
    assert rest == ["    expected: prompt, chosen", "    fix: rename it"]


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch):
    assert "Traceback" in fail_with(DataError("broken"), monkeypatch, "--debug").stderr


def test_all_problems_are_listed_and_what_exceeds_a_screen_is_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    problems = [Problem(f"problem {i}", fix="mend it") for i in range(14)]
    shown = fail_with(ConfigError(problems), monkeypatch).stderr
    assert "14 problems" in shown
    assert "problem 9" in shown
    assert "problem 10" not in shown
    assert "4 more" in shown
    assert len(shown.splitlines()) <= 24


def test_json_errors_carry_every_problem(monkeypatch: pytest.MonkeyPatch):
    problems = [Problem(f"problem {i}", where=f"a.yaml:{i}") for i in range(14)]
    result = fail_with(ConfigError(problems), monkeypatch, "--json")
    content = json.loads(result.stdout)
    assert result.stderr == ""
    assert (content["ok"], content["exit_code"], len(content["problems"])) == (False, 2, 14)
    assert content["problems"][3] == {
        "what": "problem 3",
        "where": "a.yaml:3",
        "expected": None,
        "fix": None,
    }


def test_a_bug_says_it_is_ours_and_where_its_traceback_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = fail_with(ZeroDivisionError("by zero"), monkeypatch)
    assert result.exit_code == 1
    assert "this is a bug in trueup: ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError: by zero" in (tmp_path / "trueup-error.txt").read_text(encoding="utf-8")


def test_ctrl_c_leaves_with_130(monkeypatch: pytest.MonkeyPatch):
    result = fail_with(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_brackets_in_messages_are_text_not_markup(capsys: pytest.CaptureFixture):
    show_problems([Problem("[red]lora_target=[q_proj]")])
    show_problems([Problem("[red]one[/]"), Problem("[bold]two")])
    assert capsys.readouterr().err.count("[red]") == 2


def test_wrong_options_are_usage_errors():
    result = run("runs", "--colour")
    assert result.exit_code == 2
    assert "trueup runs -h" in result.stderr


def started_by(pid: int, directory: Path) -> Session:
    directory.mkdir()
    (directory / "status.json").write_text(json.dumps({"pid": pid}), encoding="utf-8")
    return Session(output_dir=directory)


def test_the_error_goes_into_the_log_of_the_run_this_process_started(tmp_path: Path):
    def work():
        raise UserError("the disk is full")

    ours = started_by(os.getpid(), tmp_path / "ours")
    assert ours.run(work) == 1
    assert ours.run(work) == 1
    log = (tmp_path / "ours" / "logs" / "error.txt").read_text(encoding="utf-8")
    assert log.count("the disk is full") >= 2
    assert "Traceback" in log


def test_another_runs_directory_is_left_alone(tmp_path: Path):
    def work():
        raise ConfigError("output_dir is in use")

    started_by(1, tmp_path / "theirs").run(work)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["status.json"]


# --- notices -----------------------------------------------------------------------------------


def say_things(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*_, **__):
        log = logging.getLogger("trueup.config")
        for _ in range(2):
            log.warning("fp16 is not there; computing in %s", "fp32")
        log.info("a detail")
        raise ConfigError("enough")

    monkeypatch.setattr("trueup.config.load.load_config", load_config)


def test_notices_are_said_once_on_stderr(monkeypatch: pytest.MonkeyPatch):
    say_things(monkeypatch)
    shown = run("check").stderr
    assert shown.startswith("warning: fp16 is not there; computing in fp32\nnote: a detail\n")


def test_notices_are_part_of_the_json(monkeypatch: pytest.MonkeyPatch):
    say_things(monkeypatch)
    result = run("check", "--json")
    assert result.stderr == ""
    assert [n["level"] for n in json.loads(result.stdout)["notices"]] == ["warning", "note"]


def test_what_several_processes_will_say_is_not_said_before(monkeypatch: pytest.MonkeyPatch):
    words = ["--model_name_or_path", "m", "--dataset", "d", "--lr", "1e-5"]
    monkeypatch.setattr(launch, "launch", lambda words, num_gpus: 5)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert (run("train", *words).exit_code, run("train", *words).stderr) == (5, "")
    assert run("train", *words, "--seed", "x").stderr.startswith("note: `lr` is read as `learning_rate`\n")


# --- terminals ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe whose reader can leave first")
def test_a_reader_that_leaves_early_is_no_error():
    """T20: `trueup help keys | head -1`."""
    for words in (["help", "keys"], ["--help"], ["version"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "trueup", *words]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_show_a_character_gets_a_stand_in(encoding: str, tmp_path: Path):
    config = tmp_path / "bad.yaml"
    config.write_text("学习率: 1e-5\n", encoding="utf-8")
    done = run_process("check", str(config), env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "???" in done.stderr


def test_colour_only_where_there_is_a_terminal_that_wants_it():
    for environment in ({}, {"NO_COLOR": "1", "FORCE_COLOR": ""}):
        assert "\x1b[" not in run_process("export", env=environment).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_command_in_a_message_is_one_line_on_a_narrow_terminal():
    """What folds it is the terminal, so that it can be pasted."""
    command = "trueup train " + "/a/long/name" * 9 + " resume_from_checkpoint=auto"
    problem = Problem("stopped", fix=f"resume with: {command}")
    script = f"import pty, sys; pty.spawn([sys.executable, '-c', {SHOW_PROBLEM!r}, {problem.fix!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ, "COLUMNS": "40"})
    assert f"    fix: resume with: {command}" in done.stdout.decode().splitlines(), done


SHOW_PROBLEM = (
    "import sys; from trueup.console import show_problems; from trueup.errors import Problem; "
    "show_problems([Problem('stopped', fix=sys.argv[1])], 'stopped')"
)


def test_a_narrow_terminal_does_not_crash():
    done = run_process("--help", env={"COLUMNS": "20"})
    assert done.returncode == 0


# --- several processes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "environment", "requested", "processes"),
    [
        (1, {}, False, 1),
        (4, {}, True, 4),
        (4, {"NPROC_PER_NODE": "1"}, False, 1),
        (4, {"FORCE_TORCHRUN": "0"}, False, 1),
        (4, {"NNODES": "2"}, True, 8),
        (0, {"FORCE_TORCHRUN": "1"}, True, 1),
        (0, {"FORCE_TORCHRUN": "0"}, False, 1),
        (0, {"NPROC_PER_NODE": "1"}, False, 1),
        (0, {"NPROC_PER_NODE": "2"}, True, 2),
        (0, {"NNODES": "2"}, True, 2),
        (4, {"FORCE_TORCHRUN": "true", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}, False, 3),
    ],
)
def test_when_train_starts_several_processes(num_gpus, environment, requested, processes):
    assert launch.is_requested(num_gpus, environment) is requested
    assert launch.num_processes(num_gpus, environment) == processes


def test_a_value_with_spaces_survives_the_launch():
    words = ["a b.yaml", "default_system=You are kind."]
    made = launch.launcher_words(words, 0, {"NPROC_PER_NODE": "2"})
    assert made == ["--standalone", "--nproc-per-node=2", "--module", "trueup", "train", *words]


def test_a_launch_over_machines_names_them():
    environment = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29501",
    }
    made = launch.launcher_words([], 4, environment)
    wanted = [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29501",
        "--nproc-per-node=4",
    ]
    assert made[:5] == wanted


def test_an_elastic_launch_has_a_rendezvous():
    made = launch.launcher_words([], 1, {"RDZV_ID": "job", "MIN_NNODES": "1", "MAX_NNODES": "4", "MAX_RESTARTS": "3"})
    assert {"--nnodes=1:4", "--max-restarts=3", "--rdzv-id=job"} <= set(made)


def test_a_number_that_is_none_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NPROC_PER_NODE", "two")
    result = run("train", "--model_name_or_path", "m", "--dataset", "d")
    assert result.exit_code == 2
    assert "NPROC_PER_NODE" in result.stderr


@pytest.mark.slow
def test_a_failing_worker_gives_its_exit_code(tmp_path: Path):
    """Words with spaces arrive, and the parent leaves with the code of the process that failed."""
    missing = tmp_path / "no such.jsonl"
    words = [
        "--model_name_or_path",
        str(tmp_path / "no model"),
        "--stage",
        "sft",
        "--dataset",
        str(missing),
    ]
    done = run_process("train", *words, "--output_dir", str(tmp_path / "out"), env={"NPROC_PER_NODE": "2"})
    assert done.returncode in (3, 6), done.stderr
    assert "ChildFailedError" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- init --------------------------------------------------------------------------------------


def test_init_writes_a_config_that_loads_and_never_overwrites(tmp_path: Path):
    target = tmp_path / "sub" / "mine.yaml"
    written = run("init", str(target), "--stage", "sft", "--model", "some/model")
    assert written.exit_code == 0
    text = target.read_text(encoding="utf-8")
    assert "model_name_or_path: some/model" in text
    cfg = cli.read_config([str(target)])
    assert cfg.objective.stage == "sft"

    target.write_text("mine", encoding="utf-8")
    again = run("init", str(target))
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert target.read_text(encoding="utf-8") == "mine"
    assert run("init", str(target), "--force").exit_code == 0


def test_init_prints_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "stage: dpo" in run("init", "-").output
    assert list(tmp_path.iterdir()) == []


def test_init_writes_only_files_that_the_verbs_read(tmp_path: Path):
    result = run("init", str(tmp_path / "dpo.txt"))
    assert (result.exit_code, "dpo.txt.yaml" in result.stderr, list(tmp_path.iterdir())) == (2, True, [])


def test_json_of_init_and_help_and_verbs_that_have_none(tmp_path: Path):
    target = tmp_path / "a.yaml"
    assert json.loads(run("init", str(target), "--json").stdout)["result"] == {"file": str(target)}
    assert "default: 0.1" in json.loads(run("help", "pref_beta", "--json").stdout)["result"]
    for words in (["chat", "--model", "m"], ["completion", "bash"]):
        assert "no --json" in json.loads(run("--json", *words).stdout)["problems"][0]["what"]


def test_help_prints_the_json_schema():
    assert "pref_beta" in json.loads(run("help", "schema").stdout)["properties"]


def test_init_refuses_a_stage_that_is_none():
    result = run("init", "-", "--stage", "dqo")
    assert result.exit_code == 2
