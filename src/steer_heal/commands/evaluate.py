"""The verb `eval`: the instruments alone, on any model, adapter or run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from steer_heal.bake.foreign import config_of, load_adapter, scalable
from steer_heal.bake.student import Student
from steer_heal.config import EvalConfig, ModelConfig, UserError
from steer_heal.data import Trait, load_trait, pool
from steer_heal.eval.arms import Arm, plainly, unsteered
from steer_heal.eval.instruments import instruments, read_arm
from steer_heal.eval.own_probes import probed
from steer_heal.eval.reading import ArmReading
from steer_heal.eval.record import ArmSummary, arm_record
from steer_heal.eval.verdict import Validity, Verdict, expressible, validity, verdict
from steer_heal.model.loading import load
from steer_heal.report.tables import arm_table, validity_table
from steer_heal.runs.folder import EVENTS, RunDir
from steer_heal.runs.resume import measured_trait
from steer_heal.runs.resume import opened as opened_run
from steer_heal.runs.student import finished_rounds, student_after, vector_of


@dataclass(frozen=True)
class Target:
    """The object of the measurement: a base model, with or without a student on it."""

    student: Student
    trait: Trait
    arm: Arm | None = None
    """the student at the gate; None for a model alone"""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The arms of a model, the validity of the instruments and the verdict."""

    base: ArmSummary
    prompted: ArmSummary
    negative: ArmSummary
    validity: list[Validity]
    student: ArmSummary | None = None
    """for an adapter or a run"""
    gate: float | None = None
    verdict: Verdict | None = None


def evaluate_alone(
    target: str, round_: int | None, gate: float, trait: str | None, model: ModelConfig, config: EvalConfig
) -> Alone:
    """Measure and print base, both prompted arms and, for an adapter or a run, the student at the gate.

    Raises UserError when the target cannot be measured.
    """
    found = opened(target, round_, trait, model, gate)
    found = replace(found, trait=probed(found.student, found.trait, config.judge, pool("probe")))
    which = instruments(config, at_end=True)
    wanted = [*unsteered(found.trait), *([found.arm] if found.arm else [])]
    arms = [read_arm(f"eval {arm.name}", found.student, arm, found.trait, config, which) for arm in wanted]
    base, *_, last = arms
    record = Alone(**{arm.arm: arm_record(arm, base) for arm in arms}, validity=validity(arms))
    print(f"\n{arm_table(*arms)}\n\n{validity_table(record.validity)}")
    if not found.arm:
        return record
    said = verdict(base, last, last, expressible(arms, found.trait.instrument))
    print(f"verdict: {said.word} ({said.why})")
    return replace(record, gate=gate, verdict=said)


def opened(target: str, round_: int | None, trait: str | None, model: ModelConfig, gate: float = 1.0) -> Target:
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


def equal_cost(run: RunDir, reading: ArmReading) -> Arm:
    """Plain steering at equal cost, as a run read it."""
    return plainly("equal_cost", vector_of(run), reading.dose)
