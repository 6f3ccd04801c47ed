"""The loop: what is typed is a command or a question, and the last question's answers can be compared."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trueup.data.examples import Message
from trueup.data.rendering import TemplateRefusal
from trueup.errors import UserError
from trueup.inference.chat.critics import Critic
from trueup.inference.chat.pairs import PairFile
from trueup.inference.chat.screen import Coming, Screen
from trueup.inference.chat.settings import changed, shown
from trueup.inference.chat.sides import Side
from trueup.inference.chat.transcript import save
from trueup.inference.thoughts import split
from trueup.rollout.engines import Sampling, TooLong

#: command → what it takes, what it does.
COMMANDS = {
    "/help": ("", "this list"),
    "/set": ("NAME VALUE", "temperature, top_p, max_new_tokens, seed …; alone, it shows them all"),
    "/system": ("TEXT", "set the system message and start anew; without TEXT, remove it"),
    "/clear": ("", "forget the conversation (also: clear, /reset)"),
    "/undo": ("", "take back the last question"),
    "/regenerate": ("", "answer it once more; the answers before stay to choose from"),
    "/rewards": ("", "what each answer is worth to the aligned models"),
    "/prefer": ("A B", "keep a pair, A better than B, and go on with A; /prefer A: better than all others"),
    "/take": ("A", "go on with answer A everywhere"),
    "/thoughts": ("[on|off]", "show what was thought; on: always, off: folded"),
    "/save": ("FILE", "write the conversation to a .md, .json or .jsonl file"),
    "/exit": ("", "leave (also: exit, Ctrl-D)"),
}
_SAME = {"/reset": "/clear", "/quit": "/exit", "/retry": "/regenerate", "/reward": "/rewards", "/thought": "/thoughts"}
_BELOW = [
    'Ctrl-C stops an answer. A line that ends in \\ goes on in the next one; so does all between two """.',
    "A and B are numbers of the last question's answers, or names; a tie is not a pair.",
]


@dataclass
class Candidate:
    """An answer to the last question. `prompt`: the conversation that it answers, the question included."""

    side: Side
    prompt: tuple[Message, ...]
    text: str
    ended: bool
    seed: int


