"""Intervals over items and over seeds. Every difference is paired: two arms are compared on the same items only.

No torch, so that a report can be rebuilt on a machine without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

RESAMPLES = 10_000
SEED = 20260606  # the same resamples for every arm and every rebuild, so that intervals are reproducible
AT_ONCE = 2_000  # items whose resamples are kept for the next interval, see `_resamples`
PART = 100  # resamples of more items that are drawn together
SPLITS = 200  # random halvings of the probes

Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """A mean difference and its 95% interval."""

    mean: float
    ci: Interval


@dataclass(frozen=True)
class LogChange:
    """The change of the log of a mean, nats, and its 95% interval."""

    nats: float
    ci: Interval


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """95% percentile bootstrap interval of the mean over items."""
    return interval_of(lambda draw: np.asarray(values, dtype=np.float64)[draw].mean(1), len(values))


def interval_of(statistic: Callable[[np.ndarray], np.ndarray], items: int) -> Interval:
    """95% percentile bootstrap interval of any statistic: item numbers [resamples, items] to values [resamples]."""
    if items <= AT_ONCE:
        values = statistic(_resamples(items))
    else:
        values = np.concatenate([statistic(draw) for draw in _parts(items)])
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _parts(items: int) -> Iterator[np.ndarray]:
    """Resamples of many items, some at a time: all of a large benchmark would take a gigabyte."""
    random = np.random.default_rng(SEED)
    for _ in range(RESAMPLES // PART):
        yield random.integers(0, items, (PART, items))


@lru_cache(maxsize=4)  # 5 MB for 64 items; a table needs few sizes, each thousands of times
def _resamples(items: int) -> np.ndarray:
    """Item numbers [resamples, items], drawn with replacement."""
    draw = np.random.default_rng(SEED).integers(0, items, (RESAMPLES, items))
    draw.setflags(write=False)
    return draw


def across_seeds(values: np.ndarray) -> Change:
    """Mean and 95% interval of a difference over seeds [s] and items [n]: values [s, n], both drawn at random.

    Seeds and items are crossed: the items are the same for every seed. Seeds are few, and an interval that resamples
    three seeds covers the truth in 84% of cases. So the variance of the mean comes from the mean squares of a two-way
    layout, (MS_seeds + MS_items - MS_rest) / (s n), and the quantile is Student's at Satterthwaite's degrees of freedom
    (Biometrics Bulletin 2, 1946). With one seed, the interval is the bootstrap over items. With one item, it is
    Student's over seeds.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, items = values.shape
    mean = float(values.mean())
    if seeds == 1:
        return Change(mean, interval(values[0]))
    if items == 1:
        half = float(stdtrit(seeds - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(seeds)
        return Change(mean, (mean - half, mean + half))
    of_seeds, of_items = values.mean(1, keepdims=True) - mean, values.mean(0, keepdims=True) - mean
    degrees = np.array([seeds - 1, items - 1, (seeds - 1) * (items - 1)])
    squares = items * np.square(of_seeds).sum(), seeds * np.square(of_items).sum()
    parts = np.array([*squares, np.square(values - mean - of_seeds - of_items).sum()]) / degrees
    # The estimated variance between seeds may be negative; it then counts as zero.
    parts = parts * (1, 1, -1) if parts[0] > parts[2] else parts * (0, 1, 0)
    total = parts.sum()
    # When the subtracted part nearly cancels the others, the formula gives fewer degrees of freedom than any part has.
    freedom = max(degrees.min(), total**2 / (parts**2 / degrees).sum()) if total else 1.0
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(total / values.size)
    return Change(mean, (mean - half, mean + half))


def log_mean_over(arm: np.ndarray, base: np.ndarray) -> LogChange:
    """Change from base of the log of a mean probability over items, nats, with its 95% interval."""

    def change(draw: np.ndarray) -> np.ndarray:
        return np.log(arm[draw].mean(1)) - np.log(base[draw].mean(1))

    everything = np.arange(len(arm))[None]
    return LogChange(float(change(everything)[0]), interval_of(change, len(arm)))


def reliability(scores: np.ndarray) -> float:
    """Split-half reliability of an instrument over arms: scores [arms, items].

    The arms' means over a random half of the items are correlated with their means over the other half. The average
    correlation of many halvings is corrected to the full length by the Spearman-Brown formula.
    """
    items = scores.shape[1]
    draw = np.random.default_rng(SEED)
    found = []
    for _ in range(SPLITS):
        order = draw.permutation(items)
        halves = scores[:, order[: items // 2]].mean(1), scores[:, order[items // 2 :]].mean(1)
        found.append(correlation(*halves))
    half = max(0.0, float(np.mean(found)))  # a negative correlation counts as none
    return 2 * half / (1 + half)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN when `a` or `b` does not vary."""
    spread = np.std(a) * np.std(b)
    return float(np.mean((a - np.mean(a)) * (b - np.mean(b))) / spread) if spread > 0 else float("nan")


def relative(value: float, base: float) -> float:
    """value / base; NaN when the base's value is 0, which a random model's may be."""
    return value / base if base else float("nan")


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two means with its 95% interval, over seeds and items, [s, n] each; infinite where `below` may be zero.

    A mean "may be zero" when its 95% interval contains zero. The interval holds the ratios k for which
    `above - k * below` may be zero (Fieller, J. R. Stat. Soc. B 16, 1954). Where `below` may be zero and `above` may
    not, these ratios form two rays, one for each sign of `below`. The interval is then the ray that holds the mean.
    """
    if below.mean() < 0:
        above, below = -above, -below
    mean = float(above.mean() / below.mean())

    def end(side: int, far: float) -> float:
        def edge(k: float) -> float:
            return across_seeds(above - k * below).ci[side]

        still_zero = edge(far) <= 0 if side == 0 else edge(far) >= 0
        begin = mean - 1e-9 * (far - mean)  # at the mean itself an edge may be zero
        return math.copysign(math.inf, far) if still_zero else float(brentq(edge, begin, far, rtol=1e-4))

    reach = 100 * max(1.0, abs(mean))
    low, high = across_seeds(above).ci
    return mean, end(0, 0.0 if low > 0 else mean - reach), end(1, 0.0 if high < 0 else mean + reach)
