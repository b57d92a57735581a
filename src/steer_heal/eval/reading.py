"""Records of measurements: an arm, its difference from another arm, the geometry of a round. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from steer_heal.eval.intervals import Change, Interval, interval
from steer_heal.scores import Judged


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Means over an arm's items with their 95% intervals; None for an instrument that was not read. See `catalogue`."""

    trait_nats: float | None = None
    """on the trait's own instrument"""
    trait_ci: Interval | None = None
    contrast_nats: float | None = None
    contrast_ci: Interval | None = None
    yes_no_nats: float | None = None
    yes_no_ci: Interval | None = None
    whole_nats: float | None = None
    whole_ci: Interval | None = None
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
    ended_share: float | None = None
    ended_ci: Interval | None = None
    demo_words: float | None = None
    demo_words_ci: Interval | None = None
    relevant_share: float | None = None
    relevant_ci: Interval | None = None
    relevance_nats: float | None = None
    relevance_ci: Interval | None = None
    refusal_nats: float | None = None
    refusal_ci: Interval | None = None
    over_refusal_nats: float | None = None
    over_refusal_ci: Interval | None = None
    pressed_nats: float | None = None
    pressed_ci: Interval | None = None
    neutral_ppl: float | None = None
    demo_ppl: float | None = None


@dataclass(frozen=True)
class Profile:
    """The moral-foundation profile: log of the mean probability of each concern, and the quality of the answers."""

    source: str
    care_nats: float
    fairness_nats: float
    loyalty_nats: float
    auth_nats: float
    sanctity_nats: float
    liberty_nats: float
    norms_nats: float
    top1: float
    """share of scenes whose own label is the most probable"""
    top1_ci: Interval
    p_ans_any: float
    """probability of all labels together"""
    unreadable_share: float
    ppx_json: float | None = None
    """perplexity of the answer format that tiny-mfv forces"""

    def nats(self, foundation: str) -> float:
        return getattr(self, f"{'auth' if foundation == 'authority' else foundation}_nats")


@dataclass(frozen=True, kw_only=True)
class Demo(Judged):
    """A greedy answer in free text."""

    prompt: str
    ended: bool | None = None
    """whether the model wrote its end token within the length limit; None in older readings"""


@dataclass(frozen=True, kw_only=True)
class ArmReading(Measures):
    """The measurements of one arm."""

    arm: str
    instrument: str
    """the instrument on which the trait is read"""
    dose: float
    read: list[str]
    """the instruments that were read, see `eval.instruments`"""
    items: dict[str, list[float]]
    """the score of every item, by instrument, see `catalogue`"""
    asked: dict[str, str]
    """a fingerprint of the items, by instrument; arms are compared only when theirs are equal"""
    demos: list[Demo] | None = None
    profile: Profile | None = None
    scenes: list[list[float]] | None = None
    """probability of each foundation, scene by scene"""
    reached: bool | None = None
    """equal_trait: whether any dose moves the trait as far as the student"""

    @property
    def label(self) -> str:
        """The arm's name as printed."""
        return printed(self.arm)

    def missing(self, which: tuple[str, ...]) -> tuple[str, ...]:
        """The instruments of `which` that were not read."""
        return tuple(name for name in which if name not in self.read)

    def joined(self, other: ArmReading) -> ArmReading:
        """Merge this reading with another reading of the same arm by other instruments."""
        own = {key: value for key, value in vars(other).items() if value is not None}
        both = {key: getattr(self, key) | getattr(other, key) for key in ("items", "asked")}
        return replace(self, **own | both | {"read": [*self.read, *other.read]})


@dataclass(frozen=True, kw_only=True)
class SurveyedDose:
    """Plain steering at one dose of a survey."""

    dose: float
    cost: float
    """see `opponents.coherence_cost`"""
    trait: float
    """over base, on the trait's instrument"""


@dataclass(frozen=True, kw_only=True)
class SurveyedBand:
    """Plain steering on one band of blocks, dose by dose, and where it costs what bands are compared at."""

    blocks: list[int]
    doses: list[SurveyedDose]
    dose: float
    trait: float
    """at that dose, interpolated"""

    @property
    def name(self) -> str:
        return f"blocks {self.blocks[0]} to {self.blocks[-1]}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What plain steering does on this model, band by band, see `eval.survey`."""

    cost: float
    """the cost at which bands are compared"""
    bands: list[SurveyedBand]

    @property
    def best(self) -> SurveyedBand:
        """The band at which steering moves the trait furthest for that cost."""
        return max(self.bands, key=lambda band: band.trait)

    @property
    def described(self) -> str:
        """The bands in a line."""
        seen = ", ".join(f"{band.name} {band.trait:+.3f} at dose {band.dose:.2f}" for band in self.bands)
        return f"plain steering that costs {self.cost:.0%} of coherence moves the trait by: {seen}"


@dataclass(frozen=True)
class Geometry:
    """The direction and size of a round's move. Cosines are means over the band, None for a foreign vector."""

    cos_first_vector: float | None
    """cosine of the round's vector and the first round's"""
    cos_shift_vector: float | None
    """cosine of the round's shift and its own vector"""
    cos_total_first: float | None
    """cosine of the shift since base and the first round's vector"""
    kl_to_base_nats: float
    """KL(student || base), mean over the tokens of fixed text"""
    kl_to_base_rmse_nats: float
    """root mean square of that KL over the same tokens"""


def printed(arm: str) -> str:
    """An arm's name as printed."""
    return "student" if arm == "healed" else arm.replace("_", " ")


def side_by_side(**arms: ArmReading) -> list[dict[str, str]]:
    """The free-text answers of several arms, one row per prompt."""
    first, *_ = arms.values()
    return [
        {"prompt": demo.prompt, **{name: arm.demos[i].text for name, arm in arms.items()}}
        for i, demo in enumerate(first.demos)
    ]


def paired(arm: ArmReading, base: ArmReading, key: str) -> np.ndarray:
    """Return the arm's score minus base's for each item. Raises ValueError when their items differ."""
    require_same(arm, base, key)
    return np.array(arm.items[key], dtype=np.float64) - np.array(base.items[key], dtype=np.float64)


def require_same(arm: ArmReading, base: ArmReading, key: str) -> None:
    if arm.asked[key] != base.asked[key]:
        raise ValueError(f"arms {arm.arm!r} and {base.arm!r} were measured on different {key} items")


def trait_over(arm: ArmReading, base: ArmReading) -> Change:
    """Return the arm's trait score minus base's, on the trait's instrument, in nats."""
    return change_of(paired(arm, base, arm.instrument))


def over(arm: ArmReading, other: ArmReading) -> dict[str, Change]:
    """Return the arm's mean minus the other's on every kind of item that both have; log perplexities in nats."""
    return {key: change_of(paired(arm, other, key)) for key in arm.items if key in other.items}


def change_of(values: np.ndarray) -> Change:
    return Change(float(values.mean()), interval(values))
