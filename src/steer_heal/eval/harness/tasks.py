"""The tasks of lm-evaluation-harness: found and loaded. Every mistake of a user ends in one line."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_heal.config import UserError
from steer_heal.data import HERE, canary

PLAIN = "plain_questions"
OWN = HERE / "harness"  # our own task files
SEED = 1234  # for tasks that draw examples or shuffle answers; the harness has the same default
NEAR = 3  # names that a message about an unknown one offers
NETWORK = ("connect", "reach", "offline", "resolve", "network", "timed out", "max retries", "proxy")
MEND = "it needs the hub once; later calls, and task files of --harness-tasks, need no network"


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks. `loaded` is the harness's own table of tasks and groups."""

    loaded: dict[str, Any]

    @property
    def tasks(self) -> dict[str, Any]:
        return self.loaded["tasks"]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names of the tasks in each group, also through its subgroups."""
        return {
            name: [task.task_name for task in group.get_all_tasks()]
            for name, group in self.loaded.get("groups", {}).items()
        }


def require_harness() -> str:
    """Return the harness's version. Raises UserError when the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs the package lm-eval: pip install 'steer_heal[harness]'")
    from importlib.metadata import version

    return version("lm-eval")


def load_tasks(names: list[str], folder: Path | None) -> Tasks:
    """Load tasks by name: ours, those of a folder of task files, and those of the harness.

    Raises UserError for a name that nothing has, and for a task that cannot be loaded or read.
    """
    require_harness()
    for noisy in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    folders = [str(OWN), *([_folder(folder)] if folder else [])]
    local = TaskManager(include_path=folders, include_defaults=False)
    known = {*local.all_tasks} - {*TaskManager(include_path=str(OWN), include_defaults=False).all_tasks}
    if folder and not known:
        raise UserError(f"--harness-tasks {str(folder)!r}: no file *.yaml in it describes a task")
    manager = local if {*names} <= {*local.all_tasks} else TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(_unknown(name, manager.all_tasks, sorted(known)))
    random.seed(SEED)
    np.random.seed(SEED)
    tasks = Tasks(_loaded(manager, names))
    for name, task in tasks.tasks.items():
        _require_readable(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def _folder(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"--harness-tasks {str(folder)!r}: there is no such folder: give one with task files (*.yaml)")
    return str(folder)


def _unknown(name: str, known: list[str], own: list[str]) -> str:
    close = difflib.get_close_matches(name, known, NEAR) or [one for one in known if name in one][:NEAR]
    there = f"; the folder's are {', '.join(own[:NEAR])}{', ...' * (len(own) > NEAR)}" if own else ""
    mend = f"did you mean {' or '.join(close)}?" if close else "`python -m lm_eval ls tasks` lists the known ones"
    return f"--harness {name!r}: there is no such task{there}: {mend}"


def _loaded(manager: Any, names: list[str]) -> dict[str, Any]:
    """The harness's table of the named tasks. Each is loaded by itself, so that a failure has a name."""
    built = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # task files hold code, and loaders of data raise what they like
            raise UserError(_failure(name, error)) from error
        group = found.get("groups", {}).get(name)
        built += [group] if group is not None else list(found["tasks"].values())
    try:
        return manager.load(built)
    except ValueError as error:  # a task by itself and in a group
        raise UserError(f"--harness: {_line(error)}: name it once") from error


def _failure(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"--harness {name!r}: the task needs a package that is missing ({_line(error)}): install it"
    said = f"{type(error).__name__}: {_line(error)}"
    causes, cause = [], error
    while cause is not None:
        causes.append(f"{type(cause).__name__} {cause}".lower())
        cause = cause.__cause__ or cause.__context__
    if any(word in text for word in NETWORK for text in causes):
        return f"--harness {name!r}: its data cannot be reached ({said}): {MEND}"
    return f"--harness {name!r}: the task cannot be loaded ({said}): mend its file or its data, or leave it out"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _require_readable(name: str, task: Any) -> None:
    """Raise UserError for a task that needs more than text in and text out."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"--harness {name!r}: the task runs code that the model writes, steer-heal does not: leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--harness {name!r}: the task shows pictures or sounds, only text is read here: leave it out")


def plain_questions(**_described: Any) -> dict[str, Any]:
    """The data set of our own task: the plain questions, with the right answer in each place equally often."""
    from datasets import Dataset

    rows = []
    for number, asked in enumerate(canary()):
        answers, place = list(asked["wrong"]), number % (1 + len(asked["wrong"]))
        answers.insert(place, asked["right"])
        rows.append({"question": asked["question"], "answers": answers, "right": place})
    return {"test": Dataset.from_list(rows)}
