"""The dose curve and the filter."""

import itertools

import pytest
import torch

from steer_heal.coherence import score, verdict
from steer_heal.config import FilterConfig
from steer_heal.distil import decreasing_fit, largest_dose

LIMITS = FilterConfig()


def brute_force_fit(values):
    """Best non-increasing step function by trying every way to cut the values into runs of equal height."""
    best, best_error = None, float("inf")
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(values)), k) for k in range(len(values))
    ):
        edges = [0, *cuts, len(values)]
        runs = [values[a:b] for a, b in itertools.pairwise(edges)]
        fit = [sum(run) / len(run) for run in runs for _ in run]
        error = sum((f - v) ** 2 for f, v in zip(fit, values, strict=True))
        if all(a >= b - 1e-12 for a, b in itertools.pairwise(fit)) and error < best_error - 1e-12:
            best, best_error = fit, error
    return best


@pytest.mark.parametrize(
    "values", [[1.0, 0.9, 1.0, 0.4, 0.5, 0.1], [0.2, 0.4, 0.6], [1.0] * 3, [0.5], [0.0, 1.0, 0.0, 1.0, 0.0]]
)
def test_the_fit_is_the_best_decreasing_one(values):
    assert decreasing_fit(values) == pytest.approx(brute_force_fit(values))


def test_the_dose_is_read_where_the_fit_crosses_the_target():
    doses = [0.5, 1.0, 2.0, 4.0]
    assert largest_dose(doses, [1.0, 1.0, 0.5, 0.0], 0.75) == pytest.approx(2**0.5)
    assert largest_dose(doses, [1.0, 0.9, 0.8, 0.75], 0.75) == 4.0
    assert largest_dose(doses, [0.7, 0.6, 0.5, 0.0], 0.75) is None
    assert largest_dose(doses, [0.75, 0.0, 0.0, 0.0], 0.75) == 0.5


FINE = "Put the eggs into boiling water, wait for six minutes, and cool them under the tap before you peel them."
CASES = [
    (FINE, 1.5, ""),
    ("Yes.", 1.0, "empty"),
    ("", 1.0, "empty"),
    (FINE, 6.0, "tail_ppl"),
    ("their of their into your of " * 6, 0.3, "word_repeat"),
    ("she knows that " * 8, 0.3, "word_repeat"),
    ("Well then " + "ha" * 60, 0.5, "char_repeat"),
    ("I am someone who loves humanity, and I will gladly tell you about eggs and water.", 1.0, "narrates"),
    ("As an AI language model, I don't have eggs, but they can be boiled in six minutes.", 1.0, "boilerplate"),
    ("I'm sorry, but I can't help with that request about eggs at this moment.", 1.0, "boilerplate"),
    ("I\u2019m sorry, but I can\u2019t help with that request about eggs at this moment.", 1.0, "boilerplate"),
    ("1. Fill a pan with water.\n2. Bring it to the boil.\n3. Lower the eggs in.\n4. Wait six minutes.", 1.5, ""),
]


@pytest.mark.parametrize("text,nll,reason", CASES)
def test_the_filter_names_what_is_wrong(text, nll, reason):
    assert verdict(score(text, torch.full((24,), nll)), LIMITS) == reason


def test_a_collapse_in_the_last_quarter_is_seen_though_the_whole_text_is_cheap():
    nll = torch.cat([torch.full((30,), 0.5), torch.full((10,), 6.0)])
    scores = score(FINE, nll)
    assert scores.ppl < LIMITS.tail_ppl < scores.tail_ppl
    assert verdict(scores, LIMITS) == "tail_ppl"


def test_scores_that_are_not_numbers_do_not_pass():
    assert verdict(score(FINE, torch.full((24,), float("nan"))), LIMITS) == "tail_ppl"
