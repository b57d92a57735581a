"""What a run measured for itself: what each setting that is `auto` was chosen to be, and why. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from steer_heal.config import RunConfig
from steer_heal.distil.record import DoseCurve
from steer_heal.eval.reading import Survey
from steer_heal.heal.steps import ANCHOR_TAU_SHARE, HealStep, fired_shares
from steer_heal.runs.rounds import Round


@dataclass(frozen=True)
class Choice:
    """A setting, and how it was found."""

    setting: str
    measured: str
    chosen: str
    why: str


def choices(config: RunConfig, survey: Survey | None, first: Round) -> list[Choice]:
    """The settings that are `auto`, after round 0, which is `first`."""
    heal, found = config.heal, []
    if survey:
        found += _surveyed(config, survey)
    if config.dose.range == "auto":
        found.append(_dose(first.dose))
    if heal.barrier.tau == "auto" and heal.barrier.reg != "nll":
        share, tau = heal.barrier.tau_share, first.steps[0].tau
        measured = f"on its own completions the teacher diverges by {tau / share:.2f} nats from base"
        found.append(Choice("heal.barrier.tau", measured, f"{tau:.3g} nats", f"{share:g} of that"))
    if heal.anchor.tau == "auto" and (tau := first.steps[0].anchor_tau) is not None:
        measured = f"on the anchor's texts the teacher diverges by {tau / ANCHOR_TAU_SHARE:.2f} nats from base"
        found.append(Choice("heal.anchor.tau", measured, f"{tau:.3g} nats", f"{ANCHOR_TAU_SHARE:g} of that"))
    if heal.training.lr == "auto":
        found.append(_rate(first.steps))
    if heal.training.epochs == "auto":
        found.append(_epochs(first.steps))
    return found


def _surveyed(config: RunConfig, survey: Survey) -> list[Choice]:
    best, found = survey.best, []
    if config.steer.band == "auto":
        seen = ", ".join(f"{band.name} {band.trait:+.2f}" for band in survey.bands)
        measured = f"trait where plain steering costs {survey.cost:.0%} of coherence: {seen}"
        found.append(Choice("steer.band", measured, best.name, "the most trait for the same cost"))
    if config.eval.plain_range == "auto" and "plain" not in config.eval.leave_out:
        measured = f"plain steering costs {survey.cost:.0%} of coherence at dose {best.dose:.2f}"
        found.append(
            Choice("eval.plain_range", measured, f"around dose {best.dose:.2f}", "to see it cost less and more")
        )
    return found


def _dose(curve: DoseCurve) -> Choice:
    own, most = curve.curve[0], curve.curve[-1]
    seen = [f"{point.survival:.0%} pass the filter" for point in (own, most)]
    if curve.least_relevance is not None:
        seen = [f"{text}, relevance {point.relevance:.2f}" for text, point in zip(seen, (own, most), strict=True)]
    if most.cost is not None:
        seen[1] += f", {most.cost:.0%} of coherence lost"
    why = "the largest tried: the text held at every dose" if curve.open_ended else curve.reason
    return Choice(
        "dose.range", f"unsteered: {seen[0]}; at dose {most.dose:.2f}: {seen[1]}", f"dose {curve.dose:.2f}", why
    )


def _rate(steps: list[HealStep]) -> Choice:
    most = max(step.excess for step in steps if step.epoch == 0)
    measured = f"in the first epoch D rose to {most:.1f} times tau at most"
    rate = max(step.lr for step in steps)
    return Choice("heal.training.lr", measured, f"{rate:.2g}", "halved until tau is not far exceeded")


def _epochs(steps: list[HealStep]) -> Choice:
    epochs = steps[-1].epoch + 1
    ends = [[step for step in steps if step.epoch == epoch] for epoch in (0, epochs - 1)]
    last = fired_shares(ends[-1])
    ends = (sum(step.objective for step in part) / len(part) for part in ends)
    measured = "objective {:.3f} nats in the first epoch, {:.3f} in the last".format(*ends)
    measured += f", where the barrier fired on {last.barrier:.0%} and the anchor on {last.anchor:.0%} of the steps"
    chosen = f"{epochs} epochs, {len(steps)} steps"
    return Choice(
        "heal.training.epochs",
        measured,
        chosen,
        "until three quarters are gone or it falls no further, and no barrier binds",
    )
