"""The dose curve (what steering leaves of a student's soundness, dose by dose) and the choice of the dose.

Three things are read at each dose. Survival is the share of completions that pass the filter. Relevance is how much a
completion tells of its own prompt. Cost is the share of coherence that steering costs on given text: a filter that was
fitted on one model's answers may pass all that another one writes. Isotonic regression makes each monotone in the dose,
and the dose chosen is the largest at which all meet their targets. The targets are relative to the unsteered student:
the filter also drops some of its own text, which the vector does not cause. The other rule, iso-KL, finds the dose with
a given KL divergence instead.

The doses of a given range are tried in one mixed batch. With `dose.range` auto the dose doubles until a target is
missed, and doses between the last two follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import isotonic_regression

from steer_heal.config import JUDGES, DoseConfig, Exhausted
from steer_heal.distil.iso_kl import iso_kl
from steer_heal.distil.record import Completion, DoseCurve, DosePoint
from steer_heal.distil.sample import Progress, Teacher, sample
from steer_heal.model.lm import Row

MOST_DOSES = 10  # in a search
BETWEEN = 3  # doses tried between the last that meets the targets and the first that does not


def dose_curve(
    teacher: Teacher,
    prompts: list[str],
    config: DoseConfig,
    cost: Callable[[float], float],
    smallest: float | None = None,
    on_rows: Progress = lambda rows: None,
) -> DoseCurve:
    """Measure survival, relevance and cost at each dose, and choose the dose.

    A dose misses the target of relevance, which varies much between a few completions, only by more than a standard
    error; so does the smallest dose that of survival. If even the smallest dose misses a target, the dose is None, and
    `require_dose` tells the user.

    Args:
        cost: the share of coherence that steering at a dose costs. Not asked where the filter passes random text.
        smallest: for `dose.range` auto: the dose that is doubled until a target is missed.
    """
    trials = Trials(teacher, prompts[: config.prompts], config, cost, on_rows)
    if config.range == "auto":
        trials.double(smallest)
    else:
        lowest, highest = config.range
        ratio = (highest / lowest) ** (1 / max(1, config.steps - 1))
        trials.read([0.0, *(lowest * ratio**i for i in range(config.steps))])
    return trials.chosen() if config.kl_target == "none" else _with_kl(teacher, config, trials.chosen())


class Trials:
    """The doses tried so far, with the completions at each."""

    def __init__(
        self,
        teacher: Teacher,
        asked: list[str],
        config: DoseConfig,
        cost: Callable[[float], float],
        on_rows: Progress,
    ) -> None:
        self.teacher, self.asked, self.config, self.cost, self.on_rows = teacher, asked, config, cost, on_rows
        self.tried: dict[float, list[Completion]] = {}
        self.costs: dict[float, float] = {}
        self.sound = teacher.limits.incoherence < JUDGES["random"].incoherence
        """whether the text of the unsteered student is expected to make sense"""

    def read(self, doses: list[float]) -> None:
        """Sample a completion of every prompt at each dose, in one mixed batch."""
        plan = [(dose, prompt) for dose in doses for prompt in self.asked]
        written = sample(self.teacher, plan, (len(self.tried),) if self.tried else (), on_rows=self.on_rows)
        for i, dose in enumerate(doses):
            self.tried[dose] = written[i * len(self.asked) : (i + 1) * len(self.asked)]
            if self.sound and self.config.kl_target == "none":
                self.costs[dose] = self.cost(dose) if dose else 0.0

    def double(self, smallest: float) -> None:
        """Double the dose until a target is missed, then try doses between the last two."""
        self.read([0.0, smallest])
        while self.chosen().open_ended and len(self.tried) <= MOST_DOSES:
            self.read([2 * max(self.tried)])
        low, high = sorted(self.tried)[-2:]
        if low > 0 and not self.chosen().open_ended:
            self.read([low * (high / low) ** (i / (BETWEEN + 1)) for i in range(1, BETWEEN + 1)])

    def chosen(self) -> DoseCurve:
        """The curve so far, and the largest dose that meets all targets."""
        doses, rows = sorted(self.tried), len(self.asked)
        survival = [sum(not c.dropped for c in self.tried[dose]) / rows for dose in doses]
        fitted, kept = _monotone(survival), _monotone([self._relevance(dose).mean() for dose in doses])
        target = self.config.survival * fitted[0]
        limits = [largest_dose(doses[1:], fitted[1:], target, _sampling_error(survival, rows)) if target > 0 else None]
        least = self._least_relevance()
        if least is not None:
            errors = [self._relevance(dose).std() / math.sqrt(rows) for dose in doses[:2]]
            limits.append(largest_dose(doses[1:], kept[1:], least - math.hypot(*errors)))
        if self.costs:
            coherent = _monotone([max(0.0, 1 - self.costs[dose]) for dose in doses])
            limits.append(largest_dose(doses[1:], coherent[1:], self.config.survival))
        curve = [self._point(*at) for at in zip(doses, survival, fitted, strict=True)]
        completions = [c for dose in doses for c in self.tried[dose]]
        return DoseCurve(
            rule="survival",
            target=target,
            least_relevance=least,
            most_cost=1 - self.config.survival if self.costs else None,
            dose=None if None in limits else min(limits),
            curve=curve,
            completions=completions,
        )

    def _relevance(self, dose: float) -> np.ndarray:
        """How much each completion at a dose tells of its own prompt, nats per token."""
        return np.array([c.scores.information for c in self.tried[dose]])

    def _least_relevance(self) -> float | None:
        """The target of relevance, or None where the filter passes random text or unsteered completions have none."""
        if not self.sound:
            return None
        own = self._relevance(0.0)
        certain = own.mean() > 2 * own.std() / math.sqrt(len(own))
        return self.config.survival * float(own.mean()) if certain else None

    def _point(self, dose: float, survival: float, fitted: float) -> DosePoint:
        some = self.tried[dose]
        return DosePoint(
            dose=dose,
            survival=survival,
            fitted=fitted,
            relevance=float(self._relevance(dose).mean()),
            cost=self.costs.get(dose),
            tail_ppl=sorted(c.scores.tail_ppl for c in some)[len(some) // 2],
            example=some[0].text,
        )


def _monotone(values: list[float]) -> list[float]:
    return isotonic_regression(values, increasing=False).x.tolist()


def _sampling_error(survival: list[float], rows: int) -> float:
    """Standard error of the difference in survival between dose 0 and the smallest dose, each of `rows` completions."""
    shares = [(share * rows + 1) / (rows + 2) for share in survival[:2]]  # Laplace's rule: ten of ten is not certainty
    return math.sqrt(sum(share * (1 - share) for share in shares) / rows)


def largest_dose(doses: list[float], fitted: list[float], target: float, error: float = 0.0) -> float | None:
    """Largest dose whose fitted value reaches the target, interpolated in log dose.

    The smallest dose, if it misses the target by no more than `error`; None if it misses by more.
    """
    if fitted[0] < target:
        return doses[0] if fitted[0] >= target - error else None
    for (d0, s0), (d1, s1) in zip(
        zip(doses, fitted, strict=True), zip(doses[1:], fitted[1:], strict=True), strict=False
    ):
        if s1 < target:
            share = (s0 - target) / (s0 - s1)
            return math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return doses[-1]


def _with_kl(teacher: Teacher, config: DoseConfig, found: DoseCurve) -> DoseCurve:
    """The curve with the KL divergence at each point, and the dose at which it meets the target."""
    lm, given = teacher.student.lm, [c.dose for c in found.completions]
    rows = [Row(lm.prompt(c.prompt), c.ids) for c in found.completions]
    with teacher.student.view(now=0.0):
        met = iso_kl(lm, teacher.vector, rows, given, config.kl_target)
    points = [replace(point, kl_p95=kl) for point, kl in zip(found.curve, met.kl_p95, strict=True)]
    return DoseCurve(
        rule="iso_kl",
        target=config.kl_target,
        dose=met.dose,
        kl=met.kl,
        curve=points,
        completions=found.completions,
    )


def require_dose(found: DoseCurve) -> float:
    """Return the chosen dose. Raises Exhausted, with the curve in its message, when there is none."""
    if found.dose is not None:
        return found.dose
    if found.rule == "iso_kl":
        curve = ", ".join(f"{p.dose:.2f}: {p.kl_p95:.3g}" for p in found.curve)
        raise Exhausted(
            f"no dose between the smallest and the largest reaches a 95th percentile KL of {found.target:g} nats "
            f"(dose: nats {curve}): change --dose.kl-target or --dose.range"
        )
    if found.target == 0:
        raise Exhausted(
            f"the filter drops every completion even without steering (dose: survival {found.survivals}): "
            "loosen --filter.*"
        )
    smallest = found.curve[1]
    if found.most_cost is not None and smallest.cost > found.most_cost:
        raise Exhausted(
            f"even the smallest dose, {smallest.dose:.2f}, costs {smallest.cost:.0%} of the answer mass or of the "
            f"perplexity of unrelated text, where {found.most_cost:.0%} is allowed: lower --dose.range or "
            "--dose.survival, or narrow --steer.band"
        )
    if smallest.fitted >= found.target:
        relevances = ", ".join(f"{p.dose:.2f}: {p.relevance:.2f}" for p in found.curve)
        raise Exhausted(
            f"at every dose the completions lose their prompts (relevance below {found.least_relevance:.2f} nats per "
            f"token; dose: relevance {relevances}): lower --dose.range or narrow --steer.band"
        )
    raise Exhausted(
        f"no dose leaves {found.target:.0%} of the completions coherent (dose: survival {found.survivals}): "
        "lower --dose.range or --dose.survival, loosen --filter.*, or narrow --steer.band"
    )


def expected_survival(found: DoseCurve) -> float:
    """Return the expected survival at the chosen dose, interpolated between the curve's points."""
    points = [(p.dose, p.fitted) for p in found.curve]
    return float(np.interp(found.dose, *zip(*points, strict=True)))