@dataclass
class Conversation:
    """What everyone has said, and how the next answer is drawn."""

    sides: Sequence[Side]
    sampling: Sampling
    start: list[Message]
    screen: Screen
    pairs: PairFile | None = None
    candidates: list[Candidate] = field(default_factory=list)
    _saved: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._begin()

    def follow(self, lines: Iterable[str]) -> None:
        """Until the lines end, or one says so."""
        for line in lines:
            try:
                if not self.hear(line):
                    return
            except KeyboardInterrupt:
                self.screen.say("(stopped)")

    def hear(self, line: str) -> bool:
        """Obey a command, or answer a question; whether there may be more."""
        word, _, rest = line.partition(" ")
        word, rest = _SAME.get(word, word), rest.strip()
        if line in ("exit", "clear"):
            word = f"/{line}"
        if word == "/exit":
            return False
        if word in COMMANDS:
            act: Callable[[str], None] = getattr(self, f"_{word[1:]}")
            try:
                act(rest)
            except (ValueError, UserError) as error:
                self.screen.say(str(error))
        elif word.startswith("/") and word[1:].isalpha():
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; /help lists them"
            self.screen.show(f"there is no command {word}{hint}")
        else:
            self.ask(line)
        return True

    def ask(self, question: str) -> None:
        """Ask every side, and show answers as they come. Ctrl-C ends them, not the conversation."""
        self.candidates = []
        for side in self.sides:
            side.messages.append(Message("user", question))
        self._answer()

    # --- answers --------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Everyone's answer to the last question, drawn with one seed."""
        again = len(self.candidates) // len(self.sides)
        fixed = self.sampling.seed
        seed = secrets.randbits(31) if fixed is None else fixed + again
        coming = [self._coming(side, replace(self.sampling, seed=seed)) for side in self.sides]
        try:
            stopped = self.screen.answers(coming)
        finally:
            for side, one in zip(self.sides, coming, strict=True):
                one.stop()
                found = Candidate(side, tuple(side.messages), one.whole, one.finish == "stop", seed)
                side.messages.append(Message("assistant", one.whole))
                self.candidates.append(found)
        for one in coming:
            if one.finish == "length":
                self.screen.note(f"({one.name}: cut off; /set max_new_tokens makes room)")
        if len(self.sides) > 1 and not stopped:
            self._list()

    def _coming(self, side: Side, sampling: Sampling) -> Coming:
        try:
            return Coming(side.name, side.begin(sampling), side.opens_thought)
        except TooLong as error:
            why = f"{error.tokens} tokens are more than this model takes: /clear starts anew"
        except TemplateRefusal as refusal:
            why = f"the chat template refuses this conversation: {refusal.detail}"
        return Coming(side.name, None, error=why)

    def _list(self) -> None:
        """The answers by number, with what they are worth."""
        critics = {side.name: side.critic for side in self.sides if side.critic}
        columns = [self._worth(critic) for critic in critics.values()]
        rows = [
            (str(number), one.side.name, *(column[number - 1] for column in columns))
            for number, one in enumerate(self.candidates, 1)
        ]
        if not critics:
            if self.screen.console.is_terminal:
                self.screen.say(" · ".join(f"{number} {name}" for number, name in rows))
            return
        for name, critic in critics.items():
            self.screen.say(
                f"rewards: by {name}, β·(log π − log π_ref), β {critic.beta:g}, against {critic.against}"
            )  # fmt: skip
        self.screen.table([("", "", *critics), *rows] if len(critics) > 1 else rows)

    def _worth(self, critic: Critic) -> list[str]:
        """A critic's reward of each candidate."""
        found = []
        for one in self.candidates:
            try:
                (value,) = critic.rewards(one.prompt, [(one.text, one.ended)]) if one.text else (None,)
            except (TooLong, TemplateRefusal):
                value = None
            found.append("–" if value is None else f"{value:+.3f}")
        return found

    # --- commands -------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        self.screen.table([(f"{name} {takes}".rstrip(), does) for name, (takes, does) in COMMANDS.items()])
        for line in _BELOW:
            self.screen.show(line)

    def _set(self, words: str) -> None:
        if words:
            self.sampling = changed(self.sampling, words)
        self.screen.table(shown(self.sampling))

    def _system(self, text: str) -> None:
        self.start = [Message("system", text)] if text else []
        self._begin()
        self.screen.say("(a new conversation)")

    def _clear(self, _: str) -> None:
        self._begin()
        self.screen.say("(forgotten)")

    def _undo(self, _: str) -> None:
        question = self._last_question()
        for side in self.sides:
            del side.messages[-2:]
        self.candidates = []
        self.screen.say(f"(taken back: {question})")

    def _regenerate(self, _: str) -> None:
        self._last_question()
        for side in self.sides:
            side.messages.pop()
        if self.sampling.temperature == 0:
            self.screen.say("(temperature 0 says the same again; /set temperature 0.7 changes that)")
        self._answer()

    def _rewards(self, _: str) -> None:
        self._last_question()
        if not any(side.critic for side in self.sides):
            raise ValueError("no model here has an adapter to compare with its start")
        self._list()

    def _prefer(self, words: str) -> None:
        self._last_question()
        if self.pairs is None:
            raise ValueError("there is no file for pairs")
        if words.lower() in ("", "tie", "="):
            raise ValueError("a tie is not a pair: nothing is saved")
        better, *worse = [self._candidate(word) for word in words.replace(">", " ").split()]
        others = worse or [c for c in self.candidates if c.text != better.text and c.prompt == better.prompt]
        rows = [self._pair(better, other) for other in others]
        if not rows:
            raise ValueError("there is no other answer to compare it with; /regenerate gives one")
        for row in rows:
            number = self.pairs.add(row)
            self.screen.say(f"(saved: {self.pairs.path}, row {number}, dataset {self.pairs.name})")
        self._go_on_with(better)

    def _take(self, word: str) -> None:
        self._last_question()
        self._go_on_with(self._candidate(word))
        self.screen.say("(everyone goes on with this answer)")

    def _thoughts(self, word: str) -> None:
        if word in ("on", "off"):
            self.screen.unfolded = word == "on"
            self.screen.say("(thoughts are shown)" if word == "on" else "(thoughts are folded)")
            return
        found = [(one.side.name, split(one.text)[0]) for one in self.candidates]
        if not any(thought for _, thought in found):
            raise ValueError("nothing was thought")
        for name, thought in found:
            if thought:
                self.screen.write(f"{name} thought:\n{thought}\n")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("say where: /save conversation.md")
        path = Path(name).expanduser()
        if path.exists() and path not in self._saved:
            raise ValueError(f"{path} exists already: choose another name")
        save(path, [(side.name, side.source, side.messages) for side in self.sides], dict(shown(self.sampling)))
        self._saved.add(path)
        self.screen.say(f"(saved: {path})")

    # --- parts ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.candidates = []
        for side in self.sides:
            side.messages = list(self.start)

    def _last_question(self) -> str:
        """Raises ValueError: nothing was asked, or it was taken back."""
        messages = self.sides[0].messages
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise ValueError("nothing has been asked yet")
        return messages[-2].content

    def _candidate(self, word: str) -> Candidate:
        """An answer by number or name. Raises ValueError."""
        named = [one for one in self.candidates if one.side.name == word]
        if word.isdigit() and 1 <= int(word) <= len(self.candidates):
            return self.candidates[int(word) - 1]
        if not named:
            most = len(self.candidates)
            raise ValueError(f"there is no answer {word or '…'}: they are numbered 1 to {most}" if most else
                             "there are no answers to choose from; ask something")  # fmt: skip
        return named[-1]

    def _pair(self, better: Candidate, worse: Candidate) -> dict:
        """A row of preference data. Raises ValueError where the two are no pair."""
        if better.prompt != worse.prompt:
            raise ValueError("these answer different conversations; /take A brings everyone to one")
        if better.text.strip() == worse.text.strip():
            raise ValueError("the two say the same, and a tie is not a pair: nothing is saved")
        if not (better.text.strip() and worse.text.strip()):
            raise ValueError("an empty answer is no half of a pair: nothing is saved")
        if not better.ended:
            raise ValueError("the better one was cut off, and would teach never to end: nothing is saved")
        return {
            "prompt": [message.to_dict() for message in better.prompt],
            "chosen": [{"role": "assistant", "content": better.text}],
            "rejected": [{"role": "assistant", "content": worse.text}],
            "chosen_by": better.side.source, "rejected_by": worse.side.source,
        }  # fmt: skip

    def _go_on_with(self, one: Candidate) -> None:
        for side in self.sides:
            side.messages = [*one.prompt, Message("assistant", one.text)]
