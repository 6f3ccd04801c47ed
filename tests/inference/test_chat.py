"""`trueup chat` on a tiny random model: pipe and terminal, alone and side by side."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.data.tiny_tokenizers import make_tokenizer
from tests.models.tiny import tiny_model
from trueup.config.load import load_config
from trueup.errors import ConfigError
from trueup.inference.chat import Conversation, chat, load_sides, sampling_of
from trueup.inference.chat.screen import Screen
from trueup.rollout.generation import Generation
from trueup.rollout.sampling import Piece


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer("qwen")
    tokenizer.save_pretrained(directory)
    tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that clearly changes what the model says."""
    directory = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return directory


def config(model_dir: Path, *words: str):
    base = [
        "--model_name_or_path",
        str(model_dir),
        "--device",
        "cpu",
        "--do_sample=false",
        "--max_new_tokens",
        "8",
    ]
    return load_config(None, [*base, *words], verb="infer")


def talk(cfg, lines: str, monkeypatch, capsys, compare: bool = False) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(cfg, compare)
    return capsys.readouterr().out


def test_every_line_of_a_pipe_is_answered(model_dir, monkeypatch, capsys):
    shown = talk(config(model_dir), "hello\n\nhow are you\n", monkeypatch, capsys)
    assert shown.count("assistant: ") == 2


@pytest.mark.parametrize("word", ["/exit", "exit", "/quit"])
def test_exit_leaves(model_dir, monkeypatch, capsys, word):
    assert "assistant" not in talk(config(model_dir), f"{word}\nhello\n", monkeypatch, capsys)


def test_clear_forgets_and_without_it_the_conversation_matters(model_dir, monkeypatch, capsys):
    cfg = config(model_dir)
    fresh = talk(cfg, "hello\n", monkeypatch, capsys).splitlines()[0]
    for command in ("/clear", "clear"):
        cleared = talk(cfg, f"one two three\n{command}\nhello\n", monkeypatch, capsys).split("(forgotten)\n")[1]
        assert cleared.splitlines()[0] == fresh
    kept = talk(cfg, "one two three\nhello\n", monkeypatch, capsys)
    assert not kept.endswith(fresh + "\n")


def test_commands_are_explained_and_unknown_ones_named(model_dir, monkeypatch, capsys):
    shown = talk(config(model_dir), "/help\n/nonsense\n", monkeypatch, capsys)
    assert "/clear" in shown
    assert "there is no command /nonsense" in shown
    assert "assistant" not in shown


def test_a_sentence_that_begins_with_a_command_word_is_a_question(model_dir, monkeypatch, capsys):
    assert "assistant: " in talk(config(model_dir), "clear skies today?\n/etc/hosts is what\n", monkeypatch, capsys)


def test_the_system_message_changes_the_answer(model_dir):
    [side] = load_sides(config(model_dir))
    talk = Conversation([side], sampling_of(config(model_dir)), [], Screen(Console(file=io.StringIO())))
    prompts = []
    submit = side.engine.submit

    def listen(prompt, *rest, **more):
        prompts.append(prompt)
        return submit(prompt, *rest, **more)

    side.engine.submit = listen
    for line in ("hello", "/system Be brief.", "hello"):
        talk.hear(line)
    assert prompts[0] != prompts[1]


def test_base_and_adapter_answer_side_by_side(model_dir, adapter_dir, monkeypatch, capsys):
    cfg = config(model_dir, "--adapter_name_or_path", str(adapter_dir))
    both = talk(cfg, "hello\n", monkeypatch, capsys, compare=True)
    base, adapted = both.split("base: ")[1].partition("rewards: ")[0].split("adapter: ")
    alone = talk(config(model_dir), "hello\n", monkeypatch, capsys).removeprefix("assistant: ")
    with_adapter = talk(cfg, "hello\n", monkeypatch, capsys).removeprefix("assistant: ")
    assert base == alone
    assert adapted == with_adapter
    assert base != adapted


def test_on_a_terminal_the_two_stand_in_columns(model_dir, adapter_dir):
    cfg = config(model_dir, "--adapter_name_or_path", str(adapter_dir))
    sides = load_sides(cfg, compare=True)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    Conversation(sides, sampling_of(cfg), [], Screen(terminal)).ask("hello")
    header = next(line for line in terminal.file.getvalue().splitlines() if "base" in line)
    assert "adapter" in header
    assert [len(side.messages) for side in sides] == [2, 2]


def test_comparing_without_an_adapter_is_refused(model_dir):
    with pytest.raises(ConfigError, match="no adapter"):
        chat(config(model_dir), compare=True)


def test_generation_keys_without_effect_are_refused(model_dir):
    with pytest.raises(ConfigError) as raised:
        chat(config(model_dir, "--skip_special_tokens=false", "--length_penalty", "2.0"))
    assert len(raised.value.problems) == 2


def test_a_conversation_longer_than_the_model_says_so(model_dir, monkeypatch, capsys):
    shown = talk(config(model_dir), "word " * 300 + "\nhello\n", monkeypatch, capsys)
    assert "/clear starts anew" in shown


class Interrupted(Generation):
    """An answer in whose middle Ctrl-C is pressed."""

    pressed = False

    def next_piece(self, timeout=None):
        if not self.pressed:
            self.pressed = True
            return Piece("half an")
        if self.cancelled:
            return Piece("", finish_reason="cancelled")
        raise KeyboardInterrupt

    def wait(self, timeout=None):
        return True


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(model_dir):
    cfg = config(model_dir)
    [side] = load_sides(cfg)
    side.engine.submit = lambda prompt, sampling, voice: Interrupted(prompt, sampling, voice, 0)
    talk = Conversation([side], sampling_of(cfg), [], Screen(Console(file=io.StringIO())))
    assert talk.hear("hello")
    assert [m.content for m in side.messages] == ["hello", "half an"]
    assert not talk.candidates[0].ended
