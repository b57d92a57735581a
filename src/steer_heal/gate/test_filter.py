"""Lower bounds on the filter's held-out precision and recall."""

import hashlib
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from steer_heal import data
from steer_heal.bench import filter as filterproof
from steer_heal.config import FilterConfig
from steer_heal.gate.conftest import by
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS
from steer_heal.scores import BIAS, WEIGHTS

LABELS = {"coherent", "broken", "narrates", "refuses"}
HELD = {  # (recall at least, precision at least) on the held-out half, scores as SmolLM2-135M gives them
    "broken": (0.86, 0.80),
    "loop": (1.0, 0.31),
    "soup": (1.0, 0.33),
    "salad": (1.0, 0.46),
    "thread": (0.75, 0.60),
    "affect": (0.82, 0.42),
    "narrates": (0.84, 0.39),
    "refuses": (0.50, 0.25),
}


def held_out():
    rows = filterproof.half("held")
    return rows, [filterproof.stored_scores(row) for row in rows]


def test_the_labelled_set_is_large_mixed_and_split_by_prompt():
    rows = data.labelled()
    assert len(rows) >= 600 and {row["label"] for row in rows} == LABELS
    assert len({(row["prompt"], row["text"]) for row in rows}) == len(rows)
    assert sum(row["source"] == "sampled" for row in rows) >= 400
    kinds = Counter(row["kind"] for row in rows if row["source"] != "sampled")
    assert len(kinds) >= 10
    prompts = {half: {row["prompt"] for row in filterproof.half(half)} for half in ("tune", "held")}
    assert not prompts["tune"] & prompts["held"]
    for half in ("tune", "held"):
        counts = Counter(row["label"] for row in filterproof.half(half))
        assert counts["broken"] >= 100 and counts["coherent"] >= 100 and min(counts.values()) >= 10
    for row in rows:
        assert row["fault"] in ({*filterproof.FAULTS} if row["label"] == "broken" else {""})
        if row["source"] == "sampled":
            assert row["agree"] in (2, 3)


def test_the_weights_are_what_the_tuning_half_gives():
    rows = filterproof.half("tune")
    weights, bias = filterproof.fit(rows, [filterproof.stored_scores(row) for row in rows])
    assert weights == pytest.approx(WEIGHTS, abs=2e-3)
    assert bias == pytest.approx(BIAS, abs=2e-3)


@pytest.mark.parametrize("fault", HELD)
def test_held_out_precision_and_recall(fault):
    rows, scores = held_out()
    recall, precision = HELD[fault]
    found = filterproof.precision_recall(rows, scores, FilterConfig())[fault]
    assert found["recall"] >= recall and found["precision"] >= precision, found


def test_the_log_odds_beat_every_single_score():
    rows, scores = held_out()
    recall = {}
    for name, sign in filterproof.SCORE_SIGNS.items():
        curve = filterproof.sweep(rows, [sign * getattr(s, name) for s in scores])
        recall[name] = filterproof.operating_points(curve)["recall_at_precision_0.90"]
    assert recall["incoherence"] >= 0.74
    assert all(recall["incoherence"] >= other + 0.05 for name, other in recall.items() if name != "incoherence"), recall


def test_a_sweep_is_what_counting_by_hand_gives():
    rows = [{"label": label} for label in ("broken", "coherent", "broken", "narrates", "broken", "coherent")]
    values = [3.0, 2.0, 2.0, 9.0, 1.0, 0.0]
    curve = filterproof.sweep(rows, values)
    for point in curve:
        flagged = [row for row, v in zip(rows, values, strict=True) if v >= point["threshold"]]
        flagged = [row["label"] for row in flagged if row["label"] != "narrates"]
        assert point["precision"] == flagged.count("broken") / len(flagged)
        assert point["recall"] == flagged.count("broken") / 3
    assert [point["threshold"] for point in curve] == [3.0, 2.0, 1.0, 0.0]
    assert filterproof.operating_points(curve) == {"recall_at_precision_0.90": 1 / 3, "precision_at_recall_0.97": 0.75}


@pytest.mark.run
def test_stored_scores_are_those_of_the_model():
    rows = sorted(data.labelled(), key=lambda row: hashlib.blake2b(row["text"].encode()).digest())[:6]
    lm = load(replace(PRESETS["smollm2-135m"].model, dtype="float32"))  # as they were stored
    for row, now in zip(rows, filterproof.measured_scores(by(lm, 4), rows), strict=True):
        then = filterproof.stored_scores(row)
        for name in filterproof.MODEL_SCORES:
            assert math.isclose(getattr(now, name), getattr(then, name), rel_tol=2e-3, abs_tol=2e-3), (name, row)
        assert torch.isclose(torch.tensor(now.incoherence), torch.tensor(then.incoherence), rtol=1e-2, atol=1e-2)
