"""The terminal: text without control characters, commands that can be copied, progress bars."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

MODULE = "steer_heal.cli"  # argument of `python -m`, for when the program was not called by its name
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Remove control characters, which could take over a terminal, from the text of a model or a user."""
    return CONTROL.sub("", text)


def take_any_text() -> None:
    """Let no character end a command: what the terminal cannot show is shown as "?".

    Bytes on stdin that are no text become surrogates, for the reader of the line to find.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:  # a notebook has streams of its own
            stream.reconfigure(errors=errors)


def program() -> str:
    """Return the command by which this program was called."""
    called = sys.argv[0]
    return f"{shlex.quote(sys.executable)} -m {MODULE}" if called.endswith(".py") else shlex.quote(called)


@contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show one progress bar for a stage; call the yielded function with the number of units just finished.

    `total` is None where the number of units is not known.
    """
    with tqdm(total=total, desc=f"{label:<20}", unit=unit, dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar.update
