"""The verb `chat`: base and student answer each message side by side, at a gate that the user sets."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import TextStreamer

from steer_heal.bake.student import Student
from steer_heal.config import UserError
from steer_heal.model.lm import LM
from steer_heal.model.steering import AnyVector, Steering, steering
from steer_heal.runs.resume import opened as of_run
from steer_heal.runs.student import finished_rounds, student_after, vector_of
from steer_heal.terminal import harmless

HELP = """type a message; every message is a fresh chat
  /gate 0.5    dial the student between base (0) and student (1)
  /round 1     the student after that round
  /steer 1.0   also show the base steered at this dose by the first round's vector; /steer 0 ends it
  /base        show or hide the base
  /save FILE   write what was said so far
  /help  /quit (or Ctrl-D)"""
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Session:
    """The state of a chat. The commands change it."""

    folder: Path
    student: Student
    vector: AnyVector
    max_new_tokens: int
    gate: float = 1.0
    dose: float = 0.0
    base: bool = True
    round: int = 0
    said: list[dict] = field(default_factory=list)


def chat(folder: Path, gate: float, max_new_tokens: int, round_: int | None) -> None:
    """Read messages and commands from the terminal until /quit or end of input."""
    session = opened(folder, gate, max_new_tokens, round_)
    print(HELP)
    while (line := _read(session)) is not None and line != "/quit":
        if line.startswith("/"):
            session = obey(session, line)
        elif line:
            answer(session, line)


def opened(folder: Path, gate: float, max_new_tokens: int, round_: int | None) -> Session:
    """Open a session with the student after `round_`, the last finished round if None.

    Raises UserError when the folder is no run or the round was not finished.
    """
    run = of_run(folder)
    config = run.read("config.json")
    rounds = finished_rounds(folder, config["rounds"], round_)
    student = student_after(folder, config, rounds)
    return Session(folder, student, vector_of(run), max_new_tokens, gate, round=rounds - 1)


def obey(session: Session, line: str) -> Session:
    """Carry out a command and return the new session. On an error, print it and return the session unchanged."""
    word, _, rest = line.partition(" ")
    try:
        match word:
            case "/gate":
                return replace(session, gate=_number(rest))
            case "/steer":
                return replace(session, dose=_number(rest))
            case "/base":
                return replace(session, base=not session.base)
            case "/round":
                again = opened(session.folder, session.gate, session.max_new_tokens, int(rest))
                return replace(session, student=again.student, round=again.round)
            case "/save":
                lines = [f"## {said['message']}\n\n" + _columns(said["answers"]) for said in session.said]
                Path(rest).expanduser().write_text("\n\n".join(lines) + "\n", "utf-8")
                print(f"{len(lines)} messages written to {rest}")
            case _:
                print(HELP)
    except ValueError:
        print(f"{word} needs a number, e.g. {word} 1")
    except (UserError, OSError) as error:
        print(error)
    return session


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _columns(answers: dict[str, str]) -> str:
    return "\n\n".join(f"**{name}**: {text}" for name, text in answers.items())


def answer(session: Session, message: str, show: Callable[[str], None] = lambda text: print(text, end="", flush=True)):
    """Stream an answer from each view (base, steered base, student) and append all to `session.said`."""
    views = {"base": (0.0, 0.0)} if session.base else {}
    views |= {f"base steered at {session.dose:g}": (0.0, session.dose)} if session.dose else {}
    views |= {f"student after round {session.round} at gate {session.gate:g}": (session.gate, 0.0)}
    answers = {}
    for name, (gate, dose) in views.items():
        show(f"\n[{name}]\n")
        with session.student.view(history=gate, now=0.0):
            answers[name] = _streamed(session, message, dose, len(session.said), show)
        show("\n")
    show("\n")
    session.said.append({"message": message, "answers": answers})


class _Harmless(TextStreamer):
    """Streams text without control characters, which could take over a terminal."""

    def __init__(self, lm: LM, show: Callable[[str], None]) -> None:
        super().__init__(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.whole = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        clean = harmless(text)
        self.whole += clean
        self.show(clean)


def _streamed(session: Session, message: str, dose: float, turn: int, show: Callable[[str], None]) -> str:
    lm = session.student.lm
    ids = torch.tensor([lm.prompt(message)], device=lm.device)
    steered = Steering(session.vector, torch.tensor([dose])) if dose else None
    streamer = _Harmless(lm, show)
    with torch.random.fork_rng(), steering(lm, steered) as dial:
        torch.manual_seed(turn)  # all views draw the same random numbers
        if steered:
            dial.turn(steered.dose.to(lm.device))
        lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=session.max_new_tokens,
            eos_token_id=sorted(lm.end_tokens),
            streamer=streamer,
        )
    return streamer.whole.strip()


def _read(session: Session) -> str | None:
    """The next line; "" for one that cannot be read, None at the end of the input."""
    try:
        line = input(f"round {session.round}, gate {session.gate:g}> ").strip()
        line.encode()
    except UnicodeEncodeError:  # see `terminal.take_any_text`
        print(f"this line has bytes that are no text in {sys.stdin.encoding}: type it again")
        return ""
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return line
