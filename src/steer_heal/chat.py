"""Talk to a run's result: the base and the student answer side by side, and the gate can be dialled."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steer_heal.bake import Student
from steer_heal.config import ModelConfig, UserError
from steer_heal.generate import Sampling, decode
from steer_heal.loading import load

HELP = "type a message;  /gate 0.5 dials the student between base (0) and healed (1);  /quit or Ctrl-D ends"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def chat(folder: Path, gate: float, max_new_tokens: int) -> None:
    """Read messages from the terminal until it ends. Every message is a fresh one-turn chat."""
    if not (folder / "adapter").is_dir():
        raise UserError(f"{str(folder)!r} has no finished run (no adapter folder in it): finish it with --resume first")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    student = Student(load(ModelConfig(**config["model"])))
    student.load_round(folder / "adapter")
    print(HELP)
    turn = 0
    while (message := _read()) is not None:
        if message.startswith("/gate"):
            gate = _number(message, gate)
            print(f"gate {gate:g}")
        elif message == "/quit":
            break
        elif message:
            turn += 1
            prompt = [student.lm.prompt(message)]
            for name, now in (("base", 0.0), (f"student at gate {gate:g}", gate)):
                with student.view(now=now):
                    (answer,) = decode(student.lm, prompt, max_new_tokens, 1, sampling=Sampling((turn,), 0.7))
                print(f"\n[{name}]\n{CONTROL.sub('', student.lm.text(answer.ids))}")
            print()


def _read() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _number(message: str, otherwise: float) -> float:
    try:
        return float(message.removeprefix("/gate"))
    except ValueError:
        print("give a number, e.g. /gate 0.5")
        return otherwise
