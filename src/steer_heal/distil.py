"""From a vector to a training set: the dose curve, steered completions, the filter.

The dose curve replaces a bisection over doses (each step of which would decode a batch of its own) by one batch that
mixes all doses; the share of completions that survive the filter is made monotone in the dose by isotonic
regression, and the largest dose that meets the target is read off it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from steer_heal.bake import Student
from steer_heal.coherence import judge
from steer_heal.config import DistilConfig, DoseConfig, FilterConfig, UserError
from steer_heal.generate import Sampling, decode
from steer_heal.lm import Row, Steering, Vector

Progress = Callable[[int], None]


def dose_curve(
    student: Student,
    vector: Vector,
    prompts: list[str],
    config: DoseConfig,
    distil: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    on_rows: Progress = lambda rows: None,
) -> dict:
    """Survival of the filter against the dose, and the dose chosen.

    Returns {"dose", "target", "curve": [{"dose", "survival", "fitted", "tail_ppl", "example"}], "completions": [...]}.
    Raises UserError, the curve in its text, when even the smallest dose survives less often than the target.
    """
    ratio = (config.highest / config.lowest) ** (1 / max(1, config.steps - 1))
    doses = [config.lowest * ratio**i for i in range(config.steps)]
    asked = prompts[: config.prompts]
    plan = [(dose, prompt) for dose in doses for prompt in asked]
    completions = sample(student, vector, plan, distil, limits, key, on_rows)
    curve = []
    for dose in doses:
        of_dose = [c for c in completions if c["dose"] == dose]
        kept = [c for c in of_dose if not c["dropped"]]
        tail = sorted(c["tail_ppl"] for c in of_dose)[len(of_dose) // 2]
        curve.append(
            {"dose": dose, "survival": len(kept) / len(of_dose), "tail_ppl": tail, "example": of_dose[0]["text"]}
        )
    for point, fitted in zip(curve, decreasing_fit([p["survival"] for p in curve]), strict=True):
        point["fitted"] = fitted
    chosen = largest_dose(doses, [p["fitted"] for p in curve], config.survival)
    if chosen is None:
        shares = ", ".join(f"{p['dose']:.2f}: {p['survival']:.0%}" for p in curve)
        raise UserError(
            f"no dose leaves {config.survival:.0%} of the completions coherent (dose: survival {shares}): "
            "lower --dose.lowest or --dose.survival, loosen --filter.*, or narrow --steer.band"
        )
    return {"dose": chosen, "target": config.survival, "curve": curve, "completions": completions}


def decreasing_fit(values: list[float]) -> list[float]:
    """Least-squares non-increasing fit (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, count in pools for _ in range(count)]


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


def distil(
    student: Student,
    vector: Vector,
    dose: float,
    prompts: list[str],
    config: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    on_rows: Progress = lambda rows: None,
) -> list[dict]:
    """Completions of the steered previous student, every one with its scores and why it was dropped.

    Raises UserError when fewer than `min_train` survive.
    """
    plan = [(dose, prompts[i % len(prompts)]) for i in range(config.completions)]
    completions = sample(student, vector, plan, config, limits, key, on_rows)
    kept = sum(not c["dropped"] for c in completions)
    if kept < config.min_train:
        raise UserError(
            f"only {kept} of {len(completions)} completions passed the filter at dose {dose:.2f}, training needs "
            f"{config.min_train}: raise --dose.survival or --distil.completions, or loosen --filter.*"
        )
    return completions


def sample(
    student: Student,
    vector: Vector,
    plan: list[tuple[float, str]],
    config: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    on_rows: Progress,
) -> list[dict]:
    """Decode (dose, prompt) pairs from the steered previous student and judge each under the pristine base."""
    lm = student.lm
    tokens = [lm.prompt(prompt) for _, prompt in plan]
    steering_ = Steering(vector, torch.tensor([dose for dose, _ in plan]))
    sampling = Sampling(key, config.temperature, config.top_k, config.top_p)
    with student.view(now=0.0):
        written = decode(lm, tokens, config.max_new_tokens, config.batch_size, steering_, sampling, on_rows)
    rows = [Row(p, c.ids) for p, c in zip(tokens, written, strict=True)]
    with student.view(history=0.0, now=0.0):
        judged = judge(lm, rows, limits, config.batch_size)
    return [
        {"prompt": prompt, "dose": dose, "ids": c.ids, "ended": c.ended, **scores}
        for (dose, prompt), c, scores in zip(plan, written, judged, strict=True)
    ]


def kept_rows(student: Student, completions: list[dict]) -> tuple[list[Row], list[float]]:
    """The survivors as training rows, and the dose each was written at."""
    kept = [c for c in completions if not c["dropped"]]
    return [Row(student.lm.prompt(c["prompt"]), c["ids"]) for c in kept], [c["dose"] for c in kept]


def anchor_completions(
    student: Student, prompts: list[str], config: DistilConfig, key: tuple, on_rows: Progress = lambda rows: None
) -> list[dict]:
    """Completions of mundane prompts by the pristine base, on which a healed model should not move."""
    lm = student.lm
    tokens = [lm.prompt(prompt) for prompt in prompts]
    sampling = Sampling(key, config.temperature, config.top_k, config.top_p)
    with student.view(history=0.0, now=0.0):
        written = decode(lm, tokens, config.max_new_tokens, config.batch_size, None, sampling, on_rows)
    return [
        {"prompt": prompt, "dose": 0.0, "ids": c.ids, "ended": c.ended, "text": lm.text(c.ids), "dropped": ""}
        for prompt, c in zip(prompts, written, strict=True)
    ]
