"""What is measured: an arm, how far it is above another, where a round moved the student. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from steer_heal.eval.intervals import Change, Interval, interval
from steer_heal.scores import Judged


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Means over an arm's items with their 95% intervals; None for what was not read. See `catalogue`."""

    trait_nats: float | None = None
    """on the trait's own instrument"""
    trait_ci: Interval | None = None
    contrast_nats: float | None = None
    contrast_ci: Interval | None = None
    yes_no_nats: float | None = None
    yes_no_ci: Interval | None = None
    answer_mass: float | None = None
    answer_mass_ci: Interval | None = None
    canary_share: float | None = None
    canary_ci: Interval | None = None
    canary_log_odds_nats: float | None = None
    canary_log_odds_ci: Interval | None = None
    coherent_share: float | None = None
    coherent_ci: Interval | None = None
    looped_share: float | None = None
    looped_ci: Interval | None = None
    styled_share: float | None = None
    styled_ci: Interval | None = None
    neutral_ppl: float | None = None
    demo_ppl: float | None = None


@dataclass(frozen=True)
class Profile:
    """The moral-foundation profile: log of the mean probability of each concern, and how well it was read."""

    source: str
    care_nats: float
    fairness_nats: float
    loyalty_nats: float
    auth_nats: float
    sanctity_nats: float
    liberty_nats: float
    norms_nats: float
    top1: float
    """share of scenes whose label comes first"""
    top1_ci: Interval
    p_ans_any: float
    """probability of all labels together"""
    unreadable_share: float
    ppx_json: float | None = None
    """tiny-mfv: perplexity of the answer format that it forces"""

    def nats(self, foundation: str) -> float:
        return getattr(self, f"{'auth' if foundation == 'authority' else foundation}_nats")


@dataclass(frozen=True, kw_only=True)
class Demo(Judged):
    """A greedy answer in free text."""

    prompt: str


@dataclass(frozen=True, kw_only=True)
class ArmReading(Measures):
    """One arm as it was measured."""

    arm: str
    instrument: str
    """that the trait is read on"""
    dose: float
    read: list[str]
    """the instruments that were read, see `eval.instruments`"""
    items: dict[str, list[float]]
    """the score of every item, by instrument, see `catalogue`"""
    asked: dict[str, str]
    """a fingerprint of the items, by instrument: arms are compared on equal ones or not at all"""
    demos: list[Demo] | None = None
    profile: Profile | None = None
    scenes: list[list[float]] | None = None
    """probability of each foundation, scene by scene"""
    reached: bool | None = None
    """equal_trait: whether any dose moves the trait as far as the student"""

    @property
    def label(self) -> str:
        """The arm's name in print."""
        return printed(self.arm)

    def joined(self, other: ArmReading) -> ArmReading:
        """This reading and another one of the same arm, by other instruments, as one."""
        own = {key: value for key, value in vars(other).items() if value is not None}
        both = {key: getattr(self, key) | getattr(other, key) for key in ("items", "asked")}
        return replace(self, **own | both | {"read": [*self.read, *other.read]})


@dataclass(frozen=True)
class Geometry:
    """Where a round moved the student. Cosines are means over the band, None for a foreign vector."""

    cos_first_vector: float | None
    """of the round's vector with the first round's"""
    cos_shift_vector: float | None
    """of the round's shift with its own vector"""
    cos_total_first: float | None
    """of the shift since base with the first round's vector"""
    kl_to_base_nats: float
    """KL(student || base), mean over the tokens of fixed text"""
    kl_to_base_rmse_nats: float
    """its root mean square over the same tokens"""


def printed(arm: str) -> str:
    """The name of an arm in print."""
    return arm.replace("_", " ")


def side_by_side(**arms: ArmReading) -> list[dict[str, str]]:
    """The free-text answers of several arms, one row a prompt."""
    first, *_ = arms.values()
    return [
        {"prompt": demo.prompt, **{name: arm.demos[i].text for name, arm in arms.items()}}
        for i, demo in enumerate(first.demos)
    ]


def paired(arm: ArmReading, base: ArmReading, key: str) -> np.ndarray:
    """Item by item, how far an arm is above another. Raises ValueError when they were not asked the same."""
    require_same(arm, base, key)
    return np.array(arm.items[key], dtype=np.float64) - np.array(base.items[key], dtype=np.float64)


def require_same(arm: ArmReading, base: ArmReading, key: str) -> None:
    if arm.asked[key] != base.asked[key]:
        raise ValueError(f"arms {arm.arm!r} and {base.arm!r} were measured on different {key} items")


def trait_over(arm: ArmReading, base: ArmReading) -> Change:
    """How far the arm's trait score is above base's, on the trait's instrument, nats."""
    return change_of(paired(arm, base, arm.instrument))


def over(arm: ArmReading, other: ArmReading) -> dict[str, Change]:
    """How far one arm is above another, on every kind of item that both were asked; log perplexities in nats."""
    return {key: change_of(paired(arm, other, key)) for key in arm.items if key in other.items}


def change_of(values: np.ndarray) -> Change:
    return Change(float(values.mean()), interval(values))
