"""How much of the vector the text survives: the dose curve, and the dose read off it.

The curve replaces a bisection over doses (each step of which would decode a batch of its own) by one batch that
mixes all doses; the share of completions that survive the filter is made monotone in the dose by isotonic
regression, and the largest dose that meets the target is read off it. The target is relative to unsteered completions
in the same batch: a filter is never perfect, and what it drops of the model's own text is not the vector's doing.
The other rule, iso-KL, looks for the dose of a given divergence instead.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from steer_heal.config import DoseConfig
from steer_heal.distil.sample import Exhausted, Progress, Teacher, sample
from steer_heal.model.forward import states
from steer_heal.model.likelihood import token_kl
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import AnyVector, Steering

ISO_KL_TOLERANCE = 0.05  # share of the target by which the dose found may miss it
ISO_KL_PASSES = 12  # scoring passes; the secant in log-log needs three to five


def iso_kl(
    lm: LM, vector: AnyVector, rows: list[Row], doses: list[float], target: float
) -> dict[str, float | list[float] | None]:
    """Dose at which the 95th percentile over tokens of KL(steered || unsteered) equals `target` nats.

    Each row was written under its own dose; all rows are scored under theirs in mixed batches, which gives the curve.
    The rows of the dose nearest to where the (increasing) curve crosses the target are then scored again under
    candidates found by a secant in log dose and log KL, steered and unsteered on the same tokens, until the answer
    is within 5%. After wassname/isokl_steering_calibration, which bisects with one rollout a step.

    Returns {"dose", "kl", "kl_p95"}: the curve at the distinct doses, ascending; dose and kl are None when the curve
    does not cross the target between the smallest and the largest positive dose.
    """
    plain = states(lm, rows, lm.read_rows)
    given = torch.tensor(doses, dtype=torch.float32)
    kl = token_kl(lm.head, states(lm, rows, lm.read_rows, Steering(vector, given)), plain)
    grid = sorted(set(doses))
    members = {dose: [i for i, d in enumerate(doses) if d == dose] for dose in grid}
    curve = [p95(torch.cat([kl[i] for i in members[dose]])) for dose in grid]
    missed = {"dose": None, "kl": None, "kl_p95": curve}
    above = next((i for i, (d, k) in enumerate(zip(grid, curve, strict=True)) if d > 0 and k >= target), None)
    if above is None or above == 0 or grid[above - 1] == 0:
        return missed
    low, high = grid[above - 1], grid[above]
    nearest = members[low if target - curve[above - 1] < curve[above] - target else high]
    chosen, reference = [rows[i] for i in nearest], [plain[i] for i in nearest]

    def at(dose: float) -> float:
        steered = states(lm, chosen, lm.read_rows, Steering(vector, torch.full((len(chosen),), dose)))
        return p95(torch.cat(token_kl(lm.head, steered, reference)))

    points = [(math.log(d), math.log(at(d) / target)) for d in (low, high)]
    for _ in range(ISO_KL_PASSES - 2):
        (x0, y0), (x1, y1) = sorted(points, key=lambda point: abs(point[1]))[:2]
        x = x1 - y1 * (x1 - x0) / (y1 - y0) if y1 != y0 else (x0 + x1) / 2
        x = min(max(x, math.log(low / 2)), math.log(2 * high))
        reached = at(math.exp(x))
        if abs(reached - target) <= ISO_KL_TOLERANCE * target:
            return {"dose": math.exp(x), "kl": reached, "kl_p95": curve}
        points.append((x, math.log(reached / target)))
    return missed


def p95(values: Float[Tensor, "n"]) -> float:
    return values.quantile(0.95).item()


def dose_curve(teacher: Teacher, prompts: list[str], config: DoseConfig, on_rows: Progress = lambda rows: None) -> dict:
    """The share of completions that survive the filter, dose by dose, and the dose chosen.

    Returns {"rule", "target", "dose", "curve", "completions"}. A point of the curve has {"dose", "survival", "fitted",
    "tail_ppl", "example"}, and "kl_p95" under the rule iso_kl; its first point is dose 0, and survival is relative to
    that. "dose" is the smallest when that misses the target by no more than a standard error, and None when it misses
    by more (`require_dose` says so to the user).
    """
    lowest, highest = config.range
    ratio = (highest / lowest) ** (1 / max(1, config.steps - 1))
    doses = [0.0, *(lowest * ratio**i for i in range(config.steps))]
    asked = prompts[: config.prompts]
    plan = [(dose, prompt) for dose in doses for prompt in asked]
    completions = sample(teacher, plan, on_rows=on_rows)
    curve = []
    for dose in doses:
        of_dose = [c for c in completions if c["dose"] == dose]
        tail = sorted(c["tail_ppl"] for c in of_dose)[len(of_dose) // 2]
        survival = sum(not c["dropped"] for c in of_dose) / len(of_dose)
        curve.append({"dose": dose, "survival": survival, "tail_ppl": tail, "example": of_dose[0]["text"]})
    fit = isotonic_regression([p["survival"] for p in curve], increasing=False).x.tolist()
    for point, fitted in zip(curve, fit, strict=True):
        point["fitted"] = fitted
    artefact = {"rule": config.rule, "curve": curve, "completions": completions}
    if config.rule == "survival":
        target = config.survival * curve[0]["fitted"]
        chosen = None
        if target > 0 and curve[1]["fitted"] >= target - _sampling_error(curve, len(asked)):
            chosen = largest_dose(doses[1:], [p["fitted"] for p in curve[1:]], target) or lowest
        return {**artefact, "target": target, "dose": chosen}
    lm, given = teacher.student.lm, [c["dose"] for c in completions]
    rows = [Row(lm.prompt(c["prompt"]), c["ids"]) for c in completions]
    with teacher.student.view(now=0.0):
        found = iso_kl(lm, teacher.vector, rows, given, config.kl_target, lm.read_rows)
    for point, kl in zip(curve, found.pop("kl_p95"), strict=True):
        point["kl_p95"] = kl
    return {**artefact, "target": config.kl_target, **found}


def _sampling_error(curve: list[dict], rows: int) -> float:
    """Standard error of the difference between the unsteered share and the smallest dose's, each of so many rows."""
    shares = [(p["survival"] * rows + 1) / (rows + 2) for p in curve[:2]]  # Laplace's: ten of ten is not certainty
    return math.sqrt(sum(share * (1 - share) for share in shares) / rows)


