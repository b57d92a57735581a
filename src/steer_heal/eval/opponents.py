"""The fair opponents of a healed student: the base, plainly steered by the first round's vector.

Any dose moves the trait further if nothing else counts. So the base is measured over a range of doses, up to where its
text breaks, and a student is compared with it twice: at the dose that costs as much coherence as healing did (which
of the two has more trait?) and at the dose that moves the trait as far (which of them is still coherent?). Where
healing cost nothing, steering may cost `LEAST_COST` all the same: below that, costs are noise.
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
NEAR = 0.15  # share of the allowed cost by which the arm's own cost may miss it


class Cost(NamedTuple):
    """What a dose costs in coherence."""

    dose: float
    cost: float


def coherence_cost(arm: ArmReading, base: ArmReading) -> float:
    """The larger of the share of answer mass lost and the share of neutral perplexity gained; below 0 is a gain.

    A base without any answer mass has none to lose. Infinite for scores that are not finite.
    """
    lost = 1 - arm.answer_mass / base.answer_mass if base.answer_mass else 0.0 * arm.answer_mass
    gained = arm.neutral_ppl / base.neutral_ppl - 1
    return max(lost, gained) if math.isfinite(lost + gained) else math.inf


def allowed_cost(healed: ArmReading, base: ArmReading) -> float:
    """What plain steering may cost to be compared with a healed student."""
    return max(coherence_cost(healed, base), LEAST_COST)


def plain_doses(config: EvalConfig) -> list[float]:
    """Doses at which plain steering is measured: log-spaced, up to where text is expected to break."""
    if "plain" in config.leave_out:
        return []
    return np.geomspace(*config.plain_range, config.counts.plain_doses).tolist()


def dose_at_cost(curve: list[Cost], allowed: float) -> float:
    """The largest dose that costs no more than `allowed`, the curve taken as straight between its points.

    The largest one, not the first: where the curve falls again, steering gets the benefit. `curve` may be in any
    order; dose 0 costs nothing. Where any cost is allowed, that is the largest dose measured.
    """
    points = sorted([Cost(0.0, 0.0), *curve])
    for (low, low_cost), (high, high_cost) in reversed(list(pairwise(points))):
        if high_cost <= allowed:
            return high
        if low_cost <= allowed:
            share = (allowed - low_cost) / (high_cost - low_cost)
            return low + (high - low) * share


def find_dose_at_cost(allowed: float, curve: list[Cost], read: Callable[[float], float]) -> float:
    """The dose whose own cost is within NEAR of what is allowed, or as near as three readings come.

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
    """One of the arms that costs what is allowed: the base does not change over the rounds."""
    return next((arm for arm in arms if _near(coherence_cost(arm, base), allowed)), None)


def _near(cost: float, allowed: float) -> bool:
    """Nothing is near an infinite cost, which is that of a student whose scores are not finite."""
    return math.isfinite(allowed) and abs(cost - allowed) <= NEAR * allowed


def dose_at_trait(plain: list[ArmReading], base: ArmReading, healed: ArmReading) -> tuple[float, bool]:
    """The smallest dose at which plain steering moves the trait as far as the student, straight between the doses
    measured. Where none does, the dose that moves it furthest, and False. A dose whose trait is not finite is left out.
    """
    wanted = trait_over(healed, base).mean
    points = [(0.0, 0.0), *((arm.dose, trait_over(arm, base).mean) for arm in plain)]
    points = [(dose, trait) for dose, trait in points if math.isfinite(trait)]
    for (low, before), (high, after) in pairwise(points):
        if after >= wanted:
            return (high if wanted <= before else low + (high - low) * (wanted - before) / (after - before)), True
    return max(points[1:] or points, key=lambda point: point[1])[0], False
