"""Chat & arena: load models, talk to one, or let several answer the same question beside each other; choose.

What a model is worth to itself, β (log π − log π_ref), stands below each answer, and token by token when asked for.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from nicegui import ui

from trueup.errors import UserError
from trueup.web import speakers
from trueup.web.frame import button, card, empty, heading, problems
from trueup.web.labels import add_vote
from trueup.web.loading import LoadingCard
from trueup.web.pages import page
from trueup.web.speakers import Voice
from trueup.web.talks import Answer, Talk, Turn, earlier
from trueup.web.turn_view import Acts, TurnView, Worth, whole_letters
from trueup.web.view import View

_SECONDS = 1.0  # between looks at what is loaded
_DRAW_SECONDS = 0.1  # between two states of an answer that comes
_BETWEEN = "|"
_MOST_VOICES = 6
#: what a person may set → how it is read, what it begins with, the least and the most that it can be.
_NUMBERS: dict[str, tuple[type, str, float, float]] = {
    "temperature": (float, "0.7", 0, 100), "top_p": (float, "0.95", 0.001, 1), "top_k": (int, "0", 0, 1e9),
    "max_tokens": (int, "512", 1, 1e6), "repetition_penalty": (float, "1", 0.001, 100), "seed": (int, "", 0, 2**31),
}  # fmt: skip
_ENTER = "(e) => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) { e.preventDefault(); emit(); } }"


@page("/chat", icon="forum", order=50)
def chat(view: View) -> None:
    """The conversation, and at its side who answers and how."""
    ChatPage(view).build()


class ChatPage:
    """One look at a conversation. It is kept in a file, and who answers is in the address."""

    def __init__(self, view: View) -> None:
        self.view, self.place = view, view.workspace
        kept = Talk.read(self.place, view.query["talk"]) if "talk" in view.query else None
        self.talk = kept or Talk.new()
        self.endpoints: dict[str, Voice] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.turns: list[TurnView] = []
        self.asked = [name for name in view.query.get("voices", "").split(_BETWEEN) if name]

    # --- what is on the page -----------------------------------------------------------------

    def build(self) -> None:
        """Everything, and then a look every second at what is loaded."""
        t = self.view.t
        with heading(self.view, t("chat.title"), note=t("chat.note")):
            button(t("chat.earlier"), self._earlier_dialog, icon="history")
            button(t("chat.new"), lambda: self._open(Talk.new()), icon="add_comment")
        self.columns = ui.element("div").classes("chat-columns")
        with self.columns:
            with ui.element("div").classes("chat-side"):
                self.loading = LoadingCard(self.view, self._who)
                self.who = card(t("chat.who"))
                self._parameters()
            with ui.element("div").classes("chat-main"):
                self.nothing = empty("forum", t("chat.nobody"))
                self.list = ui.element("div").classes("exchanges")
                self.wrong = ui.element("div").classes("stack").props("aria-live=polite")
                self._composer()
        self._endpoints_of_address()
        self._fill()
        self.loading.refresh()
        ui.timer(_SECONDS, self.loading.refresh)
        ui.context.client.on_delete(self._stop)

    def _composer(self) -> None:
        t = self.view.t
        with ui.element("div").classes("composer"):
            self.question = ui.textarea(placeholder=t("chat.ask")).props("outlined autogrow dense rows=1")
            self.question.props["aria-label"] = t("chat.ask")
            self.question.on("keydown", self._send, js_handler=_ENTER)
            self.send = button(t("chat.send"), self._send, icon="send", kind="primary")
            self.halt = button(t("chat.stop"), self._stop, icon="stop", kind="danger")
            self.halt.set_visibility(False)

    def _parameters(self) -> None:
        """System prompt, and how answers are drawn; kept in the address, but for the prompt."""
        t, query = self.view.t, self.view.query
        with card(t("chat.parameters")), ui.element("div").classes("stack"):
            self.system = ui.textarea(t("chat.system"), value=self.talk.system).props("outlined dense autogrow rows=1")
            self.numbers: dict[str, ui.input] = {}
            with ui.element("div").classes("fields chat-fields"):
                for name, (_, first, *_) in _NUMBERS.items():
                    self.numbers[name] = self._number(name, query.get(name, first), first)
                self.stop_at = ui.input(t("chat.stop_at"), value=query.get("stop", "")).props("outlined dense")
                self.stop_at.on_value_change(lambda event: self.view.remember(stop=event.value))

    def _number(self, name: str, value: str, first: str) -> ui.input:
        made = ui.input(self.view.t(f"chat.{name}"), value=value).props(
            "outlined dense inputmode=decimal no-error-icon"
        )
        made.without_auto_validation()
        made.props["data-key"] = name
        if name == "seed":
            made.props["placeholder"] = self.view.t("chat.any_seed")
            made.props["stack-label"] = True

        def tell() -> None:
            text = str(made.value).strip()
            made.props["error"] = bool(text) and _read(name, text) is None
            made.update()

        def change() -> None:
            tell()
            text = str(made.value).strip()
            self.view.remember(**{name: text if text != first else None})

        tell()
        made.on_value_change(change)
        return made

    # --- who answers -------------------------------------------------------------------------

    def _all(self) -> dict[str, Voice]:
        return {voice.key: voice for voice in self.view.speakers.voices()} | self.endpoints

    def _voices(self) -> list[Voice]:
        """Those that answer: chosen ones; else everybody who is there."""
        there = self._all()
        chosen = [there[key] for key in self.asked if key in there]
        return chosen or list(there.values())[:_MOST_VOICES]

    def _who(self) -> None:
        """The card of who answers, and who judges."""
        t, there, chosen = self.view.t, self._all(), self._voices()
        self.nothing.set_visibility(not there and not self.talk.turns)
        self.columns.classes(**{"add" if there or self.talk.turns else "remove": "chat-ready"})
        self.who.clear()
        self._able()
        with self.who:
            ui.label(t("chat.who")).props("role=heading aria-level=2").classes("h2")
            with ui.element("div").classes("stack"):
                if there:
                    names = {key: voice.name for key, voice in there.items()}
                    picked = ui.select(
                        names, value=[voice.key for voice in chosen], multiple=True, label=t("chat.side")
                    )
                    picked.props("outlined dense options-dense use-chips behavior=menu")
                    picked.on_value_change(lambda event: self._choose(event.value or []))
                    blind = ui.switch(t("chat.blind"), value=self.view.query.get("blind") == "1")
                    blind.on_value_change(lambda event: self.view.remember(blind="1" if event.value else None))
                self._critic_fields()
                with ui.expansion(t("chat.endpoint")).props("dense").classes("section"):
                    self._endpoint_form()
                self._vote_fields(there)

    def _choose(self, keys: Sequence[str]) -> None:
        self.asked = list(keys)[:_MOST_VOICES]
        self.view.remember(voices=_BETWEEN.join(self.asked))
        self._able()

    def _able(self) -> None:
        self.send.set_enabled(bool(self._all()))

    def _critic_fields(self) -> None:
        """Whose preference rewards are, and against what."""
        t = self.view.t
        policies = [voice for voice in self._all().values() if voice.beta is not None and voice.home is not None]
        if not policies:
            return
        policy, reference = self._critic() or (policies[-1], policies[-1])
        with ui.element("div").classes("fields chat-fields"):
            by = ui.select({one.key: one.name for one in policies}, value=policy.key, label=t("chat.judge"))
            others = {one.key: one.name for one in self._all().values() if one.home == policy.home and one != policy}
            against = ui.select(
                others, value=reference.key if reference.key in others else None, label=t("chat.against")
            )
        for field, name in ((by, "judge"), (against, "against")):
            field.props("outlined dense options-dense behavior=menu")
            field.on_value_change(lambda event, name=name: self._in_place(self._judge(name, event.value)))
        ui.label(t("chat.reward_note", beta=f"{policy.beta:g}")).classes("muted small")

    def _critic(self) -> tuple[Voice, Voice] | None:
        """(policy, reference) of the rewards; the chosen ones, else the first adapter that answers and its base."""
        there, query = self._all(), self.view.query
        adapters = [voice for voice in [*self._voices(), *there.values()] if voice.beta is not None]
        policy = there.get(query.get("judge", "")) or next(iter(adapters), None)
        if policy is None or policy.beta is None:
            return None
        family = [voice for voice in there.values() if voice.home == policy.home and voice != policy]
        reference = next((voice for voice in family if voice.key == query.get("against")), None)
        reference = reference or next((voice for voice in family if voice.beta is None), None)
        return (policy, reference) if reference else None

    async def _judge(self, name: str, value: str | None) -> None:
        self.view.remember(**{name: value})
        if name == "judge":
            self.view.remember(against=None)
            self._who()
        for shown in self.turns:
            shown.worth.clear()
        if self.turns:
            await self._value(self.turns[-1])

    def _endpoint_form(self) -> None:
        t = self.view.t
        with ui.element("div").classes("stack loading-form"):
            url = ui.input(t("chat.url"), placeholder="http://127.0.0.1:8000/v1#qwen").props("outlined dense")
            key = ui.input(t("chat.key_env"), placeholder="OPENAI_API_KEY").props("outlined dense")
            url.props["stack-label"] = key.props["stack-label"] = True
            wrong = ui.element("div")

            def add() -> None:
                wrong.clear()
                name, env = str(url.value).strip(), str(key.value).strip()
                try:
                    voice = speakers.endpoint(name, env or None)
                except UserError as error:
                    with wrong:
                        problems(error.problems)
                    return
                self.endpoints[voice.key] = voice
                kept = [one for one in self.view.query.get("endpoints", "").split(_BETWEEN) if one]
                self.view.remember(endpoints=_BETWEEN.join(dict.fromkeys([*kept, f"{name} {env}".strip()])))
                self._choose([*(one.key for one in self._voices() if one.key != voice.key), voice.key])
                self._who()

            button(t("chat.add"), add, icon="add_link")

    def _endpoints_of_address(self) -> None:
        for kept in filter(None, self.view.query.get("endpoints", "").split(_BETWEEN)):
            name, _, env = kept.partition(" ")
            try:
                voice = speakers.endpoint(name, env or None)
            except UserError as error:
                with self.wrong:
                    problems(error.problems)
            else:
                self.endpoints[voice.key] = voice

    def _vote_fields(self, there: dict[str, Voice]) -> None:
        if not there:
            return
        t, query = self.view.t, self.view.query
        with ui.element("div").classes("fields chat-fields"):
            for name, first in (("project", "arena"), ("annotator", "")):
                field = ui.input(t(f"chat.{name}"), value=query.get(name, first)).props("outlined dense")
                field.on_value_change(lambda event, name=name: self.view.remember(**{name: str(event.value).strip()}))

    # --- talking -----------------------------------------------------------------------------

    async def _in_place(self, work: Awaitable[None]) -> None:
        """Go on where nothing is taken away: the button that began this may be gone by now."""
        with self.list:
            await work

    async def _send(self) -> None:
        question = str(self.question.value or "").strip()
        if not question or not self._can_ask():
            return
        self.question.value = ""
        self.talk.system = str(self.system.value or "").strip()
        blind = self.view.query.get("blind") == "1"
        self.talk.turns.append(Turn(question, blind=blind))
        shown = self._add(self.talk.turns[-1])
        for before in self.turns[-2:-1]:  # what can be done is done to the newest
            before.draw(self._acts(before), self._legend())
        await self._answer(shown)

    def _can_ask(self) -> bool:
        """Whether somebody is there and free; numbers that are none are said."""
        if self._sampling() is None:
            ui.notify(self.view.t("chat.bad_number"), type="warning")
            return False
        return not self.tasks and bool(self._voices())

    async def _again(self) -> None:
        if self.turns and self._can_ask():
            self.turns[-1].turn.chosen = None
            await self._answer(self.turns[-1])

    def _sampling(self) -> dict[str, Any] | None:
        """What a request says of how to draw; None while a number is none."""
        found: dict[str, Any] = {}
        for name, field in self.numbers.items():
            text = str(field.value or "").strip()
            value = _read(name, text) if text else None
            if text and value is None:
                return None
            if (
                value is not None
                and not (name == "top_k" and value == 0)
                and not (name == "repetition_penalty" and value == 1)
            ):
                found[name] = value
        if stop := str(self.stop_at.value or "").replace("\\n", "\n"):
            found["stop"] = [stop]
        return found

    async def _answer(self, shown: TurnView) -> None:
        """Everybody's answer to a turn's question, drawn with one seed."""
        turn, voices, sampling = shown.turn, self._voices(), self._sampling() or {}
        number = self.talk.turns.index(turn)
        rounds = sum(one.voice == voices[0].key for one in turn.answers)
        seed = sampling["seed"] + rounds if "seed" in sampling else secrets.randbits(31)
        sampling |= {"seed": seed}
        new = [Answer(voice.key, voice.name, seed=seed) for voice in voices]
        first = len(turn.answers)
        turn.answers += new
        if turn.blind:
            turn.order += random.sample(range(first, len(turn.answers)), len(new))
        self.talk.save(self.place)  # a reload finds the question, however long the answer takes
        self.view.remember(talk=self.talk.id)
        shown.worth.clear()
        shown.draw()
        ui.run_javascript(f"getHtmlElement({shown.box.id}).scrollIntoView({{block: 'nearest'}})")
        self._busy(True)
        self.tasks = [
            asyncio.create_task(self._listen(voice, one, number, sampling, shown))
            for voice, one in zip(voices, new, strict=True)
        ]
        try:
            await asyncio.gather(*self.tasks, return_exceptions=True)
        finally:
            self.tasks = []
            self.talk.save(self.place)
        self._busy(False)
        shown.draw(self._acts(shown))
        await self._value(shown)

    async def _listen(self, voice: Voice, one: Answer, number: int, sampling: dict[str, Any], shown: TurnView) -> None:
        """One voice's answer, shown as it comes."""
        begun = drawn = time.monotonic()
        place = next(view for view in shown.answers if view.answer is one)
        try:
            async for piece in speakers.answer(voice, self.talk.messages(voice.key, number), sampling):
                one.text += piece.text
                one.finish = piece.finish or one.finish
                one.tokens = piece.tokens if piece.tokens is not None else one.tokens
                now = time.monotonic()
                if now - drawn > max(_DRAW_SECONDS, len(one.text) / 200_000):
                    drawn = now
                    place.refresh()
            one.finish = one.finish or "stop"
        except asyncio.CancelledError:
            one.finish = "aborted"
        except UserError as error:
            one.finish, one.reason = "failed", "\n".join(problem.what for problem in error.problems)
        except Exception as error:  # whatever a server of elsewhere makes of it
            one.finish, one.reason = "failed", f"{type(error).__name__}: {error}"
        one.seconds = time.monotonic() - begun
        place.refresh()

    def _stop(self) -> None:
        """End the answers that are coming: whoever wrote them is told by the connection's end."""
        for task in self.tasks:
            task.cancel()

    def _busy(self, busy: bool) -> None:
        self.send.set_visibility(not busy)
        self.halt.set_visibility(busy)

    # --- what answers are worth --------------------------------------------------------------

    async def _value(self, shown: TurnView) -> None:
        """The reward of each answer of a turn, if somebody is there who was aligned."""
        critic = self._critic()
        if critic is None:
            return
        policy, reference = critic
        number = self.talk.turns.index(shown.turn)
        wrong = []
        for index, one in enumerate(shown.turn.answers):
            if not one.counts or index in shown.worth:
                continue
            messages = [*self.talk.messages(one.voice, number), {"role": "assistant", "content": one.text}]
            try:
                reward, tokens = await speakers.worth(
                    policy, reference, messages, policy.beta or 0.1, one.complete
                )  # fmt: skip
            except UserError as error:
                wrong = error.problems
                continue
            shown.worth[index] = Worth(reward, whole_letters(tokens))
        self._tell(wrong)
        shown.draw(self._acts(shown), self._legend())

    def _legend(self) -> str:
        critic = self._critic()
        return self.view.t("chat.legend", policy=critic[0].name, reference=critic[1].name) if critic else ""

    def _acts(self, shown: TurnView) -> Acts:
        """What can be done with a turn now."""
        turn, newest = shown.turn, shown is self.turns[-1]
        number = self.talk.turns.index(turn)
        several = sum(one.counts for one in turn.answers) > 1
        votes = newest and several and turn.chosen is None and not self.tasks and self.talk.shared(number)
        return Acts(
            prefer=(lambda choice: self._in_place(self._prefer(shown, choice))) if votes else None,
            again=(lambda: self._in_place(self._again())) if newest and not self.tasks else None,
            tokens=(lambda: self._in_place(self._tokens(shown))) if self._critic() or shown.worth else None,
        )

    async def _tokens(self, shown: TurnView) -> None:
        shown.heat = not shown.heat
        if not shown.worth:
            await self._value(shown)
        shown.draw(self._acts(shown), self._legend())

    async def _prefer(self, shown: TurnView, choice: int | str) -> None:
        """A vote: kept among the labels, and the conversation goes on from the better answer."""
        turn, query = shown.turn, self.view.query
        counted = [index for index, one in enumerate(turn.answers) if one.counts]
        prompt = self.talk.messages(turn.answers[counted[0]].voice, self.talk.turns.index(turn))
        sampling = {key: value for key, value in (self._sampling() or {}).items() if key != "seed"}
        told = [{"model": turn.answers[index].name, "seed": turn.answers[index].seed} for index in counted]
        project = query.get("project") or "arena"
        try:
            await asyncio.to_thread(
                add_vote, self.place.root, project, prompt, [turn.answers[index].text for index in counted],
                "tie" if choice == "tie" else counted.index(int(choice)), query.get("annotator", ""),
                {"source": "arena", "answers": told, "sampling": sampling, "blind": turn.blind},
            )  # fmt: skip
        except UserError as error:
            self._tell(error.problems)
            return
        turn.chosen = choice
        self.talk.save(self.place)
        shown.draw(self._acts(shown), self._legend())
        ui.notify(self.view.t("chat.voted", project=project), type="positive")

    def _tell(self, found: Sequence[Any]) -> None:
        self.wrong.clear()
        if found:
            with self.wrong:
                problems(found)

    # --- conversations -----------------------------------------------------------------------

    def _fill(self) -> None:
        """The turns of a conversation that was kept."""
        for turn in self.talk.turns:
            self._add(turn)
        for shown in self.turns:
            shown.draw(self._acts(shown))

    def _add(self, turn: Turn) -> TurnView:
        self.nothing.set_visibility(False)
        with self.list:
            self.turns.append(TurnView(self.view, turn, self._colour))
        return self.turns[-1]

    def _colour(self, voice: str) -> int:
        """Each voice has one, in the order in which they first spoke."""
        spoken = dict.fromkeys(one.voice for turn in self.talk.turns for one in turn.answers)
        return list(spoken).index(voice)

    def _open(self, talk: Talk) -> None:
        self.view.query["talk"] = talk.id
        self.view.open("/chat", **self.view.query)

    def _earlier_dialog(self) -> None:
        t = self.view.t
        with ui.dialog(value=True), ui.card().classes("dialog"):
            ui.label(t("chat.earlier")).classes("h2")
            found = earlier(self.place)
            if not found:
                ui.label(t("chat.none_earlier")).classes("muted")
            for talk in found:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(talk.begun))
                text = f"{when}  {talk.turns[0].question[:60]}"
                button(text, lambda talk=talk: self._open(talk), icon="forum", kind="quiet").props("align=left")


def _read(name: str, text: str) -> Any:
    """A number as a person typed it; None if it is none, or none that can be."""
    read, _, least, most = _NUMBERS[name]
    try:
        value = read(text)
    except ValueError:
        return None
    return value if least <= value <= most else None
