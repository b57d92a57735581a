"""The survey of plain steering, and the table of what a run measured for itself."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.eval import survey as module
from steer_heal.eval.arms import Arm
from steer_heal.eval.instruments import evaluate
from steer_heal.eval.reading import Survey, SurveyedBand, SurveyedDose, trait_over
from steer_heal.eval.survey import dose_of, part_of, survey
from steer_heal.gate.test_harness import changed_student
from steer_heal.model.steering import Vector
from steer_heal.presets import PRESETS
from steer_heal.stages.round import RoundStages
from steer_heal.steer.extract import Extraction
from steer_heal.steer.layers import LayerReport

CONFIG = PRESETS["tiny-random"].eval


def report(layer, norm):
    return LayerReport(layer=layer, depth=layer / 3, relative_norm=norm, split_half=0.9, auc=0.9)


def test_a_survey_equals_the_instruments_dose_by_dose(lm, vector, monkeypatch):
    """Each dose is read anew with `evaluate`, and the costs and traits are worked out from its readings."""
    trait = replace(data.load_trait("love"), direction=-1)
    few = CONFIG.counts
    sizes = {"PROBES": few.contrast, "QUESTIONS": few.yes_no, "TEXTS": few.neutral, "READINGS": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    extraction = Extraction(vector, [report(1, 0.5), report(2, 1.5)])
    found = survey(lm, trait, extraction, [(1, 2), (2,)])
    assert [band.blocks for band in found.bands] == [[1, 2], [2]]
    base = evaluate(Student(lm), Arm("base"), trait, CONFIG)
    for band, start in zip(found.bands, (0.8 / 2.0, 0.8 / 1.5), strict=True):
        own = part_of(extraction, tuple(band.blocks)).vector
        assert own.direction.tolist() == vector.direction[-len(band.blocks) :].tolist()
        steps = [round(np.log2(one.dose / start)) for one in band.doses]
        assert 0 in steps and steps == list(range(steps[0], steps[-1] + 1))
        assert [one.dose for one in band.doses] == pytest.approx([start * 2.0**i for i in steps])
        for one in band.doses:
            arm = evaluate(Student(lm), Arm("x", vector=own, dose=one.dose), trait, CONFIG)
            lost = 1 - arm.answer_mass / base.answer_mass, arm.neutral_ppl / base.neutral_ppl - 1
            assert one.cost == pytest.approx(max(lost), abs=1e-3)
            assert one.trait == pytest.approx(trait_over(arm, base).mean, abs=1e-4)
        dear = [one.cost > 0.1 for one in band.doses]
        assert len({*dear}) == 2 or len(dear) == 3
        doses, moves = [0.0, *(one.dose for one in band.doses)], [0.0, *(one.trait for one in band.doses)]
        assert band.trait == pytest.approx(np.interp(band.dose, doses, moves))


def test_the_best_band_is_the_one_with_the_most_trait_where_all_cost_the_same():
    def band(block, costs, traits, dose, trait):
        doses = [SurveyedDose(dose=2.0**i, cost=c, trait=t) for i, (c, t) in enumerate(zip(costs, traits, strict=True))]
        return SurveyedBand(blocks=[block], doses=doses, dose=dose, trait=trait)

    gentle, costly = band(1, (0.0, 0.1), (0.2, 0.3), 2.0, 0.3), band(2, (0.2, 0.4), (0.5, 0.9), 0.5, 0.25)
    found = Survey(cost=0.1, bands=[costly, gentle])
    assert found.best is gentle and "blocks 1 to 1 +0.300 at dose 2.00" in found.described


def test_a_dose_is_a_share_of_the_residual_stream_over_all_blocks():
    assert dose_of(0.1, [report(1, 0.25), report(2, 0.25)]) == pytest.approx(0.2)
    vector = Vector((1,), torch.ones(1, 4))
    with pytest.raises(ValueError, match="not in"):
        part_of(Extraction(vector, [report(1, 0.1)]), (2,))


def test_the_cost_of_a_dose_is_that_of_steering_the_student_so_far(vector, monkeypatch):
    monkeypatch.setattr(module, "QUESTIONS", CONFIG.counts.yes_no)
    monkeypatch.setattr(module, "TEXTS", CONFIG.counts.neutral)
    student, trait = changed_student(), data.load_trait("love")
    cost = RoundStages.cost_of(SimpleNamespace(work=SimpleNamespace(student=student, trait=trait)), vector)
    before, after = (evaluate(student, Arm("x", vector=vector, dose=dose), trait, CONFIG) for dose in (0.0, 0.7))
    lost = 1 - after.answer_mass / before.answer_mass, after.neutral_ppl / before.neutral_ppl - 1
    assert cost(0.7) == pytest.approx(max(lost), abs=1e-3)
