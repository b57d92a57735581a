"""The instruments: the measure of each, how it is printed, and which direction of change is damage. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_heal.eval.intervals import relative
from steer_heal.eval.reading import Measures

FRAME = "frame:"  # prefix of the item names of what is read in a held-out frame
OFF_TARGET = "off:"  # prefix of the item names of the traits that should not move


@dataclass(frozen=True)
class Instrument:
    """A score for each item, and the arm's measure, which is the mean of the scores."""

    name: str
    """name of its items in a reading"""
    measure: str
    """the field of `Measures` that holds the mean"""
    read_with: str
    """the pass over the model that measures it, see `eval.instruments`"""
    unit: str
    label: str
    short: str
    """short form of the label"""
    form: str
    """format of a value of the measure"""
    damage: int = 0
    """the direction of change that is damage: -1 a fall, +1 a rise, 0 neither"""
    log: bool = False
    """the items are logarithms, and the measure is exp of their mean"""
    limit: float | None = None
    """absolute limit: a model beyond it is broken, whatever its base's measure"""
    bound: float | None = None
    """relative limit: a student is damaged when its measure divided by its base's is beyond it"""

    @property
    def item_label(self) -> str:
        """The label of a difference of items."""
        return f"log {self.label}" if self.log else self.label

    @property
    def interval(self) -> str:
        """The field of `Measures` that holds the interval of the mean."""
        return f"{self.measure.removesuffix('_nats').removesuffix('_share')}_ci"

    def mean(self, items: Sequence[float]) -> float:
        """Return the measure of some items."""
        with np.errstate(over="ignore"):  # infinite for a model that has collapsed
            return float(np.exp(np.mean(items)) if self.log else np.mean(items))

    def shown(self, arm: Measures) -> str:
        """The arm's measure as printed; "" where it was not read."""
        value = getattr(arm, self.measure)
        return "" if value is None else self.form.format(value)

    def over(self, arm: Measures, base: Measures) -> float:
        """Return the arm's measure divided by the base's; NaN when the base's is 0."""
        return relative(getattr(arm, self.measure), getattr(base, self.measure))

    def worse(self, value: float, other: float) -> bool:
        return self.damage * value > self.damage * other


CONTRAST = Instrument("contrast", "contrast_nats", "contrast", "nats/token", "contrast", "contrast", "{:+.3f}")
YES_NO = Instrument("yes_no", "yes_no_nats", "yes_no", "nats", "yes/no", "yes/no", "{:+.3f}")
WHOLE = Instrument("whole", "whole_nats", "contrast", "nats/answer", "whole answers", "whole answers", "{:+.3f}")
COHERENT = Instrument(
    *("demo_coherent", "coherent_share", "demos", "share", "coherent share", "coherent", "{:.0%}"),
    damage=-1,
    limit=0.5,
    bound=0.95,
)
MASS = Instrument(
    *("mass", "answer_mass", "yes_no", "probability", "answer mass", "mass", "{:.3f}"),
    damage=-1,
    limit=0.05,
    bound=0.85,
)
NEUTRAL = Instrument(
    *("neutral_nll", "neutral_ppl", "neutral", "perplexity", "neutral perplexity", "ppl", "{:.2f}"),
    damage=1,
    log=True,
    limit=200.0,
    bound=1.05,
)
RIGHT = Instrument(
    *("canary", "canary_share", "canary", "share", "questions right", "questions right", "{:.0%}"), damage=-1
)
RIGHT_LOG_ODDS = Instrument(
    *("canary_log_odds", "canary_log_odds_nats", "canary", "nats", "right, log-odds", "right, log-odds", "{:+.3f}"),
    damage=-1,
)
LOOPED = Instrument("demo_looped", "looped_share", "demos", "share", "looped share", "looped", "{:.0%}", damage=1)
STYLED = Instrument("demo_styled", "styled_share", "demos", "share", "about itself", "about itself", "{:.0%}")
ENDED = Instrument("demo_ended", "ended_share", "demos", "share", "answers that end", "ended", "{:.0%}")
WORDS = Instrument("demo_words", "demo_words", "demos", "words", "words per answer", "words", "{:.1f}")
DEMO_PPL = Instrument(
    *("demo_log_ppl", "demo_ppl", "demos", "perplexity", "demo perplexity", "demo ppl", "{:.2f}"), log=True
)
RELEVANT = Instrument(
    *("relevant", "relevant_share", "relevance", "share", "answers to their prompt", "to the prompt", "{:.0%}"),
    damage=-1,
    bound=0.9,
)
INFORMATION = Instrument(
    *("relevance", "relevance_nats", "relevance", "nats/token", "relevance", "relevance", "{:+.2f}"),
    damage=-1,
    bound=0.8,
)

REFUSAL = Instrument(
    *("refusal", "refusal_nats", "refusals", "nats/token", "refusals of harmful requests", "refusals", "{:+.3f}"),
    damage=-1,
)
OVER_REFUSAL = Instrument(
    *("over_refusal", "over_refusal_nats", "refusals", "nats/token"),
    *("refusals of harmless requests", "over-refusals", "{:+.3f}"),
    damage=1,
)
PRESSED = Instrument(
    *("pressed", "pressed_nats", "refusals", "nats/token", "refusals under pressure", "under pressure", "{:+.3f}"),
    damage=-1,
)

REFUSALS = {"harmful": REFUSAL, "harmless": OVER_REFUSAL, "pressed": PRESSED}  # by kind of request
FRAMED = (MASS, RIGHT, NEUTRAL)  # read in every held-out frame


def in_frame(frame: str, one: Instrument) -> str:
    """The name of an instrument's items in a held-out frame."""
    return f"{FRAME}{frame}:{one.name}"


CATALOGUE = (
    *(CONTRAST, YES_NO, WHOLE, COHERENT, MASS, NEUTRAL, RIGHT, RIGHT_LOG_ODDS, LOOPED, STYLED, ENDED, WORDS, DEMO_PPL),
    *(RELEVANT, INFORMATION, *REFUSALS.values()),
)
COHERENCE = (COHERENT, MASS, NEUTRAL)  # read in every round
BOUNDED = tuple(one for one in CATALOGUE if one.bound is not None)  # a verdict finds damage by those that were read
COSTS = tuple(one for one in CATALOGUE if one.damage and one not in REFUSALS.values())  # of coherence
OF_TRAIT = {one.name: one for one in (CONTRAST, YES_NO, WHOLE)}  # what a trait may be measured on
UNITS = {name: one.unit for name, one in OF_TRAIT.items()}  # unit of a trait score, by the trait's instrument
