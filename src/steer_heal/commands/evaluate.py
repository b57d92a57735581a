"""The verb `eval`: the instruments alone, on any model, adapter or run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steer_heal.commands.target import opened
from steer_heal.config import EvalConfig, ModelConfig
from steer_heal.data import pool
from steer_heal.eval.arms import Arm, plainly, unsteered
from steer_heal.eval.instruments import instruments, read_arm
from steer_heal.eval.own_probes import probed
from steer_heal.eval.reading import ArmReading
from steer_heal.eval.record import ArmSummary, arm_record
from steer_heal.eval.verdict import Validity, Verdict, expressible, validity, verdict
from steer_heal.report.tables import arm_table, validity_table
from steer_heal.runs.folder import RunDir
from steer_heal.runs.student import vector_of


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


def equal_cost(run: RunDir, reading: ArmReading) -> Arm:
    """Plain steering at equal cost, as a run read it."""
    return plainly("equal_cost", vector_of(run), reading.dose)
