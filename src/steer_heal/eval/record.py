"""An arm in summary.json: its measures and their differences from base. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.catalogue import MASS, NEUTRAL, OFF_TARGET
from steer_heal.eval.framed import InFrame, in_frames, worst
from steer_heal.eval.intervals import Change, Interval, LogChange, interval, log_mean_over
from steer_heal.eval.opponents import coherence_cost
from steer_heal.eval.reading import ArmReading, Measures, Profile, over, require_same, trait_over
from steer_heal.eval.verdict import care_over_authority


@dataclass(frozen=True, kw_only=True)
class ArmSummary(Measures):
    """An arm's measures, and its differences from base on the same items."""

    trait_over_base: float
    trait_over_base_ci: Interval
    over_base: dict[str, Change]
    """by kind of item that both have; log perplexities in nats"""
    coherence_cost: float
    framed: list[InFrame]
    """what was read in held-out frames"""
    profile: Profile | None = None
    profile_over_base: dict[str, LogChange] | None = None
    """for each foundation, and for care minus authority"""
    dose: float | None = None
    """plain steering: its dose"""
    reached: bool | None = None
    """plain steering at equal trait: whether any dose moves the trait as far as the student"""
    healed_over: dict[str, Change] | None = None
    """plain steering at equal cost or trait: the student minus this arm"""

    @property
    def worst_cost(self) -> float:
        """The largest coherence cost: in the usual frame, and in the held-out frames where they were read."""
        mass, ppl = worst(self.framed, MASS), worst(self.framed, NEUTRAL)
        lost = [self.coherence_cost, *([1 - mass.over_base] if mass else []), *([ppl.over_base - 1] if ppl else [])]
        return max(lost) if all(map(math.isfinite, lost)) else math.inf

    @property
    def off_target(self) -> dict[str, Change]:
        """Differences from base of the traits that should not move."""
        return {
            key.removeprefix(OFF_TARGET): move for key, move in self.over_base.items() if key.startswith(OFF_TARGET)
        }


def arm_record(arm: ArmReading, base: ArmReading, dosed: bool = False, healed: ArmReading | None = None) -> ArmSummary:
    """Summarise an arm. Plain steering is `dosed`; as an opponent it also has the student `healed` to compare with."""
    change = trait_over(arm, base)
    return ArmSummary(
        **{field.name: getattr(arm, field.name) for field in fields(Measures)},
        trait_over_base=change.mean,
        trait_over_base_ci=change.ci,
        over_base=over(arm, base),
        coherence_cost=coherence_cost(arm, base),
        framed=in_frames(arm, base),
        profile=arm.profile,
        profile_over_base=_profile_over(arm, base) if arm.scenes and base.scenes else None,
        dose=arm.dose if dosed else None,
        reached=arm.reached,
        healed_over=over(healed, arm) if healed else None,
    )


def _profile_over(arm: ArmReading, base: ArmReading) -> dict[str, LogChange]:
    require_same(arm, base, "profile")
    p, p_base = np.array(arm.scenes), np.array(base.scenes)
    change = care_over_authority(arm) - care_over_authority(base)
    moves = {name: log_mean_over(p[:, i], p_base[:, i]) for i, name in enumerate(FOUNDATIONS)}
    return moves | {"care_over_authority": LogChange(float(change.mean()), interval(change))}