def require_dose(artefact: dict) -> float:
    """The chosen dose. Raises Exhausted, the curve in its text, when there is none."""
    if artefact["dose"] is not None:
        return artefact["dose"]
    if artefact["rule"] == "iso_kl":
        curve = ", ".join(f"{p['dose']:.2f}: {p['kl_p95']:.3g}" for p in artefact["curve"])
        raise Exhausted(
            f"no dose between the smallest and the largest reaches a 95th percentile KL of {artefact['target']:g} nats "
            f"(dose: nats {curve}): change --dose.kl-target or --dose.range"
        )
    curve = ", ".join(f"{p['dose']:.2f}: {p['survival']:.0%}" for p in artefact["curve"])
    if artefact["target"] == 0:
        raise Exhausted(
            f"the filter drops every completion even without steering (dose: survival {curve}): loosen --filter.*"
        )
    raise Exhausted(
        f"no dose leaves {artefact['target']:.0%} of the completions coherent (dose: survival {curve}): "
        "lower --dose.range or --dose.survival, loosen --filter.*, or narrow --steer.band"
    )


def largest_dose(doses: list[float], survival: list[float], target: float) -> float | None:
    """Largest dose whose fitted survival reaches the target, interpolated in log dose; None when none does."""
    if survival[0] < target:
        return None
    for (d0, s0), (d1, s1) in zip(
        zip(doses, survival, strict=True), zip(doses[1:], survival[1:], strict=True), strict=False
    ):
        if s1 < target:
            share = (s0 - target) / (s0 - s1)
            return math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return doses[-1]


def expected_survival(artefact: dict) -> float:
    """Share of completions that the filter is expected to pass at the chosen dose, between the curve's points."""
    points = [(p["dose"], p["fitted"]) for p in artefact["curve"]]
    return float(np.interp(artefact["dose"], *zip(*points, strict=True)))
