"""Processes of their own for the checks, forked from one that has only imported what a run needs.

A new interpreter spends ten seconds on its imports. The fork server does them once for each process of the gate. It has
no tensors, no threads and no patches of a check, so its children are as fresh as a new interpreter.
"""

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from steer_heal import cli

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([f"steer_heal.{name}" for name in ("gate.soak", "commands.evaluate", "commands.export")])


def started(work: Callable, *given, log: Path) -> BaseProcess:
    """Start `work(*given)`, with its stderr at the end of `log` and its stdout beside it, in `.out`."""
    process = FORKS.Process(target=_logged, args=(log, work, given))
    process.start()
    return process


def done(work: Callable, *given, log: Path) -> tuple[int, str]:
    """Do `work(*given)`; returns its exit code and its stdout."""
    process = started(work, *given, log=log)
    process.join()
    return process.exitcode, log.with_suffix(".out").read_text()


def command(words: list[str]) -> None:
    """What `python -m steer_heal.cli` does with these arguments."""
    sys.argv = [cli.__file__, *words]
    cli.main(words)


def _logged(log: Path, work: Callable, given: tuple) -> None:
    for number, path in ((1, log.with_suffix(".out")), (2, log)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    work(*given)
