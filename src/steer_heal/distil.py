"""From a vector to a training set: the dose curve, steered completions, the filter.

The dose curve replaces a bisection over doses (each step of which would decode a batch of its own) by one batch that
mixes all doses; the share of completions that survive the filter is made monotone in the dose by isotonic
regression, and the largest dose that meets the target is read off it. The target is relative to unsteered completions
in the same batch: a filter is never perfect, and what it drops of the model's own text is not the vector's doing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from steer_heal.bake.student import Student
from steer_heal.coherence import judge
from steer_heal.config import DistilConfig, DoseConfig, FilterConfig, UserError
from steer_heal.generate import Sampling, decode
from steer_heal.lm import AnyVector, Row, Steering
from steer_heal.steer import iso_kl

Progress = Callable[[int], None]


class Exhausted(UserError):
    """Steering no longer gives text to train on. In round 0 the user's matter, later the end of the loop."""


def dose_curve(
    student: Student,
    vector: AnyVector,
    prompts: list[str],
    config: DoseConfig,
    distil: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    on_rows: Progress = lambda rows: None,
) -> dict:
    """What completions bear, dose by dose, and the dose chosen.

    Returns {"rule", "target", "dose", "curve", "completions"}. A point of the curve has {"dose", "survival", "fitted",
    "tail_ppl", "example"}, and "kl_p95" under the rule iso_kl; its first point is dose 0, and survival is relative to
    that. "dose" is the smallest when that misses the target by no more than a standard error, and None when it misses
    by more (`require_dose` says so to the user).
    """
    ratio = (config.highest / config.lowest) ** (1 / max(1, config.steps - 1))
    doses = [0.0, *(config.lowest * ratio**i for i in range(config.steps))]
    asked = prompts[: config.prompts]
    plan = [(dose, prompt) for dose in doses for prompt in asked]
    completions = sample(student, vector, plan, distil, limits, key, on_rows)
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
            chosen = largest_dose(doses[1:], [p["fitted"] for p in curve[1:]], target) or config.lowest
        return {**artefact, "target": target, "dose": chosen}
    rows = [Row(student.lm.prompt(c["prompt"]), c["ids"]) for c in completions]
    with student.view(now=0.0):
        found = iso_kl(student.lm, vector, rows, [c["dose"] for c in completions], config.kl_target, distil.batch_size)
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
            f"(dose: nats {curve}): change --dose.kl-target, --dose.lowest or --dose.highest"
        )
    curve = ", ".join(f"{p['dose']:.2f}: {p['survival']:.0%}" for p in artefact["curve"])
    if artefact["target"] == 0:
        raise Exhausted(
            f"the filter drops every completion even without steering (dose: survival {curve}): loosen --filter.*"
        )
    raise Exhausted(
        f"no dose leaves {artefact['target']:.0%} of the completions coherent (dose: survival {curve}): "
        "lower --dose.lowest or --dose.survival, loosen --filter.*, or narrow --steer.band"
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


def distil(
    student: Student,
    vector: AnyVector,
    dose: float,
    prompts: list[str],
    config: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    expected: float = 1.0,
    on_kept: Progress = lambda rows: None,
) -> list[dict]:
    """Completions of the steered previous student, every one with its scores and why it was dropped.

    Batches are sampled until `n_keep` have survived or `budget` is spent; the first is as large as the `expected`
    survival makes it. Prompts and the doses around `dose` take turns, so that each has a fair share. A text that was
    written before is dropped as "duplicate", survivors beyond `n_keep` as "surplus".
    """
    doses = [dose * (1 + side * config.dose_spread) for side in ((0, -1, 1) if config.dose_spread else (0,))]
    completions: list[dict] = []
    kept, texts = 0, set()
    while kept < config.n_keep and len(completions) < config.budget:
        done = len(completions)
        share = kept / done if done else expected  # of the batches before, passed
        rows = min(math.ceil((config.n_keep - kept) / max(share, 0.01)), config.budget - done)
        turns = range(done, done + rows)
        # A step of one dose a pass over the prompts, so that no prompt is always asked at the same dose.
        plan = [(doses[(i + i // len(prompts)) % len(doses)], prompts[i % len(prompts)]) for i in turns]
        before = kept
        for completion in sample(student, vector, plan, config, limits, (*key, done)):
            text = " ".join(completion["text"].lower().split())
            if not completion["dropped"]:
                completion["dropped"] = "duplicate" if text in texts else "surplus" if kept == config.n_keep else ""
                kept += not completion["dropped"]
            texts.add(text)
            completions.append(completion)
        on_kept(kept - before)
    return completions


def require_training_set(completions: list[dict], dose: dict, config: DistilConfig) -> None:
    """Raise Exhausted, the survival table in its text, when too few completions survived to train on."""
    kept = sum(not c["dropped"] for c in completions)
    if kept >= config.min_train:
        return
    reasons = Counter(c["dropped"] for c in completions if c["dropped"])
    dropped = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    curve = ", ".join(f"{p['dose']:.2f}: {p['survival']:.0%}" for p in dose["curve"])
    raise Exhausted(
        f"only {kept} of {len(completions)} completions passed the filter at dose {dose['dose']:.2f}, training needs "
        f"{config.min_train} (dropped: {dropped}; dose: survival {curve}): raise --distil.budget or --dose.survival, "
        "or loosen --filter.*"
    )


def sample(
    student: Student,
    vector: AnyVector,
    plan: list[tuple[float, str]],
    config: DistilConfig,
    limits: FilterConfig,
    key: tuple,
    on_rows: Progress = lambda rows: None,
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
