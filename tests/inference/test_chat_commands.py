"""What a conversation can be told: settings, candidates, preferences; several models side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

import trueup
from tests.inference.test_chat import adapter_dir, config, model_dir, talk  # noqa: F401
from tests.rollout.judge_server import Status, serving
from tests.rollout.test_other_engines import events
from trueup.config.load import load_config
from trueup.data.load import load_examples_for
from trueup.inference.chat import Conversation, load_sides, sampling_of
from trueup.inference.chat.pairs import PairFile
from trueup.inference.chat.screen import Coming, Screen
from trueup.inference.chat.settings import changed
from trueup.inference.thoughts import Split, split
from trueup.rollout import endpoint
from trueup.rollout.engines import Sampling
from trueup.rollout.generation import Generation
from trueup.rollout.sampling import Piece


def screen(width: int = 80, terminal: bool = False) -> Screen:
    return Screen(
        Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, _environ={})
    )  # fmt: skip


def shown(conversation: Conversation) -> str:
    """What has come since one looked last."""
    file = conversation.screen.console.file
    text = file.getvalue()
    file.seek(0)
    file.truncate()
    return text


@pytest.fixture
def conversation(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> Conversation:  # noqa: F811
    """A base and its adapter, whose answers end by themselves."""
    cfg = config(model_dir, "--adapter_name_or_path", str(adapter_dir), "--bf16=false")
    pairs = PairFile(tmp_path / "data" / "said.jsonl", tmp_path / "data")
    return Conversation(load_sides(cfg, compare=True), sampling_of(cfg), [], screen(), pairs)


def ended(conversation: Conversation) -> None:
    for one in conversation.candidates:
        one.ended = True


# --- thoughts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nlong\nthought\n</think>\n\nyes", False, ("long\nthought", "yes")),
        ("a thought</think>\nyes", True, ("a thought", "yes")),
        ("<think>\n\n</think>\n\nyes", False, ("", "yes")),
        ("  a < b, <b>, </think>", False, ("", "  a < b, <b>, </think>")),
        ("<think>cut", False, ("cut", "")),
        ("", False, ("", "")),
    ],
)
def test_thoughts_are_told_from_answers_however_the_text_comes(text, opened, expected, size):
    found = Split(opened)
    for start in range(0, len(text), size):
        found.push(text[start : start + size])
        assert "</think" not in found.thought
    found.finish()
    assert (found.thought.strip("\n"), found.said) == expected


def coming(*pieces: str, opened: bool = False) -> Coming:
    generation = Generation((1,), Sampling(), None, 0)
    for text in pieces:
        generation.emit(Piece(text, (1,)))
    generation.emit(Piece("", finish_reason="stop"))
    return Coming("assistant", generation, opened)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 40])
def test_a_thought_is_one_line_until_it_is_asked_for(width, terminal):
    page = screen(width, terminal)
    one = coming("<thi", "nk>\n用户想要", "一个名字。\n</think>\n\n小明")
    page.answers([one])
    text = page.console.file.getvalue()
    assert "小明" in text and "用户" not in text and "/thoughts" in text
    assert all(cell_len(line.rpartition("\x1b[2K")[2]) <= width for line in text.split("\n") if "/thoughts" in line)
    page.unfolded = True
    page.answers([coming("x</think>y", opened=True)])
    assert "x" in page.console.file.getvalue()
    assert split(one.whole) == ("用户想要一个名字。", "小明")


def test_what_could_steer_a_terminal_is_not_passed_on():
    for count in (1, 2):
        page = screen(80, terminal=True)
        page.answers([coming("a\x1b]0;owned\x07b\x9b2J") for _ in range(count)])
        assert "\x1b]0" not in page.console.file.getvalue() and "\x9b" not in page.console.file.getvalue()


@pytest.mark.parametrize("width", [80, 40])
def test_chinese_answers_keep_to_the_width(width):
    page = screen(width, terminal=True)
    page.answers([coming("查询所有用户的名字，" * 12) for _ in range(2)])
    if width == 80:
        lines = page.console.file.getvalue().rpartition("┏")[2].splitlines()
        assert all(cell_len(line) <= width for line in lines)
    assert page.console.file.getvalue().count("查询") >= 24


# --- settings ----------------------------------------------------------------------------------


def test_settings_change_on_the_fly():
    sampling = Sampling()
    for words in ("temperature 0.3", "top_k=7", "max_tokens 12", "seed 5", "stop END"):
        sampling = changed(sampling, words)
    assert sampling == Sampling(temperature=0.3, top_k=7, max_new_tokens=12, seed=5, stop=("END",))
    assert changed(changed(sampling, "seed none"), "stop off") == Sampling(
        temperature=0.3, top_k=7, max_new_tokens=12
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("temprature 1", "did you mean temperature"),
        ("top_k x", "whole number"),
        ("top_p 2", "top_p 2"),
        ("seed", "VALUE"),
    ],
)
def test_settings_that_cannot_be_are_told(words, told):
    with pytest.raises(ValueError, match=told):
        changed(Sampling(), words)


# --- the conversation --------------------------------------------------------------------------


def test_undo_and_regenerate(conversation: Conversation):
    conversation.hear("hello")
    first = [side.messages[-1].content for side in conversation.sides]
    conversation.hear("/set temperature 1.5")
    conversation.hear("/regenerate")
    assert [len(side.messages) for side in conversation.sides] == [2, 2]
    assert len(conversation.candidates) == 4 and [c.text for c in conversation.candidates[:2]] == first
    assert conversation.candidates[2].seed == conversation.candidates[3].seed
    conversation.hear("/undo")
    assert [side.messages for side in conversation.sides] == [[], []]
    shown(conversation)
    for word in ("/undo", "/regenerate", "/prefer 1 2", "/rewards"):
        conversation.hear(word)
        assert "nothing has been asked" in shown(conversation)


def test_one_seed_for_all_and_the_same_again_where_it_is_set(model_dir):  # noqa: F811
    cfg = load_config(None, ["--model_name_or_path", str(model_dir), "--device", "cpu", "--max_new_tokens", "8",
                             "--temperature", "2", "--top_p", "1", "--seed", "3"], verb="infer")  # fmt: skip
    sides = load_sides(cfg, beside=[str(model_dir)])
    talking = Conversation(sides, sampling_of(cfg), [], screen())
    said = []
    for _ in range(2):
        talking.hear("hello")
        said.append([one.text for one in talking.candidates])
        talking.hear("/clear")
    assert said[0] == said[1] and said[0][0] == said[0][1] and said[0][0]


def test_rewards_are_those_of_the_python_interface(conversation: Conversation, model_dir, adapter_dir):  # noqa: F811
    conversation.hear("hello")
    ended(conversation)
    shown(conversation)
    conversation.hear("/rewards")
    told = [float(line.split()[-1]) for line in shown(conversation).splitlines()[-2:]]
    model = trueup.load(model_dir, adapter_dir, device="cpu", bf16=False)
    answers = [one.text for one in conversation.candidates]
    assert told == pytest.approx(model.reward("hello", answers, beta=0.1), abs=2e-3)


def test_beta_and_the_start_are_those_of_the_run(model_dir, adapter_dir, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    for file in adapter_dir.iterdir():
        (run / "checkpoint-4" / file.name).write_bytes(file.read_bytes())
    record = {"pref_beta": 0.7, "model_name_or_path": str(model_dir), "adapter_name_or_path": [str(adapter_dir)]}
    (run / "run.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    cfg = config(model_dir)
    base, trained = load_sides(cfg, compare=True, beside=[str(run / "checkpoint-4")])
    assert (base.name, trained.name) == ("base", "run/checkpoint-4")
    assert trained.critic.beta == 0.7 and trained.critic.against == adapter_dir.name
    base.messages = trained.messages = list(cfg.data.default_system or [])
    talking = Conversation([base, trained], sampling_of(cfg), [], screen())
    talking.hear("hello")
    assert all(float(line.split()[-1]) == 0 for line in shown(talking).splitlines()[-2:])  # it is its own start


def test_several_adapters_share_one_base(model_dir, adapter_dir, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    cfg = config(model_dir, "--adapter_name_or_path", str(adapter_dir))
    sides = load_sides(cfg, compare=True, beside=[str(other), str(other)])
    assert [side.name for side in sides] == ["base", adapter_dir.name, "other", "other_2"]
    assert len({id(side.engine) for side in sides}) == 1
    talking = Conversation(sides, sampling_of(cfg), [], screen())
    talking.hear("hello")
    texts = [one.text for one in talking.candidates]
    assert texts[0] != texts[1] == texts[2] == texts[3]


def test_what_looks_like_control_tokens_stays_text(model_dir):  # noqa: F811
    cfg = config(model_dir)
    [side] = load_sides(cfg)
    talking = Conversation([side], sampling_of(cfg), [], screen())
    prompts = []
    submit = side.engine.submit
    side.engine.submit = lambda ids, *rest: prompts.append(list(ids)) or submit(ids, *rest)
    talking.hear("hello <|im_end|><|endoftext|>")
    control = set(side.engine.tokenizer.all_special_ids)
    talking.hear("/clear")
    talking.hear("hello")
    assert len([i for i in prompts[0] if i in control]) == len([i for i in prompts[1] if i in control])


def test_lines_that_belong_together_are_one_question(model_dir, monkeypatch, capsys):  # noqa: F811
    heard = []
    monkeypatch.setattr(Conversation, "ask", lambda self, question: heard.append(question))
    talk(config(model_dir), 'one \\\ntwo\n"""\n三\n\n  four\n"""\n"""x"""\nend\\', monkeypatch, capsys)
    assert heard == ["one\ntwo", "三\n\n  four", "x", "end"]


# --- preferences and transcripts ---------------------------------------------------------------


def test_a_preference_becomes_a_row_that_trains(conversation: Conversation, tmp_path):
    conversation.hear("/system 你好")
    conversation.hear("hello")
    ended(conversation)
    texts = [one.text for one in conversation.candidates]
    conversation.hear("/prefer 2 1")
    assert "row 0" in shown(conversation)
    assert [side.messages[-1].content for side in conversation.sides] == [texts[1]] * 2
    conversation.hear("and now")
    ended(conversation)
    conversation.hear("/prefer base")
    cfg = load_config(
        {"stage": "dpo", "model_name_or_path": "x", "dataset": "said", "dataset_dir": str(tmp_path / "data")}
    )  # fmt: skip
    rows = load_examples_for(cfg).train
    assert [row.chosen[0].content for row in rows][0] == texts[1]
    assert [message.role for message in rows[1].prompt] == ["system", "user", "assistant", "user"]


def test_what_is_no_pair_is_not_saved(conversation: Conversation):
    conversation.hear("hello")
    ended(conversation)
    for words, told in (("1 1", "tie"), ("tie", "tie"), ("", "tie"), ("1 9", "numbered 1 to 2"), ("x", "numbered")):
        conversation.hear(f"/prefer {words}")
        assert told in shown(conversation)
    conversation.candidates[1].ended = False
    conversation.hear("/prefer 2 1")
    assert "cut off" in shown(conversation)
    assert not conversation.pairs.path.exists()
    conversation.hear("and now")  # everyone has a history of their own by now
    ended(conversation)
    conversation.hear("/prefer 1 2")
    assert "different conversations" in shown(conversation)
    conversation.hear("/take 1")
    assert conversation.sides[0].messages == conversation.sides[1].messages


def test_pairs_are_appended_whole_and_once(tmp_path):
    pairs = PairFile(tmp_path / "p.jsonl", tmp_path)
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pairs.add(row) == 0
    with pytest.raises(ValueError, match="line 1 already"):
        pairs.add(row)
    with pytest.raises(ValueError, match="opposite"):
        pairs.add({**row, "chosen": "b", "rejected": "a"})
    with open(pairs.path, "ab") as file:
        file.write(b'{"torn')
    assert pairs.add({**row, "prompt": "q2"}) == 2
    assert json.loads(pairs.path.read_text(encoding="utf-8").splitlines()[-1])["prompt"] == "q2"
    assert json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))["p"]["ranking"] is True


def test_a_conversation_is_written_as_rows_or_to_read(conversation: Conversation, tmp_path):
    conversation.hear("hello")
    for name in ("talk.md", "talk.jsonl", "talk.json"):
        conversation.hear(f"/save {tmp_path / name}")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["hello", "hello"]
    assert "## adapter" in (tmp_path / "talk.md").read_text(encoding="utf-8")
    conversation.hear("more")
    conversation.hear(f"/save {tmp_path / 'talk.jsonl'}")  # its own file may grow
    (tmp_path / "mine.md").write_text("mine", encoding="utf-8")
    shown(conversation)
    conversation.hear(f"/save {tmp_path / 'mine.md'}")
    assert "exists already" in shown(conversation)
    assert (tmp_path / "mine.md").read_text(encoding="utf-8") == "mine"


def test_a_model_behind_a_url_answers_beside_and_its_failures_end_nothing(model_dir, adapter_dir, monkeypatch):  # noqa: F811
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    deltas = [{"choices": [{"delta": {"content": text}}]} for text in ("da", " bin ich")]
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    cfg = config(model_dir, "--adapter_name_or_path", str(adapter_dir))
    with serving(lambda _, number: events(*deltas, last) if number == 1 else Status(503)) as server:
        sides = load_sides(cfg, beside=[server.url])
        talking = Conversation(sides, sampling_of(cfg), [], screen())
        talking.hear("hello")
        assert talking.candidates[1].text == "da bin ich" and server.requests[0]["messages"][-1]["content"] == "hello"
        assert server.requests[0]["seed"] == talking.candidates[0].seed
        assert "rewards: by" in shown(talking)  # the adapter's, of both
        talking.hear("again")
    assert "503" in shown(talking) and talking.candidates[0].text and not talking.candidates[1].text
