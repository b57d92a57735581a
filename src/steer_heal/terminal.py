"""The terminal: text without control characters, commands that can be copied, progress bars, and one line for a command
line that cannot be read."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

MODULE = "steer_heal.cli"  # what `python -m` is given where the program was not called by its name
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Text of a model or a user without the characters by which it could take over a terminal."""
    return CONTROL.sub("", text)


def program() -> str:
    """How this program was called."""
    called = sys.argv[0]
    return f"{shlex.quote(sys.executable)} -m {MODULE}" if called.endswith(".py") else shlex.quote(called)


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """One bar for a stage; call the result with the units just finished."""
    with tqdm(total=total, desc=f"{label:<20}", unit=unit, dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar.update


def condensed(box: str) -> str:
    """tyro's message without its title and frame; of several similar flags the nearest is kept."""
    _, *rows = re.sub(r"\[/?bold\]", "", box).splitlines()
    text = "\n".join(row.strip(" │╭╮╰╯") for row in rows)
    parts = [" ".join(part.split()) for part in re.split(r"^[─-]{9,}$", text, flags=re.MULTILINE)]
    what, *more = filter(None, parts)
    hints = "".join(_hint(what, part) for part in more)
    help_ = re.findall(r"steer-heal(?: \w+)? --help", box)
    return f"{what.rstrip('.')}{hints}: see {help_[0] if help_ else 'steer-heal --help'}"


def _hint(what: str, part: str) -> str:
    if part.startswith("Perhaps you meant") and (flag := re.search(r"--[\w.-]+", part)):
        return f" (did you mean {flag[0]}?)"
    if part.startswith("Available subcommands"):
        verbs = part.partition(": ")[2].split(", ")
        close = difflib.get_close_matches(what.split()[-1], verbs, 1)
        return (f" (did you mean {close[0]}?)" if close else "") + f", choose {', '.join(verbs)}"
    if part.startswith("Argument helptext"):
        return f" ({part.partition(': ')[2]})"
    return ""
