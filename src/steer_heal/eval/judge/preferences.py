"""Which of two answers is better: counts, and an interval. A judge and a person are counted alike. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_heal.eval.intervals import Change
from steer_heal.eval.reading import change_of

ASPECTS = {"trait": "shows the trait more", "answered": "better does what was asked"}


@dataclass(frozen=True, kw_only=True)
class Preferred:
    """How often one arm's answer was preferred to another's."""

    arm: str
    over: str
    """the arm that it is compared with"""
    aspect: str
    """trait: which answer shows it more; answered: which better does what was asked"""
    better: int
    same: int
    worse: int
    net: Change
    """share better minus share worse, with its 95% interval over prompts"""


def preferred(arm: str, over: str, aspect: str, outcomes: Sequence[int]) -> Preferred:
    """Count outcomes, at least one, each +1 (better), 0 (the same) or -1 (worse)."""
    counts = [sum(outcome == one for outcome in outcomes) for one in (1, 0, -1)]
    net = change_of(np.array(outcomes, dtype=np.float64))
    return Preferred(arm=arm, over=over, aspect=aspect, better=counts[0], same=counts[1], worse=counts[2], net=net)


def outcome(choice: str, arm_is_first: bool) -> int:
    """+1 if `choice` (first, second or same) prefers the arm, -1 if it prefers the other, 0 if neither."""
    if choice == "same":
        return 0
    return 1 if (choice == "first") == arm_is_first else -1


def agreed(one: int, other: int) -> int:
    """The outcome of two readings in both orders: a tie when they differ."""
    return one if one == other else 0
