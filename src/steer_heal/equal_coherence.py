"""The fair comparison for a healed student: plain steering that costs as much coherence as healing did.

Any dose moves the trait further if nothing else counts. So the base is steered with the first round's vector at a
range of doses, what each costs in coherence is read, and the trait is measured at the dose that costs what the healed
student lost. Where healing cost nothing, steering gets `LEAST_COST` all the same: below that, costs are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from steer_heal.config import DoseConfig

LEAST_COST = 0.01
READINGS = 3
NEAR = 0.15  # share of the allowed cost by which the arm's own cost may miss it


def coherence_cost(arm: dict, base: dict) -> float:
    """The larger of the share of answer mass lost and the share of neutral perplexity gained; below 0 is a gain."""
    lost = 1 - arm["answer_mass"] / base["answer_mass"]
    gained = arm["neutral_ppl"] / base["neutral_ppl"] - 1
    return max(lost, gained)


def allowed_cost(healed: dict, base: dict) -> float:
    """What plain steering may cost to be compared with a healed student."""
    return max(coherence_cost(healed, base), LEAST_COST)


def curve_doses(config: DoseConfig, count: int) -> list[float]:
    """Doses at which the cost of plain steering is read: log-spaced, from half the lowest tried to the highest."""
    return np.geomspace(config.lowest / 2, config.highest, count).tolist()


def equal_dose(curve: list[dict], allowed: float) -> float:
    """The largest dose that costs no more than `allowed`, the curve taken as straight between its points.

    The largest one, not the first: where the curve falls again, steering gets the benefit. `curve` has
    {"dose", "cost"} in any order; dose 0 costs nothing.
    """
    points = sorted([(0.0, 0.0), *((point["dose"], point["cost"]) for point in curve)])
    for (low, low_cost), (high, high_cost) in reversed(list(pairwise(points))):
        if high_cost <= allowed:
            return high
        if low_cost <= allowed:
            return low + (high - low) * (allowed - low_cost) / (high_cost - low_cost)


def steered_at(allowed: float, curve: list[dict], earlier: list[dict], read: Callable[[float], dict]) -> dict:
    """The arm whose own cost is within NEAR of what is allowed, or as near as three readings come.

    `read` measures the arm at a dose ("coherence_cost" among what it returns). The base does not change over the
    rounds, so an earlier round's arm that fits is taken as it is.
    """
    for arm in earlier:
        if abs(arm["coherence_cost"] - allowed) <= NEAR * allowed:
            return arm
    points = [*curve, *({"dose": arm["dose"], "cost": arm["coherence_cost"]} for arm in earlier)]
    found: list[dict] = []
    while len(found) < READINGS:
        dose = equal_dose(points, allowed)
        found.append(read(dose))
        cost = found[-1]["coherence_cost"]
        if abs(cost - allowed) <= NEAR * allowed or dose == max(point["dose"] for point in curve):
            break
        points.append({"dose": dose, "cost": cost})
    return min(found, key=lambda arm: abs(arm["coherence_cost"] - allowed))
