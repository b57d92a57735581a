"""Coherence in the frames that neither training nor its anchor has, see `data.frames`. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steer_heal.eval.catalogue import FRAME, FRAMED, Instrument
from steer_heal.eval.intervals import relative
from steer_heal.eval.reading import ArmReading, require_same


@dataclass(frozen=True)
class InFrame:
    """One measure of an arm in one held-out frame."""

    frame: str
    measure: str
    """name of the instrument, see `catalogue.FRAMED`"""
    value: float
    base: float
    """base's value in the same frame"""

    @property
    def over_base(self) -> float:
        return relative(self.value, self.base)


def in_frames(arm: ArmReading, base: ArmReading) -> list[InFrame]:
    """The measures of an arm in the held-out frames that it and base were read in."""
    found = []
    for key in (key for key in arm.items if key.startswith(FRAME) and key in base.items):
        require_same(arm, base, key)
        frame, name = key.removeprefix(FRAME).rsplit(":", 1)
        one = next(one for one in FRAMED if one.name == name)
        value, before = (one.mean(reading.items[key]) for reading in (arm, base))
        found.append(InFrame(frame, name, value, before))
    return found


def worst(framed: list[InFrame], one: Instrument) -> InFrame | None:
    """The frame in which an arm stands worst relative to base, or None.

    A score that is not a number is worst. A frame in which the base's measure is beyond the absolute limit does not
    count: there was nothing to lose.
    """
    own = [found for found in framed if found.measure == one.name and found.base and not _beyond(found.base, one)]
    return max(own, key=lambda found: (math.isnan(found.value), one.damage * found.over_base), default=None)


def _beyond(value: float, one: Instrument) -> bool:
    return one.limit is not None and one.worse(value, one.limit)
