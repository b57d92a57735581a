"""The results of benchmarks: scores of every arm, and their paired differences from base. No torch, no harness."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from steer_heal.eval.intervals import Change, Interval, interval_of


@dataclass(frozen=True, kw_only=True)
class BenchmarkTask:
    """A task of the harness, and a fingerprint of the items that were read."""

    name: str
    version: str
    shots: int
    """examples in every prompt"""
    items: int
    fingerprint: str
    """of all items and their right answers, in order"""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one arm on the items of a task, by one metric."""

    task: str
    """or a group of tasks"""
    metric: str
    filter: str
    """how the harness reads a free answer"""
    value: float
    """as the harness computes it"""
    form: str | None
    """how `value` follows from the items, see FORMS; None for a metric of the whole set"""
    higher_is_better: bool | None
    items: list[float] | None
    """None for a group, and for a metric of the whole set"""
    weights: list[float] | None = None
    """words or bytes of each item, for a perplexity"""
    ci: Interval | None = None
    over_base: Change | None = None
    """paired, item by item"""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.metric, self.filter

    @property
    def name(self) -> str:
        """The metric as printed."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass(frozen=True, kw_only=True)
class BenchmarkArm:
    """The scores of one arm."""

    arm: str
    scores: list[Scores]
    dose: float | None = None
    """plain steering: its dose"""


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Benchmarks read on the arms of one model."""

    harness: str
    """version of lm-evaluation-harness"""
    model: str
    trait: str
    tasks: list[BenchmarkTask]
    groups: dict[str, list[str]]
    """the tasks of each group"""
    arms: list[BenchmarkArm]
    """base first"""
    first_items: int | None = None
    """where only the first items of each task were read: how many"""
    round: int | None = None
    """a run: the student is that after this round"""
    gate: float | None = None

    @property
    def shown(self) -> list[Scores]:
        """The base's scores on tasks and groups. A group that has a score stands for all that is in it."""
        base = self.arms[0].scores
        scored = {one.task for one in base} & self.groups.keys()
        inside = {name for group in scored for name in self.groups[group]}
        return [one for one in base if one.task not in inside]

    def holds(self, names: tuple[str, ...]) -> bool:
        """Whether tasks or groups of these names were read, with all of their items."""
        return self.first_items is None and {*names} <= {one.name for one in self.tasks} | self.groups.keys()

    def of(self, arm: BenchmarkArm, shown: Scores) -> Scores:
        """The arm's scores on the same task, by the same metric."""
        return next(one for one in arm.scores if one.key == shown.key)


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of the items' sum over the sum of their weights
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}


def statistic(scores: Scores) -> Callable[[np.ndarray], np.ndarray]:
    """The metric as a function of item numbers: [resamples, items] to values [resamples]."""
    items = np.array(scores.items, dtype=np.float64)
    weights = np.ones_like(items) if scores.weights is None else np.array(scores.weights, dtype=np.float64)
    form = FORMS[scores.form]
    return lambda draw: form(items[draw].sum(1) / weights[draw].sum(1))


def with_interval(scores: Scores) -> Scores:
    """The scores with their 95% interval. Where the metric does not follow from the items, they get none."""
    if scores.form is None or scores.items is None:
        return scores
    of_items = statistic(scores)
    everything = np.arange(len(scores.items))[None]
    if not math.isclose(float(of_items(everything)[0]), scores.value, rel_tol=1e-6, abs_tol=1e-9):
        return replace(scores, form=None)
    return replace(scores, ci=interval_of(of_items, len(scores.items)))


def over_base(scores: Scores, base: Scores) -> Scores:
    """The scores with their difference from base's, paired item by item."""
    if scores.form is None or scores.form != base.form:
        return scores
    own, other = statistic(scores), statistic(base)

    def change(draw: np.ndarray) -> np.ndarray:
        return own(draw) - other(draw)

    everything = np.arange(len(scores.items))[None]
    return replace(scores, over_base=Change(float(change(everything)[0]), interval_of(change, len(scores.items))))
