"""What is printed: text without control characters, and commands that can be copied."""

from __future__ import annotations

import re
import shlex
import sys

MODULE = "steer_heal.cli"  # what `python -m` is given where the program was not called by its name
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Text of a model or a user without the characters by which it could take over a terminal."""
    return CONTROL.sub("", text)


def program() -> str:
    """How this program was called."""
    called = sys.argv[0]
    return f"{shlex.quote(sys.executable)} -m {MODULE}" if called.endswith(".py") else shlex.quote(called)
