"""The fair opponents of a healed student: the base, plainly steered by the first round's vector.

A comparison of traits alone would favour a larger dose of plain steering. So the base is measured over a range of
doses, up to where its text breaks, and a student is compared with it at two doses. At equal cost, steering costs as
much coherence as healing did, and the traits are compared. At equal trait, steering moves the trait as far as the
student, and the coherence is compared. The allowed cost is at least `LEAST_COST`: smaller costs are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from steer_heal.config import EvalConfig
from steer_heal.eval.reading import ArmReading, trait_over

LEAST_COST = 0.03
READINGS = 3
AROUND = 3.5  # plain_range auto: smallest and largest dose, as a factor of the dose that begins to cost coherence
NEAR = 0.15  # allowed difference between an arm's cost and the allowed cost, as a share of the latter


class Cost(NamedTuple):
    """A dose and its cost in coherence."""

    dose: float
    cost: float


def coherence_cost(arm: ArmReading, base: ArmReading) -> float:
    """Return the larger of the share of answer mass lost and the share of neutral perplexity gained.

    A negative cost is a gain.
    """
    return share_lost(arm.answer_mass, base.answer_mass, arm.neutral_ppl, base.neutral_ppl)


def share_lost(mass: float, base_mass: float, ppl: float, base_ppl: float) -> float:
    """The coherence cost, from answer mass and neutral perplexity of an arm and of base.

    For a base without answer mass, the share lost is 0. The cost is infinite when a score is not finite.
    """
    lost = 1 - mass / base_mass if base_mass else 0.0 * mass
    gained = ppl / base_ppl - 1
    return max(lost, gained) if math.isfinite(lost + gained) else math.inf


def allowed_cost(healed: ArmReading, base: ArmReading) -> float:
    """Return the coherence cost of plain steering at which it is compared with a healed student."""
    return max(coherence_cost(healed, base), LEAST_COST)


def plain_doses(config: EvalConfig, begins_to_cost: float | None = None) -> list[float]:
    """Return the doses at which plain steering is measured: log-spaced, up to where text is expected to break.

    For `eval.plain_range` auto they lie around `begins_to_cost`, the dose at which steering loses some coherence.
    """
    if "plain" in config.leave_out:
        return []
    low, high = (
        (begins_to_cost / AROUND, begins_to_cost * AROUND) if config.plain_range == "auto" else config.plain_range
    )
    return np.geomspace(low, high, config.counts.plain_doses).tolist()


def dose_at_cost(curve: list[Cost], allowed: float) -> float:
    """Return the largest dose that costs no more than `allowed`; the curve is linear between its points.

    If the curve falls again, this is the largest such dose and not the first, in favour of steering. `curve` may be in
    any order; dose 0 costs nothing. If `allowed` is infinite, the result is the largest dose measured.
    """
    points = sorted([Cost(0.0, 0.0), *curve])
    for (low, low_cost), (high, high_cost) in reversed(list(pairwise(points))):
        if high_cost <= allowed:
            return high
        if low_cost <= allowed:
            share = (allowed - low_cost) / (high_cost - low_cost)
            return low + (high - low) * share


def find_dose_at_cost(allowed: float, curve: list[Cost], read: Callable[[float], float]) -> float:
    """Find a dose whose measured cost is within NEAR of the allowed cost, or the nearest of three readings.

    `read` measures the cost at a dose.
    """
    points, found = list(curve), []
    while len(found) < READINGS:
        dose = dose_at_cost(points, allowed)
        found.append(Cost(dose, read(dose)))
        if _near(found[-1].cost, allowed) or dose == max(point.dose for point in curve):
            break
        points.append(found[-1])
    return min(found, key=lambda point: abs(point.cost - allowed)).dose


def fitting(arms: list[ArmReading], base: ArmReading, allowed: float) -> ArmReading | None:
    """Return the first arm whose cost is near `allowed`, if any. Arms of earlier rounds count: the base is the same."""
    return next((arm for arm in arms if _near(coherence_cost(arm, base), allowed)), None)


def _near(cost: float, allowed: float) -> bool:
    """Whether a cost is near `allowed`. No cost is near an infinite one, which a student with non-finite scores has."""
    return math.isfinite(allowed) and abs(cost - allowed) <= NEAR * allowed


def dose_at_trait(plain: list[ArmReading], base: ArmReading, healed: ArmReading) -> tuple[float, bool]:
    """Return the smallest dose at which plain steering moves the trait as far as the student, and True.

    Doses between the measured ones are interpolated linearly. If no dose moves the trait that far, return the dose that
    moves it furthest, and False. A dose whose trait score is not finite is left out.
    """
    wanted = trait_over(healed, base).mean
    points = [(0.0, 0.0), *((arm.dose, trait_over(arm, base).mean) for arm in plain)]
    points = [(dose, trait) for dose, trait in points if math.isfinite(trait)]
    for (low, before), (high, after) in pairwise(points):
        if after >= wanted:
            return (high if wanted <= before else low + (high - low) * (wanted - before) / (after - before)), True
    return max(points[1:] or points, key=lambda point: point[1])[0], False
