"""A run, an adapter or a model by the name that the user gives, loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from steer_heal.bake.foreign import config_of, load_adapter, scalable
from steer_heal.bake.student import Student
from steer_heal.config import ModelConfig, UserError
from steer_heal.data import Trait, load_trait
from steer_heal.eval.arms import Arm
from steer_heal.model.loading import load
from steer_heal.runs.folder import EVENTS
from steer_heal.runs.resume import measured_trait
from steer_heal.runs.resume import opened as opened_run
from steer_heal.runs.student import finished_rounds, student_after


@dataclass(frozen=True)
class Target:
    """What is measured or talked to: a base model, with or without a student on it."""

    student: Student
    trait: Trait
    arm: Arm | None = None
    """the student at the gate; None for a model alone"""


def opened(target: str, round_: int | None, trait: str | None, model: ModelConfig, gate: float = 1.0) -> Target:
    """Load it. Raises UserError where it is none of the three, or has no such round or gate."""
    folder = Path(target).expanduser()
    if (folder / EVENTS).is_file():
        run = opened_run(folder)
        config = run.read("config.json")
        rounds = finished_rounds(folder, config["rounds"], round_)
        arm = Arm("student", history=gate, now=0.0)
        return Target(student_after(folder, config, rounds), load_trait(trait) if trait else measured_trait(run), arm)
    if round_ is not None:
        raise UserError(f"--round {round_}: {target!r} is no run folder (it has no {EVENTS})")
    if not (folder / "adapter_config.json").is_file():
        return Target(Student(load(replace(model, path=target))), load_trait(trait or "love"))
    made_on = config_of(folder).get("base_model_name_or_path")
    if not (base := model.path or made_on):
        raise UserError(f"adapter {target!r} does not say on which model it was made: name it with --base")
    try:
        student = Student(load(replace(model, path=base), folder))
    except UserError as error:
        mend = "" if model.path else f"; {target!r} names that base: name another with --base"
        raise UserError(f"{error}{mend}") from error
    load_adapter(student, folder)
    if gate not in (0.0, 1.0) and not scalable(student):
        raise UserError(f"--gate is {gate}: a DoRA adapter is on (1) or off (0)")
    return Target(student, load_trait(trait or "love"), Arm("student", history=0.0, now=gate))
