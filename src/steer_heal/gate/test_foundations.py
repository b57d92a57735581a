"""tiny-mfv's profile through its own `evaluate`: a stand-in with known answers, and the package if installed."""

import importlib.machinery
import importlib.util
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from steer_heal.bake.student import Student
from steer_heal.config import UserError
from steer_heal.data import load_trait
from steer_heal.eval.arms import Arm
from steer_heal.eval.foundations import PACKAGES, described, read_profile
from steer_heal.eval.instruments import evaluate
from steer_heal.presets import PRESETS

CONFIG = replace(PRESETS["tiny-random"].eval, profile="tiny-mfv")
ORDER = ["Authority", "Care", "SocialNorms", "Fairness", "Loyalty", "Sanctity", "Liberty"]


def test_without_the_package_the_error_says_how_to_get_it(lm, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="just vendor"):
        read_profile(lm, Arm("x"), CONFIG)


@pytest.mark.parametrize("name", PACKAGES)
def test_its_outputs_get_our_names(lm, monkeypatch, name):
    asked = {}

    def stand_in(model, tokenizer, *, vignettes, conditions, **more):
        asked.update(texts=[row[conditions[0]] for row in vignettes], model=model, **more)
        p = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
        rows = [{"id": i, "foundation_coarse": "Authority", "p": p, "pmass_allowed": 0.8} for i in range(3)]
        rows[2] = rows[2] | {"p": p * math.nan, "pmass_allowed": math.nan, "foundation_coarse": "Care"}
        return {"per_row": rows, "table": {"foundation": ORDER}, "mean_nll_prefill": 1.5}

    package = types.ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    package.load_vignettes = lambda which: [{"other_violate": "You see a man.", "self_violate": "You."}] * 132
    package.evaluate = stand_in
    found_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, name, package)
    other = ({*PACKAGES} - {name}).pop()
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == other else found_spec(n))
    reading = read_profile(lm, Arm("x", system="Be kind."), CONFIG)
    assert asked["texts"] == ["Be kind.\n\nYou see a man."] * 7 and asked["model"] is lm.model
    assert reading.p[0].tolist() == pytest.approx([0.2, 0.1, 0.1, 0.4, 0.05, 0.05, 0.1])  # care, fairness, ..., norms
    found = described(reading, "tiny-mfv")
    assert found.auth_nats == pytest.approx(math.log(0.4)) and found.care_nats == pytest.approx(math.log(0.2))
    assert found.p_ans_any == pytest.approx(0.8) and found.ppx_json == pytest.approx(math.exp(1.5))
    assert found.top1 == pytest.approx(2 / 3) and found.unreadable_share == pytest.approx(1 / 3)


@pytest.mark.skipif(not any(map(importlib.util.find_spec, PACKAGES)), reason="tiny-mfv is not here: `just vendor`")
def test_the_package_itself_reads_the_view_it_is_given(lm, vector):
    student, trait = Student(lm), load_trait("love")
    side = lm.tokenizer.padding_side
    base, again, steered = (
        evaluate(student, arm, trait, CONFIG, ["profile"]).scenes
        for arm in (Arm("base"), Arm("base"), Arm("steered", vector=vector, dose=1.0))
    )
    assert np.array(base).shape == (7, 7) and np.allclose(np.sum(base, axis=1), 1)
    assert base == again and not np.allclose(base, steered, atol=1e-3)
    assert lm.tokenizer.padding_side == side
