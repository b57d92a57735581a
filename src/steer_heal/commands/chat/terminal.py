"""A chat in the terminal: messages and commands, line by line."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

from steer_heal.commands.chat.session import Session, answer, as_markdown
from steer_heal.commands.chat.subject import of_run
from steer_heal.config import UserError

HELP = """type a message; each arm sees its own earlier answers
  /new         begin a fresh chat
  /gate 0.5    dial the student between base (0) and student (1); at each gate it has a conversation of its own
  /base        show or hide the base
  /save FILE   write all turns so far
  /help  /quit (or Ctrl-D)
with a run also:
  /round 1     the student after that round
  /steer 1.0   also show the base steered at this dose by the first round's vector; /steer 0 ends it
  /persona     show or hide the base under the trait's positive persona as its system prompt"""


def chat(session: Session) -> None:
    """Read messages and commands from the terminal until /quit or end of input."""
    print(HELP)
    while (line := _read(session)) is not None and line != "/quit":
        if line.startswith("/"):
            session = obey(session, line)
        elif line:
            session = told(session, line)


def obey(session: Session, line: str) -> Session:
    """Carry out a command and return the new session. On an error, print it and return the session unchanged."""
    word, _, rest = line.partition(" ")
    try:
        match word:
            case "/new":
                return replace(session, chat=session.chat + 1)
            case "/gate":
                session.subject.require_gate(_number(rest), word)
                return replace(session, gate=_number(rest))
            case "/steer":
                session.subject.of_run(word)
                return replace(session, dose=_number(rest))
            case "/persona":
                session.subject.of_run(word)
                return replace(session, persona=not session.persona)
            case "/base":
                session.subject.require_gate(session.gate, word)
                return replace(session, base=not session.base)
            case "/round":
                return replace(session, subject=of_run(session.subject.of_run(word).folder, int(rest)))
            case "/save":
                _save(session, rest.strip())
            case _:
                print(HELP)
    except ValueError:
        print(f"{word} needs a number, e.g. {word} 1")
    except (UserError, OSError) as error:
        print(error)
    return session


def told(session: Session, message: str) -> Session:
    """Print what each arm answers, under its name, and return the session with the turn."""
    speaking = ""

    def show(arm: str, text: str) -> None:
        nonlocal speaking
        if arm != speaking:
            late = " (it has not heard what was said before)" if session.turns and not session.before(arm) else ""
            print("\n\n" if speaking else "\n", f"[{arm}]{late}", sep="")
            speaking = arm
        print(text, end="", flush=True)

    try:
        session = answer(session, message, show)
        print("\n")
    except UserError as error:
        print(error)
    return session


def _save(session: Session, file: str) -> None:
    if not file:
        raise UserError("/save needs a file, e.g. /save chat.md")
    Path(file).expanduser().write_text(as_markdown(session), "utf-8")
    print(f"{len(session.said)} turns written to {file}")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _ready(session: Session) -> str:
    """What stands before the cursor."""
    subject = session.subject
    at = [f"round {subject.run.round}"] if subject.run else []
    at += [] if subject.alone else [f"gate {session.gate:g}"]
    return f"{', '.join(at)}> "


def _read(session: Session) -> str | None:
    """The next line; "" for one that cannot be read, None at the end of the input."""
    try:
        line = input(_ready(session)).strip()
        line.encode()
    except UnicodeEncodeError:  # see `terminal.take_any_text`
        print(f"this line has bytes that are no text in {sys.stdin.encoding}: type it again")
        return ""
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return line
