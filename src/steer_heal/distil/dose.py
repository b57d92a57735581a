"""The dose curve (the share of completions that pass the filter, dose by dose) and the choice of the dose.

One batch mixes all doses; a bisection would decode one batch per step. Isotonic regression makes the share monotone in
the dose. The dose chosen is the largest that meets the target. The target is relative to unsteered completions in the
same batch: the filter also drops some of the model's own text, which the vector does not cause. The other rule,
iso-KL, finds the dose with a given KL divergence instead.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from steer_heal.config import DoseConfig
from steer_heal.distil.record import Completion, DoseCurve, DosePoint
from steer_heal.distil.sample import Exhausted, Progress, Teacher, sample
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


def dose_curve(
    teacher: Teacher, prompts: list[str], config: DoseConfig, on_rows: Progress = lambda rows: None
) -> DoseCurve:
    """Measure the share of completions that pass the filter at each dose, and choose the dose.

    The target is relative to the share at dose 0. If even the smallest dose misses the target, that dose is chosen when
    it misses by no more than a standard error. Otherwise the dose is None, and `require_dose` tells the user.
    """
    lowest, highest = config.range
    ratio = (highest / lowest) ** (1 / max(1, config.steps - 1))
    doses = [0.0, *(lowest * ratio**i for i in range(config.steps))]
    asked = prompts[: config.prompts]
    completions = sample(teacher, [(dose, prompt) for dose in doses for prompt in asked], on_rows=on_rows)
    of_dose = [[c for c in completions if c.dose == dose] for dose in doses]
    survival = [sum(not c.dropped for c in some) / len(some) for some in of_dose]
    curve = [
        DosePoint(
            dose=dose,
            survival=share,
            fitted=fitted,
            tail_ppl=sorted(c.scores.tail_ppl for c in some)[len(some) // 2],
            example=some[0].text,
        )
        for dose, share, fitted, some in zip(doses, survival, _monotone(survival), of_dose, strict=True)
    ]
    if config.rule == "iso_kl":
        return _iso_kl_curve(teacher, config, curve, completions)
    target = config.survival * curve[0].fitted
    chosen = None
    if target > 0 and curve[1].fitted >= target - _sampling_error(curve, len(asked)):
        chosen = largest_dose(doses[1:], [p.fitted for p in curve[1:]], target) or lowest
    return DoseCurve(rule=config.rule, target=target, dose=chosen, curve=curve, completions=completions)


def _monotone(survival: list[float]) -> list[float]:
    return isotonic_regression(survival, increasing=False).x.tolist()


def _iso_kl_curve(
    teacher: Teacher, config: DoseConfig, curve: list[DosePoint], completions: list[Completion]
) -> DoseCurve:
    """Add the KL divergence to each point of the curve, and choose the dose at which it meets the target."""
    lm, given = teacher.student.lm, [c.dose for c in completions]
    rows = [Row(lm.prompt(c.prompt), c.ids) for c in completions]
    with teacher.student.view(now=0.0):
        found = iso_kl(lm, teacher.vector, rows, given, config.kl_target)
    points = [replace(point, kl_p95=kl) for point, kl in zip(curve, found.kl_p95, strict=True)]
    return DoseCurve(
        rule=config.rule,
        target=config.kl_target,
        dose=found.dose,
        kl=found.kl,
        curve=points,
        completions=completions,
    )


def _sampling_error(curve: list[DosePoint], rows: int) -> float:
    """Standard error of the difference in survival between dose 0 and the smallest dose, each of `rows` completions."""
    shares = [(p.survival * rows + 1) / (rows + 2) for p in curve[:2]]  # Laplace's rule: ten of ten is not certainty
    return math.sqrt(sum(share * (1 - share) for share in shares) / rows)


def require_dose(found: DoseCurve) -> float:
    """Return the chosen dose. Raises Exhausted, with the curve in its message, when there is none."""
    if found.dose is not None:
        return found.dose
    if found.rule == "iso_kl":
        curve = ", ".join(f"{p.dose:.2f}: {p.kl_p95:.3g}" for p in found.curve)
        raise Exhausted(
            f"no dose between the smallest and the largest reaches a 95th percentile KL of {found.target:g} nats "
            f"(dose: nats {curve}): change --dose.kl-target or --dose.range"
        )
    if found.target == 0:
        raise Exhausted(
            f"the filter drops every completion even without steering (dose: survival {found.survivals}): "
            "loosen --filter.*"
        )
    raise Exhausted(
        f"no dose leaves {found.target:.0%} of the completions coherent (dose: survival {found.survivals}): "
        "lower --dose.range or --dose.survival, loosen --filter.*, or narrow --steer.band"
    )


def largest_dose(doses: list[float], survival: list[float], target: float) -> float | None:
    """Largest dose whose fitted survival reaches the target, interpolated in log dose; None if there is none."""
    if survival[0] < target:
        return None
    for (d0, s0), (d1, s1) in zip(
        zip(doses, survival, strict=True), zip(doses[1:], survival[1:], strict=True), strict=False
    ):
        if s1 < target:
            share = (s0 - target) / (s0 - s1)
            return math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return doses[-1]


def expected_survival(found: DoseCurve) -> float:
    """Return the expected survival at the chosen dose, interpolated between the curve's points."""
    points = [(p.dose, p.fitted) for p in found.curve]
    return float(np.interp(found.dose, *zip(*points, strict=True)))
