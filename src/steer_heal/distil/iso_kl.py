"""The dose with a given KL divergence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.model.forward import states
from steer_heal.model.likelihood import token_kl
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import AnyVector, Steering

ISO_KL_TOLERANCE = 0.05  # allowed difference between the KL reached and the target, as a share of the target
ISO_KL_PASSES = 12  # scoring passes; the secant in log-log needs three to five


class IsoKl(NamedTuple):
    """The dose with a given KL divergence."""

    dose: float | None
    kl: float | None
    """the KL that it reaches, nats"""
    kl_p95: list[float]
    """the curve: 95th percentile of the KL at each distinct dose, doses ascending, nats"""


def iso_kl(lm: LM, vector: AnyVector, rows: list[Row], doses: list[float], target: float) -> IsoKl:
    """Find the dose at which the 95th percentile over tokens of KL(steered || unsteered) equals `target` nats.

    Each row was written under its own dose. All rows are scored under their doses in mixed batches, which gives the
    curve. The curve is taken to increase, and the two doses around its crossing of the target are found. The rows of
    the dose whose KL is nearer to the target are then scored again, steered and unsteered on the same tokens, at doses
    proposed by a secant in log dose and log KL, until the KL is within 5% of the target. After
    wassname/isokl_steering_calibration, which bisects with one rollout per step.

    Dose and KL are None when the curve does not cross the target between the smallest and the largest positive dose, or
    when the search does not converge.
    """
    plain = states(lm, rows)
    given = torch.tensor(doses, dtype=torch.float32)
    kl = token_kl(lm.head, states(lm, rows, Steering(vector, given)), plain)
    grid = sorted(set(doses))
    members = {dose: [i for i, d in enumerate(doses) if d == dose] for dose in grid}
    curve = [p95(torch.cat([kl[i] for i in members[dose]])) for dose in grid]
    missed = IsoKl(None, None, curve)
    above = next((i for i, (d, k) in enumerate(zip(grid, curve, strict=True)) if d > 0 and k >= target), None)
    if above is None or above == 0 or grid[above - 1] == 0:
        return missed
    low, high = grid[above - 1], grid[above]
    nearest = members[low if target - curve[above - 1] < curve[above] - target else high]
    chosen, reference = [rows[i] for i in nearest], [plain[i] for i in nearest]

    def at(dose: float) -> float:
        steered = states(lm, chosen, Steering(vector, torch.full((len(chosen),), dose)))
        return p95(torch.cat(token_kl(lm.head, steered, reference)))

    points = [(math.log(d), math.log(at(d) / target)) for d in (low, high)]
    for _ in range(ISO_KL_PASSES - 2):
        (x0, y0), (x1, y1) = sorted(points, key=lambda point: abs(point[1]))[:2]
        x = x1 - y1 * (x1 - x0) / (y1 - y0) if y1 != y0 else (x0 + x1) / 2
        x = min(max(x, math.log(low / 2)), math.log(2 * high))
        reached = at(math.exp(x))
        if abs(reached - target) <= ISO_KL_TOLERANCE * target:
            return IsoKl(math.exp(x), reached, curve)
        points.append((x, math.log(reached / target)))
    return missed


def p95(values: Float[Tensor, " n"]) -> float:
    return values.quantile(0.95).item()
