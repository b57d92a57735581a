"""The fair comparison for a healed student: plain steering that costs as much coherence as healing did.

Any dose moves the trait further if nothing else counts. So the base is steered with the first round's vector at a
range of doses, what each costs in coherence is read, and at the dose that costs what the healed student lost the trait
is measured. Where healing cost nothing, steering gets `LEAST_COST` all the same: below that, costs are noise.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from steer_heal.config import DoseConfig

LEAST_COST = 0.01


def coherence_cost(arm: dict, base: dict) -> float:
    """The larger of the share of answer mass lost and the share of neutral perplexity gained; 0 at least."""
    lost = 1 - arm["answer_mass"] / base["answer_mass"]
    gained = arm["neutral_ppl"] / base["neutral_ppl"] - 1
    return max(0.0, lost, gained)


def curve_doses(config: DoseConfig, count: int) -> list[float]:
    """Doses at which the cost of plain steering is read: log-spaced, from half the lowest tried to the highest."""
    return np.geomspace(config.lowest / 2, config.highest, count).tolist()


def equal_dose(curve: list[dict], cost: float) -> float:
    """The largest dose that costs no more than `cost` (or LEAST_COST), the curve taken as straight between its points.

    The largest one, not the first: where the curve falls again, steering gets the benefit. `curve` has
    {"dose", "cost"} by ascending dose; dose 0 costs nothing.
    """
    allowed = max(cost, LEAST_COST)
    points = [(0.0, 0.0), *((point["dose"], point["cost"]) for point in curve)]
    for (low, low_cost), (high, high_cost) in reversed(list(pairwise(points))):
        if high_cost <= allowed:
            return high
        if low_cost <= allowed:
            return low + (high - low) * (allowed - low_cost) / (high_cost - low_cost)
