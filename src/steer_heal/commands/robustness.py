"""The verb `eval` with --robustness: how much of a finished run's trait is left where it was not trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steer_heal.bake.student import Student
from steer_heal.commands.export import require_mergeable
from steer_heal.config import UserError, model_name
from steer_heal.data import Trait
from steer_heal.data.frames import DISTURBING, USUAL, Frame
from steer_heal.eval.arms import Arm
from steer_heal.eval.disturbed import fine_tuned, rounded_weights, to_4_bits, to_8_bits, unchanged
from steer_heal.eval.instruments import contrast_scores
from steer_heal.eval.robustness import Held, Robustness, held
from steer_heal.model.memory import give_back_freed_memory
from steer_heal.model.packing import packed
from steer_heal.report.page import build
from steer_heal.report.tables import robustness_text
from steer_heal.runs.folder import ROBUSTNESS, RunDir
from steer_heal.runs.resume import measured_trait, opened, settings
from steer_heal.runs.student import finished_rounds, student_after
from steer_heal.runs.summary import SUMMARY
from steer_heal.terminal import progress


class Condition(NamedTuple):
    """Under which the trait is read: what stands around the probes, and what was done to the model."""

    name: str
    frame: Frame = USUAL
    model: Callable[[Student, float], AbstractContextManager] = unchanged


CONDITIONS = (
    Condition("as trained"),
    *(Condition(frame.name, frame) for frame in DISTURBING),
    Condition("in 8 bits", model=partial(rounded_weights, rounding=to_8_bits)),
    Condition("in 4 bits", model=partial(rounded_weights, rounding=to_4_bits)),
    Condition("fine-tuned", model=fine_tuned),
)


def robustness(target: str) -> Robustness:
    """Read and print what is left of the trait of a finished run's last student, and keep it in the run's folder.

    Raises UserError, before a model is loaded, for what is no finished run and for a run that is in use.
    """
    folder = Path(target).expanduser()
    run = opened(folder)
    if run.find(SUMMARY) is None:
        raise UserError(f"--robustness: the run {target!r} is not finished: continue it with {run.resuming}")
    with run.held():
        record = _read(run)
        run.replace_json(ROBUSTNESS, record)
    print(f"\n{robustness_text(record)}")
    print(f"The report has it too: {build(folder).path}")
    return record


def _read(run: RunDir) -> Robustness:
    """Base and student under every condition, on the base's float weights."""
    _, config = settings(run)
    rounds = finished_rounds(run.path, config.rounds, None)
    student = student_after(run.path, run.read("config.json"), rounds, float_weights=True)
    require_mergeable(student.lm, "--robustness", "it has no float weights to merge into")
    trait = measured_trait(run)
    found: list[Held] = []
    with progress("robustness", 2 * len(CONDITIONS), "reading") as done:
        for condition in CONDITIONS:
            both = []
            for gate in (0.0, 1.0):
                both.append(_scores(student, gate, trait, config.eval.counts.contrast, condition).tolist())
                give_back_freed_memory()
                done(1)
            found.append(held(condition.name, *both, found[0] if found else None))
    named = {"model": model_name(student.lm.name), "trait": trait.name, "round": rounds - 1}
    return Robustness(**named, probes=len(found[0].base), held=found)


def _scores(student: Student, gate: float, trait: Trait, count: int, condition: Condition) -> np.ndarray:
    """The trait's contrast probes, nats per token: at gate 0 base's scores, at 1 the student's."""
    with condition.model(student, gate), packed(student.lm) as lm:
        return trait.direction * contrast_scores(lm, Arm("robustness"), trait.contrast[:count], condition.frame)
