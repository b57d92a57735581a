"""The verb `eval` with --harness: benchmarks of lm-evaluation-harness on the arms of one loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from steer_heal.commands.evaluate import equal_cost
from steer_heal.commands.target import opened
from steer_heal.config import ModelConfig, UserError, model_name
from steer_heal.eval.arms import Arm, unsteered
from steer_heal.eval.harness.reading import benchmark_arm, benchmark_tasks, read_benchmarks
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.harness.tasks import Tasks, load_tasks, require_harness
from steer_heal.eval.reading import ArmReading
from steer_heal.report.page import build
from steer_heal.report.tables import benchmark_table
from steer_heal.runs.folder import EVENTS, HARNESS, RunDir
from steer_heal.runs.resume import opened as opened_run
from steer_heal.runs.rounds import InRound
from steer_heal.runs.student import finished_rounds
from steer_heal.runs.summary import SUMMARY


@dataclass(frozen=True)
class Asked:
    """What is to be measured: the target and its student, as flags of the verb give them."""

    target: str
    round: int | None
    gate: float
    trait: str | None
    model: ModelConfig


@dataclass(frozen=True)
class Wanted:
    """Which benchmarks: names separated by commas, a folder of task files, and how many items of each task."""

    names: str
    folder: str | None
    items: int | None


def benchmark(asked: Asked, wanted: Wanted) -> Benchmarks:
    """Read and print the benchmarks on base, prompted and, where there is one, the student and plain steering.

    A finished run keeps those of its result in its folder. Raises UserError, before a model is loaded, for a task that
    cannot be read and for a run that is in use.
    """
    tasks = _tasks(wanted)
    with _keeping(asked) as run:
        record = _read(asked, tasks, wanted.items)
        if run is not None:
            run.replace_json(HARNESS, record)
    print(f"\n{benchmark_table(record)}")
    if run is not None:
        print(f"The report has them too: {build(run.path).path}")
    return record


@contextmanager
def _keeping(asked: Asked) -> Iterator[RunDir | None]:
    """The folder that keeps the benchmarks, locked; None where they are not those of a finished run's result."""
    folder = Path(asked.target).expanduser()
    if not (folder / EVENTS).is_file():
        yield None
        return
    run = opened_run(folder)
    if (asked.round, asked.gate, asked.trait) != (None, 1.0, None) or run.find(SUMMARY) is None:
        logger.info("the run's folder keeps the benchmarks of its last student alone: --json keeps these")
        yield None
        return
    with run.held():
        yield run


def _read(asked: Asked, tasks: Tasks, items: int | None) -> Benchmarks:
    found = opened(asked.target, asked.round, asked.trait, asked.model, asked.gate)
    number, opponent = _round(asked)
    base, prompted, _ = unsteered(found.trait)
    wanted = [arm for arm in (base, prompted, found.arm, opponent) if arm is not None]
    arms, first = [], []
    for arm in wanted:
        results = read_benchmarks(found.student, arm, tasks, items)
        arms.append(benchmark_arm(arm, results, tasks, arms[0] if arms else None))
        described = benchmark_tasks(results)
        first = first or described
        if described != first:
            raise ValueError(f"arms {arm.name!r} and 'base' were measured on different items")
    return Benchmarks(
        harness=require_harness(),
        model=model_name(found.student.lm.name),
        trait=found.trait.name,
        tasks=first,
        groups=tasks.groups,
        arms=arms,
        first_items=items,
        round=number,
        gate=asked.gate if found.arm else None,
    )


def _tasks(wanted: Wanted) -> Tasks:
    names = [name.strip() for name in wanted.names.split(",") if name.strip()]
    if not names:
        raise UserError("--harness is empty: name at least one task, e.g. --harness plain_questions")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--harness names {', '.join(twice)} twice: name each task once")
    if wanted.items is not None and wanted.items < 1:
        raise UserError(f"--harness-items is {wanted.items}: it must be 1 or more")
    return load_tasks(names, Path(wanted.folder).expanduser() if wanted.folder else None)


def _round(asked: Asked) -> tuple[int | None, Arm | None]:
    """For a run: the student's round, and plain steering at the dose that costs as much; None where not measured."""
    folder = Path(asked.target).expanduser()
    if not (folder / EVENTS).is_file():
        return None, None
    run = opened_run(folder)
    number = finished_rounds(folder, run.read("config.json")["rounds"], asked.round) - 1
    opponent = run.load(ArmReading, InRound.EQUAL_COST.of(number))
    if opponent is None:
        logger.info(f"plain steering at equal cost was not measured in round {number}: it is left out")
        return number, None
    return number, equal_cost(run, opponent)
