"""What a judge said about a run's arms: the records, and the figures drawn from them. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from steer_heal.config import UserError
from steer_heal.data import LEAST_PROBES
from steer_heal.eval.intervals import Change, correlation, interval, reliability
from steer_heal.eval.judge.preferences import ASPECTS, Preferred, agreed, outcome, preferred
from steer_heal.eval.reading import ArmReading, change_of
from steer_heal.eval.verdict import Validity, halves

STUDENT, EQUAL_COST = "student", "equal_cost"
SCORES = ("trait", "coherence", "answered")


@dataclass(frozen=True)
class Rating:
    """A judge's rating of one answer."""

    trait: float
    """0 to 100; 50 is neither the trait nor its opposite"""
    coherence: float
    """0 to 100"""
    answered: float
    """1 if it does what was asked, else 0"""


@dataclass(frozen=True, kw_only=True)
class Rated:
    """An answer of an arm, and its rating."""

    arm: str
    prompt: str
    everyday: bool
    text: str
    rating: Rating | None = None
    """None when the judge gave none"""
    again: Rating | None = None
    """a second reading, of a random tenth"""
    failure: str | None = None
    """why there is no rating"""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The student's answer beside another arm's, read in both orders: +1 student, 0 neither, -1 the other arm."""

    over: str
    prompt: str
    everyday: bool
    trait: int | None = None
    """None when the judge answered in one order or in none"""
    answered: int | None = None
    orders_agreed: bool | None = None
    """whether both orders gave the same on the trait"""
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedArm:
    """An arm's mean ratings on one kind of prompt, and their differences from base on the same prompts."""

    arm: str
    everyday: bool
    rated: int
    failed: int
    trait: Change
    coherence: Change
    answered: Change
    over_base: dict[str, Change] | None = None
    """by score; None for base"""


@dataclass(frozen=True)
class Agreement:
    """How well the judge agrees with another reading."""

    reading: str
    pairs: int
    of: str
    """answers, or means of arms"""
    correlation: float | None
    """Pearson's; None where one of the two does not vary"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the judge cost."""

    asked: int
    kept: int
    """answers that an earlier call had kept"""
    calls: int
    """requests sent, second tries of malformed answers included"""
    failures: dict[str, int]
    """questions without an answer, by reason"""
    prompt_tokens: int | None = None
    """None where the judge does not count them"""
    answer_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge's reading of a run. An invalid judge has neither arms nor preferences: nothing is drawn from it."""

    judge: str
    trait: str
    round: int
    gate: float
    seed: int
    prompts: int
    everyday: int
    validity: Validity
    agreement: list[Agreement]
    arms: list[JudgedArm]
    preferences: list[Preferred]
    cost: Cost
    rated: list[Rated]
    compared: list[Compared]


def judged_arms(rated: list[Rated]) -> list[JudgedArm]:
    """The means of every arm, on the trait's prompts and then on everyday ones."""
    return [
        _arm(arm, everyday, rated)
        for everyday in (False, True)
        for arm in dict.fromkeys(one.arm for one in rated if one.everyday == everyday)
        if any(one.rating for one in _of(rated, arm, everyday))
    ]


def _of(rated: list[Rated], arm: str, everyday: bool) -> list[Rated]:
    return [one for one in rated if one.arm == arm and one.everyday == everyday]


def _arm(arm: str, everyday: bool, rated: list[Rated]) -> JudgedArm:
    own = _of(rated, arm, everyday)
    ratings = [one.rating for one in own if one.rating]
    means = {name: change_of(np.array([getattr(one, name) for one in ratings])) for name in SCORES}
    pairs = _paired(own, _of(rated, "base", everyday))
    over = {name: change_of(_minus(pairs, name)) for name in SCORES} if arm != "base" and pairs else None
    return JudgedArm(
        arm=arm, everyday=everyday, rated=len(ratings), failed=len(own) - len(ratings), **means, over_base=over
    )


def _paired(one: list[Rated], other: list[Rated]) -> list[tuple[Rating, Rating]]:
    """The ratings of two arms on the prompts on which both have one."""
    there = {rated.prompt: rated.rating for rated in other if rated.rating}
    return [(rated.rating, there[rated.prompt]) for rated in one if rated.rating and rated.prompt in there]


def _minus(pairs: list[tuple[Rating, Rating]], score: str) -> np.ndarray:
    return np.array([getattr(one, score) - getattr(other, score) for one, other in pairs], dtype=np.float64)


