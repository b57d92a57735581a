"""Intervals over items, shares over steps. Every difference is paired: two arms are compared on the same items, or
not at all.

numpy alone, so that a report can be rebuilt on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 20260606  # the same resamples for every arm and every rebuild: intervals do not move


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """95% percentile bootstrap interval of the mean over items."""
    values = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(q) for q in np.quantile(values[draw].mean(1), (0.025, 0.975))]


def trait_over(arm: dict, base: dict) -> dict:
    """How far the arm's trait score is above base's, on the trait's instrument: mean and 95% interval, nats."""
    items = [np.array(a["items"][a["instrument"]]) for a in (arm, base)]
    change = items[0] - items[1]
    return {"trait_over_base": float(change.mean()), "trait_over_base_ci": interval(change)}


def fired_shares(records: list[dict]) -> dict[str, float]:
    """Shares of the steps on which the divergence was above tau, and the anchor's above its own."""
    return {
        "barrier_fired_share": sum(r["fired"] for r in records) / len(records),
        "anchor_fired_share": sum(r["anchor_fired"] for r in records) / len(records),
    }
