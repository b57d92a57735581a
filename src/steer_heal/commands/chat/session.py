"""A chat of several turns. Every arm has a conversation of its own, in which it sees its own earlier answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from transformers import TextStreamer

from steer_heal.commands.chat.subject import Subject
from steer_heal.config import UserError
from steer_heal.data.frames import Frame
from steer_heal.eval.arms import Arm, plainly
from steer_heal.model.lm import LM
from steer_heal.model.steering import steering
from steer_heal.terminal import harmless

BASE = Arm("base", history=0.0, now=0.0)


@dataclass(frozen=True)
class Turn:
    """A message, and what each arm answered, by the arm's name."""

    chat: int
    message: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Session:
    """The state of a chat. Commands and answers make a new one."""

    subject: Subject
    max_new_tokens: int = 128
    temperature: float = 0.7
    """0: greedy"""
    gate: float = 1.0
    dose: float = 0.0
    base: bool = True
    persona: bool = False
    chat: int = 1
    said: tuple[Turn, ...] = ()
    """the turns of all chats"""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of this chat."""
        return tuple(turn for turn in self.said if turn.chat == self.chat)

    def before(self, arm: str) -> tuple[str, ...]:
        """The messages of this chat that an arm answered, each followed by its answer."""
        return tuple(text for turn in self.turns if arm in turn.answers for text in (turn.message, turn.answers[arm]))


def arms(session: Session) -> list[Arm]:
    """Who answers the next message. An arm at another gate or dose has another name, and so another conversation."""
    subject, gate = session.subject, session.gate
    own = subject.own
    if subject.alone:
        return [own]
    found = [BASE] if session.base else []
    if session.persona:
        found.append(replace(BASE, name="base with the persona", system=subject.of_run("the persona").persona))
    if session.dose:
        found.append(plainly(f"base steered at {session.dose:g}", subject.of_run("steering").vector, session.dose))
    return [*found, replace(own, name=f"{own.name} at gate {gate:g}", history=own.history * gate, now=own.now * gate)]


def answer(session: Session, message: str, show: Callable[[str, str], None]) -> Session:
    """Let each arm answer, streamed to `show` as the arm's name and a piece of text; return the session with the turn.

    Raises UserError, before anybody answers, when a conversation no longer fits into the model's context.
    """
    asked = [(arm, prompt_of(session, arm, message)) for arm in arms(session)]
    answers = {}
    for arm, ids in asked:
        with session.subject.student.view(history=arm.history, now=arm.now):
            answers[arm.name] = _streamed(session, arm, ids, show)
    return replace(session, said=(*session.said, Turn(session.chat, message, answers)))


def prompt_of(session: Session, arm: Arm, message: str) -> list[int]:
    """Token ids of an arm's conversation with the next message. Raises UserError where no answer fits behind it."""
    lm, length = session.subject.student.lm, session.max_new_tokens
    ids = lm.prompt(message, arm.system, Frame("chat", before=session.before(arm.name)))
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and len(ids) + length > most:
        raise UserError(
            f"{arm.name}: the chat has {len(ids):,} tokens, and the model reads {most:,}: an answer of {length:,} does "
            "not fit. Begin a new chat (/new), write less, or give a smaller --max-new-tokens"
        )
    return ids


def as_markdown(session: Session) -> str:
    """All turns of all chats."""
    parts = []
    for chat, turns in groupby(session.said, key=lambda turn: turn.chat):
        parts.append(f"# Chat {chat}")
        for number, turn in enumerate(turns, 1):
            parts += [f"## Turn {number}", f"**you**: {turn.message}"]
            parts += [f"**{arm}**: {text}" for arm, text in turn.answers.items()]
    return "\n\n".join(parts) + "\n"


class _Harmless(TextStreamer):
    """Streams text without control characters, which could take over a terminal."""

    def __init__(self, lm: LM, show: Callable[[str], None]) -> None:
        super().__init__(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(harmless(text))


def _streamed(session: Session, arm: Arm, ids: list[int], show: Callable[[str, str], None]) -> str:
    lm = session.subject.student.lm
    prompt, steered = torch.tensor([ids], device=lm.device), arm.steering(1)
    sampled = {"do_sample": True, "temperature": session.temperature} if session.temperature else {"do_sample": False}
    with torch.random.fork_rng(), steering(lm, steered) as dial:
        torch.manual_seed(len(session.said))  # all arms draw the same random numbers
        if steered:
            dial.turn(steered.dose.to(lm.device))
        written = lm.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=session.max_new_tokens,
            eos_token_id=sorted(lm.end_tokens),
            streamer=_Harmless(lm, lambda text: show(arm.name, text)),
            **sampled,
        )
    return harmless(lm.text(written[0, len(ids) :].tolist()))