def judge_validity(rated: list[Rated], readings: dict[str, ArmReading]) -> Validity:
    """Whether the judge tells answers under the two personas apart, on the trait's prompts.

    It is valid when the positive persona's trait rating minus the negative one's has a 95% interval above 0.
    `readings` are the run's own, by arm; the agreement is that of the arms' means with the trait's instrument.

    Raises UserError when the judge rated too few answers of both.
    """
    pairs = _paired(_of(rated, "prompted", False), _of(rated, "negative", False))
    if len(pairs) < LEAST_PROBES:
        few = f"the judge rated {len(pairs)} pairs of answers under the two personas"
        raise UserError(f"{few}: {LEAST_PROBES} are needed, take a judge that answers in the form asked")
    change = _minus(pairs, "trait")
    ci, scores = interval(change), _by_prompt(rated)
    means = {arm: row.mean() for arm, row in scores.items()}
    both = [arm for arm in means if arm in readings]
    agreement = _correlation([means[arm] for arm in both], [readings[arm].trait_nats for arm in both])
    return Validity(
        instrument="judge",
        positive_over_negative=float(change.mean()),
        ci=ci,
        valid=ci[0] > 0,
        halves=halves(change),
        reliability=reliability(np.array([*scores.values()])) if len(scores) > 1 else 0.0,
        arms=len(scores),
        agreement=agreement if len(both) > 2 else None,
    )


def _by_prompt(rated: list[Rated]) -> dict[str, np.ndarray]:
    """Trait ratings by arm, on the trait's prompts that are rated for every arm."""
    arms = dict.fromkeys(one.arm for one in rated if not one.everyday)
    found = {arm: {one.prompt: one.rating.trait for one in _of(rated, arm, False) if one.rating} for arm in arms}
    shared = [prompt for prompt in next(iter(found.values())) if all(prompt in row for row in found.values())]
    return {arm: np.array([row[prompt] for prompt in shared]) for arm, row in found.items()} if shared else {}


def _correlation(one: list[float], other: list[float]) -> float | None:
    found = correlation(np.array(one), np.array(other)) if one else float("nan")
    return found if np.isfinite(found) else None


def agreements(rated: list[Rated], readings: dict[str, ArmReading]) -> list[Agreement]:
    """The judge beside the run's own readings, where they exist, and beside a second reading of itself."""
    answers = [one for one in rated if one.rating]
    means = {arm.arm: arm.trait.mean for arm in judged_arms(rated) if not arm.everyday}
    found, both = [], [arm for arm in means if arm in readings]
    if both:
        contrast = [readings[arm].trait_nats for arm in both]
        instrument = readings[both[0]].instrument
        r = _correlation([means[arm] for arm in both], contrast)
        found.append(Agreement(f"trait, with {instrument}", len(both), "means of arms", r))
    information = {
        (arm, demo.prompt): value
        for arm, reading in readings.items()
        for demo, value in zip(reading.demos or (), reading.items.get("relevance", ()), strict=False)
    }
    if same := [one for one in answers if (one.arm, one.prompt) in information]:
        values = [information[one.arm, one.prompt] for one in same]
        r = _correlation([one.rating.answered for one in same], values)
        found.append(Agreement("answered, with relevance", len(same), "answers", r))
    twice = [one for one in answers if one.again]
    for name in SCORES if twice else ():
        pairs = [[getattr(of, name) for of in (one.rating, one.again)] for one in twice]
        r = _correlation(*map(list, zip(*pairs, strict=True)))
        found.append(Agreement(f"{name}, with itself", len(twice), "answers", r))
    return found


def compared(over: str, prompt: str, everyday: bool, orders: Iterable[dict[str, str] | None]) -> Compared:
    """Join the choices of both orders; the student's answer is the first text in the first order."""
    one, other = orders
    about = {"over": over, "prompt": prompt, "everyday": everyday}
    if one is None or other is None:
        return Compared(**about, failure="no choice in one of the orders")
    read = {key: (outcome(one[key], True), outcome(other[key], False)) for key in ASPECTS}
    return Compared(
        **about, **{key: agreed(*both) for key, both in read.items()}, orders_agreed=len({*read["trait"]}) == 1
    )


def judged_preferences(found: list[Compared]) -> list[Preferred]:
    """The student against each arm on each aspect, over all prompts that were read in both orders."""
    rows = []
    for over in dict.fromkeys(one.over for one in found):
        for aspect in ASPECTS:
            outcomes = [value for one in found if one.over == over and (value := getattr(one, aspect)) is not None]
            if outcomes:
                rows.append(preferred(STUDENT, over, aspect, outcomes))
    return rows
