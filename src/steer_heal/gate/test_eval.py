"""Instruments against a slow reading of their definitions."""

import math

import numpy as np
import pytest
import torch

from steer_heal.bake import Student
from steer_heal.bootstrap import interval, trait_over
from steer_heal.config import PRESETS
from steer_heal.data import load_trait, neutral
from steer_heal.eval import NO, YES, YES_NO_FORM, Arm, contrast_scores, evaluate, first_tokens

CONFIG = PRESETS["tiny-random"].eval
LIMITS = PRESETS["tiny-random"].filter


def log_prob(lm, prompt, answer):
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logp = lm.model(ids).logits[0].log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.fixture
def trait():
    return load_trait("love")


@pytest.mark.parametrize("system", [None, "You love people."])
def test_all_instruments_equal_one_item_at_a_time(lm, trait, system):
    got = evaluate(Student(lm), Arm("x", system=system), trait, CONFIG, LIMITS)
    contrast, log_odds, mass = [], [], []
    for probe in trait.contrast[: CONFIG.contrast]:
        prompt = lm.prompt(probe.question, system)
        a, b = lm.answer(probe.trait), lm.answer(probe.opposite)
        contrast.append(log_prob(lm, prompt, a) / len(a) - log_prob(lm, prompt, b) / len(b))
    for probe in trait.yes_no[: CONFIG.yes_no]:
        prompt = lm.prompt(YES_NO_FORM.format(question=probe.question), system)
        yes = sum(math.exp(log_prob(lm, prompt, [t])) for t in first_tokens(lm, YES))
        no = sum(math.exp(log_prob(lm, prompt, [t])) for t in first_tokens(lm, NO))
        log_odds.append((1 if probe.trait_answer == "yes" else -1) * math.log(yes / no))
        mass.append(yes + no)
    neutral_nll = []
    for text in neutral()[: CONFIG.neutral]:
        ids = lm.answer(text)
        neutral_nll.append(-log_prob(lm, ids[:1], ids[1:]) / (len(ids) - 1))
    assert got["items"]["contrast"] == pytest.approx(contrast, abs=1e-4)
    assert got["items"]["yes_no"] == pytest.approx(log_odds, abs=1e-4)
    assert got["answer_mass"] == pytest.approx(np.mean(mass), abs=1e-6)
    assert got["neutral_ppl"] == pytest.approx(math.exp(np.mean(neutral_nll)), rel=1e-4)
    assert got["trait_nats"] == pytest.approx(np.mean(contrast), abs=1e-4)


def test_results_do_not_depend_on_the_batch_size(lm, trait, vector):
    from dataclasses import replace

    arm = Arm("steered", vector=vector, dose=0.3)
    scores = [contrast_scores(lm, arm, trait, replace(CONFIG, batch_size=size)) for size in (1, 5, 64)]
    assert np.allclose(scores[0], scores[1], atol=1e-4) and np.allclose(scores[0], scores[2], atol=1e-4)
    assert not np.allclose(scores[0], contrast_scores(lm, Arm("base"), trait, CONFIG), atol=1e-2)


def test_swapped_answers_and_a_negative_direction_flip_the_sign(lm, trait):
    from dataclasses import replace

    from steer_heal.data import Contrast

    swapped = replace(trait, contrast=tuple(Contrast(c.question, c.opposite, c.trait) for c in trait.contrast))
    plain = contrast_scores(lm, Arm("x"), trait, CONFIG)
    assert np.allclose(contrast_scores(lm, Arm("x"), swapped, CONFIG), -plain, atol=1e-5)
    assert np.allclose(contrast_scores(lm, Arm("x"), replace(trait, direction=-1), CONFIG), -plain, atol=1e-5)


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    draw = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for low, high in (interval(draw.normal(1.0, 2.0, 60)) for _ in range(200)))
    assert 0.88 <= hits / 200 <= 0.99


def test_a_paired_difference_is_sharper_than_its_two_arms():
    draw = np.random.default_rng(1)
    items = draw.normal(0, 3, 64)
    base, moved = (
        {"instrument": "yes_no", "items": {"yes_no": scores, "contrast": 0 * items}}
        for scores in (items, items + 0.2 + draw.normal(0, 0.05, 64))
    )
    change = trait_over(moved, base)
    assert change["trait_over_base"] == pytest.approx(0.2, abs=0.03)
    assert np.diff(change["trait_over_base_ci"]) < 0.05 < np.diff(interval(items))
