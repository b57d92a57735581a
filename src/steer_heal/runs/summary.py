"""The figures of a run: summary.json, and the same for a run that is not finished. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from steer_heal.eval.catalogue import UNITS
from steer_heal.eval.prompts import BestPrompt, PromptsReading, best_prompt
from steer_heal.eval.reading import ArmReading
from steer_heal.eval.record import ArmSummary, arm_record
from steer_heal.eval.verdict import Validity, Verdict, expressible, validity, verdict
from steer_heal.heal.steps import fired_shares
from steer_heal.runs.rounds import InRound, Round
from steer_heal.steer.layers import LayerReport

SUMMARY = "summary.json"
SURVEY = "survey.json"
PROMPTS = "prompts.json"


def plain_file(index: int) -> str:
    """The file of the plain-steering arm at the dose number `index`."""
    return f"plain/d{index}.json"


STAGES = {
    "extract": (InRound.VECTOR,),
    "dose": (InRound.DOSE,),
    "distil": (InRound.COMPLETIONS,),
    "heal": (InRound.ADAPTER,),
    "eval": (InRound.STEERED, InRound.HEALED, InRound.EQUAL_COST, InRound.EQUAL_TRAIT, InRound.GEOMETRY),
}


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """The arms that need no training. At the start of a run some are not measured yet."""

    base: ArmReading | None = None
    prompted: ArmReading | None = None
    """the positive persona as system prompt"""
    negative: ArmReading | None = None
    """the negative persona as system prompt"""
    plain: list[ArmReading]
    """the base steered by the first round's vector, dose by dose"""
    prompts: PromptsReading | None = None
    """the base under five system prompts; read at the end"""

    @property
    def personas(self) -> list[ArmReading]:
        return [self.base, self.prompted, self.negative]


@dataclass(frozen=True, kw_only=True)
class RoundSummary:
    """A round in figures."""

    round: int
    verdict: Verdict
    layers: list[LayerReport]
    dose: float
    generated: int
    kept: int
    steered: ArmSummary
    healed: ArmSummary
    equal_cost: ArmSummary | None = None
    equal_trait: ArmSummary | None = None
    barrier_fired_share: float
    anchor_fired_share: float
    tau_nats: float
    operating_kl_nats: float
    """median divergence of a step"""
    cos_first_vector: float | None
    """this and the next four: see `eval.reading.Geometry`"""
    cos_shift_vector: float | None
    cos_total_first: float | None
    kl_to_base_nats: float
    kl_to_base_rmse_nats: float
    stage_seconds: dict[str, float]

    def named(self) -> dict[str, ArmSummary]:
        """The round's arms that were measured, by name."""
        arms = {name: getattr(self, name) for name in ("steered", "equal_cost", "equal_trait", "healed")}
        return {name: arm for name, arm in arms.items() if arm is not None}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in figures: every arm with its intervals over base, and the seconds of each stage."""

    model: str
    trait: str
    seed: int
    preset: str
    instrument: str | None = None
    """the one that measures the trait"""
    unit: str | None = None
    """of a trait score"""
    base: ArmSummary | None = None
    prompted: ArmSummary | None = None
    negative: ArmSummary | None = None
    best_prompt: BestPrompt | None = None
    """the best of five system prompts; where it was read, at the end"""
    validity: list[Validity]
    plain: list[ArmSummary]
    rounds: list[RoundSummary]
    seconds: float
    """of all stages"""
    stopped: str
    """why the loop ended early, "" when it did not"""
    peak_memory_bytes: int | None = None
    """None while the run is not finished"""


@dataclass(frozen=True, kw_only=True)
class RunName:
    """The fields of a summary that come from the config and the trait."""

    model: str
    trait: str
    seed: int
    preset: str


def summarise(of: RunName, arms: Baselines, rounds: list[Round], seconds: dict[str, float]) -> Summary:
    """The figures of a run, or of its complete part. `seconds` has the computing time of every artefact."""
    base = arms.base
    read = {"base": base, "prompted": arms.prompted, "negative": arms.negative}
    named = {name: arm_record(arm, base) for name, arm in read.items() if arm and base}
    found = Summary(
        **vars(of),
        **named,
        instrument=base and base.instrument,
        unit=base and UNITS[base.instrument],
        validity=[],
        plain=[],
        rounds=[],
        seconds=sum(seconds.values(), 0.0),
        stopped="",
    )
    if len(named) < len(read):
        return found
    everything = [*arms.personas, *(arm for done in rounds for arm in (done.steered, done.healed))]
    return replace(
        found,
        validity=validity(everything),
        best_prompt=best_prompt(arms.prompts, base, rounds[-1].healed) if arms.prompts and rounds else None,
        plain=[arm_record(arm, base, dosed=True) for arm in arms.plain],
        rounds=[_round(done, arms, seconds) for done in rounds],
    )


def verdict_of(done: Round, arms: Baselines) -> Verdict:
    return verdict(arms.base, done.steered, done.healed, expressible(arms.personas, arms.base.instrument))


def _round(done: Round, arms: Baselines, seconds: dict[str, float]) -> RoundSummary:
    base, steps = arms.base, done.steps
    opponents = {"equal_cost": done.equal_cost, "equal_trait": done.equal_trait}
    return RoundSummary(
        round=done.number,
        verdict=verdict_of(done, arms),
        layers=done.layers,
        dose=done.dose.dose,
        generated=len(done.completions),
        kept=sum(not c.dropped for c in done.completions),
        steered=arm_record(done.steered, base),
        healed=arm_record(done.healed, base),
        **{name: arm_record(arm, base, True, done.healed) for name, arm in opponents.items() if arm},
        barrier_fired_share=fired_shares(steps).barrier,
        anchor_fired_share=fired_shares(steps).anchor,
        tau_nats=steps[0].tau,
        operating_kl_nats=statistics.median(step.divergence for step in steps),
        **vars(done.geometry),
        stage_seconds={
            stage: sum(seconds.get(artefact.of(done.number), 0.0) for artefact in artefacts)
            for stage, artefacts in STAGES.items()
        },
    )
