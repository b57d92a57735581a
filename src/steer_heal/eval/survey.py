"""The survey: how far plain steering moves the trait, and what it costs, for a few bands of blocks.

It replaces two numbers that differ between models, the band and the scale of a dose. Each band is steered at doses a
factor of two apart, until two of them lie around a given cost in coherence. Bands are compared at that cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from steer_heal.data import Trait
from steer_heal.eval.arms import Arm
from steer_heal.eval.instruments import contrast_scores, neutral_scores, whole_scores, yes_no_scores
from steer_heal.eval.opponents import Cost, dose_at_cost, share_lost
from steer_heal.eval.reading import Survey, SurveyedBand, SurveyedDose
from steer_heal.model.lm import LM
from steer_heal.steer.extract import Extraction
from steer_heal.steer.layers import LayerReport

BANDS = ((0.2, 0.5), (0.3, 0.7), (0.45, 0.55), (0.5, 0.8))  # shares of depth
# Shares of the residual stream's norm, which the vector times the dose is, added up over its blocks.
SMALLEST = 0.1  # where the search for a round's dose begins
FIRST = 0.8  # the first dose of a survey
READINGS = 6  # most doses read for a band
COST = 0.1  # bands are compared where a tenth of the answers, or of the perplexity, is lost
PROBES, QUESTIONS, TEXTS = 24, 12, 6  # contrast probes, yes/no questions, neutral texts


@dataclass(frozen=True)
class Coherence:
    """Answer mass and perplexity of neutral text, on QUESTIONS and TEXTS."""

    mass: float
    ppl: float

    def lost_from(self, before: Coherence) -> float:
        """The cost in coherence, see `opponents.coherence_cost`."""
        return share_lost(self.mass, before.mass, self.ppl, before.ppl)


def coherence(lm: LM, trait: Trait, arm: Arm) -> Coherence:
    """Read the coherence of an arm. `lm` is the model under the view that is steered."""
    _, mass = yes_no_scores(lm, arm, trait.questions[:QUESTIONS])
    nll = neutral_scores(lm, arm, TEXTS)
    with np.errstate(over="ignore"):  # infinite for a model that has collapsed
        return Coherence(float(mass.mean()), float(np.exp(nll.mean())))


def dose_of(share: float, layers: list[LayerReport]) -> float:
    """The dose at which the vector of these blocks is a share of the residual stream's norm."""
    return share / sum(report.relative_norm for report in layers)


def survey(
    lm: LM,
    trait: Trait,
    extraction: Extraction,
    bands: list[tuple[int, ...]],
    on_dose: Callable[[int], None] = lambda doses: None,
) -> Survey:
    """Steer the base on each band of blocks, at doses around the one that costs what bands are compared at.

    `lm` is the model under the base view; the extraction has a vector for the blocks of all bands.
    """
    base = coherence(lm, trait, Arm("base")), _trait(lm, trait, Arm("base"))
    return Survey(cost=COST, bands=[_band(lm, trait, base, part_of(extraction, band), on_dose) for band in bands])


def part_of(extraction: Extraction, blocks: tuple[int, ...]) -> Extraction:
    """The extraction on some of its blocks."""
    vector, report = extraction
    places = [vector.layers.index(block) for block in blocks]
    return Extraction(replace(vector, layers=blocks, direction=vector.direction[places]), [report[i] for i in places])


def _band(
    lm: LM, trait: Trait, base: tuple[Coherence, float], extraction: Extraction, on_dose: Callable[[int], None]
) -> SurveyedBand:
    found: list[SurveyedDose] = []
    dose, costly = dose_of(FIRST, extraction.report), set()
    while len(found) < READINGS and len(costly) < 2:  # until one dose costs more and one does not
        arm = Arm("plain", vector=extraction.vector, dose=dose)
        cost, moved = coherence(lm, trait, arm).lost_from(base[0]), _trait(lm, trait, arm) - base[1]
        found.append(SurveyedDose(dose=dose, cost=cost, trait=moved))
        on_dose(1)
        costly.add(cost > COST)
        dose *= 0.5 if cost > COST else 2.0
    found.sort(key=lambda one: one.dose)
    at = dose_at_cost([Cost(one.dose, one.cost) for one in found], COST)
    doses, moves = [0.0, *(one.dose for one in found)], [0.0, *(one.trait for one in found)]
    return SurveyedBand(
        blocks=list(extraction.vector.layers), doses=found, dose=at, trait=float(np.interp(at, doses, moves))
    )


def _trait(lm: LM, trait: Trait, arm: Arm) -> float:
    """The trait by its own instrument, on a few probes."""
    match trait.instrument:
        case "contrast":
            moved = contrast_scores(lm, arm, trait.contrast[:PROBES])
        case "whole":
            _, moved = whole_scores(lm, arm, trait.contrast[:PROBES])
        case "yes_no":
            moved, _ = yes_no_scores(lm, arm, trait.questions[:QUESTIONS])
    return trait.direction * float(moved.mean())
