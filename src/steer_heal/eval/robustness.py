"""How much of a student's trait is left under conditions that a run does not train for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_heal.eval.intervals import Change, ratio
from steer_heal.eval.reading import change_of


@dataclass(frozen=True, kw_only=True)
class Held:
    """The trait under one condition, which base and student are both read under."""

    condition: str
    base: list[float]
    """base's score of every contrast probe, nats per token"""
    student: list[float]
    """the student's"""
    over_base: Change
    """student minus base, paired over the probes"""
    left: Change | None = None
    """`over_base` divided by that of the first condition, with its 95% interval; None where that one may be zero"""


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What is left of the last student's trait, condition by condition."""

    model: str
    trait: str
    round: int
    """the student is that after this round"""
    probes: int
    held: list[Held]
    """first the usual condition, of which the shares are"""

    @property
    def sure(self) -> bool:
        """Whether the student's trait differs from base's in the usual condition, so that a share of it has meaning."""
        low, high = self.held[0].over_base.ci
        return not low <= 0 <= high


def held(condition: str, base: Sequence[float], student: Sequence[float], usual: Held | None) -> Held:
    """The trait under a condition, as a share of that under the usual one (None: this is it).

    The interval of the share is Fieller's, paired over probes, see `intervals.ratio`.
    """
    change = np.subtract(student, base)
    whole = change if usual is None else np.subtract(usual.student, usual.base)
    low, high = change_of(whole).ci
    left = None
    if usual is not None and not low <= 0 <= high and np.isfinite(change).all():
        mean, *ci = ratio(change[None], whole[None])
        left = Change(mean, tuple(ci))
    return Held(condition=condition, base=[*base], student=[*student], over_base=change_of(change), left=left)
