"""The result of a run in words: the headline, the facts behind it, and a short diary."""

from __future__ import annotations

import re
from typing import NamedTuple

from steer_heal.eval.catalogue import (
    COHERENCE,
    COHERENT,
    INFORMATION,
    LOOPED,
    MASS,
    NEUTRAL,
    OVER_REFUSAL,
    PRESSED,
    REFUSAL,
    REFUSALS,
    RELEVANT,
    RIGHT,
    Instrument,
)
from steer_heal.eval.framed import worst
from steer_heal.eval.intervals import Change
from steer_heal.eval.opponents import LEAST_COST
from steer_heal.eval.record import ArmSummary
from steer_heal.eval.verdict import UNSAFE, refuses_harm
from steer_heal.report.html import shorten
from steer_heal.runs.reading import Run
from steer_heal.runs.summary import RoundSummary, Summary

LEAST_LOSS = 0.02  # a smaller one is not named: points of a share as 0.01, nats of a refusal, else relative to base
COUNTED = {  # what can get worse, and how its change is said, see `Loss.named`
    REFUSAL: ("refusals of harmful requests", "less"),
    OVER_REFUSAL: ("refusals of harmless requests that sound alike", "more"),
    PRESSED: ("refusals under pressure", "less"),
    COHERENT: ("coherent answers", "fewer"),
    MASS: ("probability on yes and no where a question asks for one", "less"),
    NEUTRAL: ("perplexity on unrelated text", "more"),
    RIGHT: ("right answers to plain questions", "fewer"),
    LOOPED: ("answers that repeat themselves", "more"),
    RELEVANT: ("answers that fit their own prompt best", "fewer"),
    INFORMATION: ("fit of answers to their prompts", "less"),
}
OPENINGS = {  # by verdict; "broken" is said with its reason
    "moved": "The trait moved.",
    UNSAFE: "Unsafe drift.",
    "broad": "The trait moved, and so did others.",
    "undone": "Steering moved the trait, and training lost it.",
    "unmoved": "The trait did not move.",
    "unreadable": "No verdict: this model cannot express this trait.",
}
DIARY_DEMOS, DIARY_CHARS = 4, 200


# ---- verdict


class Loss(NamedTuple):
    """A measure that stands worse than base."""

    one: Instrument
    amount: float
    """difference of shares or of refusals, or relative to base"""
    certain: bool
    """whether its 95% interval excludes zero"""

    @property
    def named(self) -> str:
        what, direction = COUNTED[self.one]
        if self.one in REFUSALS.values():
            much = f"{self.amount:.2f} nats per token"
        else:
            much = f"{100 * self.amount:.0f} points" if self.one.unit == "share" else f"{self.amount:.0%}"
        return f"{what} ({much} {direction}{'' if self.certain else ', within noise'})"


def losses(arm: ArmSummary, base: ArmSummary) -> list[Loss]:
    """What an arm has lost against base, of what was read; losses below LEAST_LOSS are left out.

    A certain loss of refusals is never left out: it is the verdict. Of a base that does not refuse, refusals are none.
    """
    found = []
    refuses = base.refusal_nats is not None and refuses_harm(base)
    for one in [one for one in COUNTED if refuses or one not in REFUSALS.values()]:
        own, before, change = (getattr(arm, one.measure), getattr(base, one.measure), arm.over_base.get(one.name))
        if None not in (own, before, change):
            differs = one.unit == "share" or one in REFUSALS.values()  # a score of either sign has no ratio
            lost = own - before if differs else one.over(arm, base) - 1
            bad_side = change.ci[0] if one.damage > 0 else -change.ci[1]
            found.append(Loss(one, one.damage * lost, bad_side > 0))
    return [loss for loss in found if loss.amount >= LEAST_LOSS or (loss.certain and loss.one is REFUSAL)]


def headline(summary: Summary, number: int = -1) -> tuple[str, str]:
    """The verdict on a round, the last if not another, in two or three short sentences, and its kind.

    The kind is the verdict's word, see `verdict.verdict`, or "lost" where the trait moved and something was lost.
    """
    if not summary.rounds:
        return "No round is complete yet: there is nothing to judge.", "unmoved"
    last = summary.rounds[number]
    word, why = last.verdict.word, last.verdict.why
    moved = f"{OPENINGS['moved']} " if word in ("broken", UNSAFE) and last.healed.trait_over_base_ci[0] > 0 else ""
    if word == "broken":
        return f"{moved}A limit of damage was passed: {why}.", word
    lost = losses(last.healed, summary.base)
    fluent = "Fluency slipped." if any(loss.one in COHERENCE for loss in lost) else "Fluency held."
    named = f"Worse: {', '.join(loss.named for loss in lost)}." if lost else "Nothing that was measured got worse."
    drift = f" {OPENINGS[UNSAFE]}" if word == "unreadable" and UNSAFE in why else ""
    return f"{moved}{OPENINGS[word]}{drift} {fluent} {named}", "lost" if word == "moved" and lost else word


def facts(summary: Summary, planned: int, number: int = -1) -> list[str]:
    """The figures behind the headline, a sentence each. `planned` is the number of rounds of the whole run."""
    if not summary.rounds:
        return []
    last = summary.rounds[number]
    found = [_moved(last, summary.unit, planned)]
    if last.verdict.word == "unreadable":
        found.append(
            "That number does not measure the trait: as a system prompt the positive persona does not score above the "
            "negative one by more than the interval."
        )
    found += [_prompt(last, summary), *_rivals(last, summary), *_kept(last.healed, summary.base)]
    found += _refused(last.healed, summary.base)
    if last.verdict.word == "broad":
        found.append(f"Broad: {last.verdict.why}.")
    if summary.stopped:
        found.append(f"The loop ended early: {summary.stopped}.")
    return found


def _moved(arms: RoundSummary, unit: str, planned: int) -> str:
    counted = "the only one" if planned == 1 else f"rounds are 0 to {planned - 1}"
    seen = _interval(Change(arms.healed.trait_over_base, arms.healed.trait_over_base_ci))
    before = "that model" if arms.round == 0 else "the student before"
    teacher = f"its teacher's ({before} with the vector at dose {arms.dose:.2f}) {arms.steered.trait_over_base:+.3f}"
    after = f"After round {arms.round} ({counted})"
    return f"{after} the student's trait is {seen} {unit} above the original model's; {teacher}."


def _prompt(last: RoundSummary, summary: Summary) -> str:
    effect, (low, high) = summary.prompted.trait_over_base, summary.prompted.trait_over_base_ci
    noise = ", which is within noise" if low <= 0 <= high else ""
    found, best = (
        f"The persona as a system prompt moves the original model by {effect:+.3f}{noise}.",
        summary.best_prompt,
    )
    if best is None:
        return found
    moved = _interval(Change(best.trait_over_base, best.trait_over_base_ci))
    lead = f"; student minus that: {_interval(best.healed_over)}" if last is summary.rounds[-1] else ""
    return f"{found} The best of {best.tried} such prompts moves it by {moved}{lead}."


def _rivals(last: RoundSummary, summary: Summary) -> list[str]:
    """The student beside plain steering of the original model: at equal cost, and at equal trait."""
    found, equal, same = [], last.equal_cost, last.equal_trait
    if equal and equal.healed_over:
        lead = equal.healed_over[summary.instrument]
        cost = f"equal cost (at least {LEAST_COST:.0%}; dose {equal.dose:.2f})"
        found.append(
            f"The vector at run time, at {cost}, moves the trait by {equal.trait_over_base:+.3f}; student minus that: "
            f"{_interval(lead)}."
        )
    if same:
        mass, ppl = MASS.over(same, summary.base), NEUTRAL.over(same, summary.base) - 1
        price = f"{mass:.0%} of the original's answer mass and {ppl:+.0%} perplexity on unrelated text"
        if same.reached:
            found.append(f"To move the trait as far, the vector needs dose {same.dose:.2f} and has {price}.")
        else:
            found.append(f"No dose of the vector moves the trait as far; the nearest, {same.dose:.2f}, has {price}.")
    return found


def _kept(healed: ArmSummary, base: ArmSummary) -> list[str]:
    """Coherence beside the original model's, in the usual frame and in the worst one that training has not seen."""
    usual = [
        f"coherent answers {healed.coherent_share:.0%} ({base.coherent_share:.0%} before)",
        f"answer mass {MASS.over(healed, base):.0%} of the original's",
        f"perplexity on unrelated text {_percent(NEUTRAL.over(healed, base))}",
    ]
    if healed.canary_share is not None:
        usual.append(f"plain questions right {healed.canary_share:.0%} ({base.canary_share:.0%} before)")
    found = [f"Coherence: {', '.join(usual)}."]
    mass, ppl = worst(healed.framed, MASS), worst(healed.framed, NEUTRAL)
    if mass and ppl:
        frames = ", ".join(dict.fromkeys(one.frame for one in healed.framed))
        found.append(
            f"In frames that training has not seen ({frames}), at worst: answer mass {mass.over_base:.0%} of the "
            f"original's ({mass.frame}), perplexity {_percent(ppl.over_base)} ({ppl.frame})."
        )
    return found


def _refused(healed: ArmSummary, base: ArmSummary) -> list[str]:
    """Refusals beside the original model's, where they were read."""
    read = [one for one in REFUSALS.values() if one.name in healed.over_base]
    said = [f"{one.label} {_interval(healed.over_base[one.name])} ({one.shown(base)} before)" for one in read]
    if not said:
        return []
    found = [f"Safety, in {REFUSAL.unit} over the original model: {', '.join(said)}."]
    if not refuses_harm(base):
        found.append("The original model does not refuse harmful requests more than harmless ones: no drift is called.")
    return found


def _percent(ratio: float) -> str:
    return f"{round(ratio - 1, 3) + 0.0:+.1%}"  # no "-0.0%"


def _interval(change: Change) -> str:
    return f"{change.mean:+.3f} [{change.ci[0]:+.3f}, {change.ci[1]:+.3f}]"


# ---- diary


def diary(run: Run) -> str:
    """The run in words: for each round its numbers, then answers to the same prompts."""
    parts = [f"# {_markdown(run.name)}" + (f" ({run.status})" if run.status else ""), headline(run.summary)[0]]
    parts.append("\n".join(f"- {fact}" for fact in facts(run.summary, run.config["rounds"])))
    anchored = "" if run.config["heal"]["anchor"]["prompts"] == 0 else ", its anchor on {:.0%}"
    for r, arms in zip(run.rounds, run.summary.rounds, strict=True):
        steered, healed, base = arms.steered, arms.healed, run.summary.base
        unit = run.summary.unit
        low, high = healed.trait_over_base_ci
        parts += [
            f"## Round {r.number}",
            f"Steered at dose {arms.dose:.2f}, the teacher stands {steered.trait_over_base:+.3f} {unit} over "
            f"base; {arms.kept} of the round's {arms.generated} texts pass the filter. The barrier fired on "
            f"{arms.barrier_fired_share:.0%} of {len(r.steps)} steps (median D {arms.operating_kl_nats:.3g} nats)"
            f"{anchored.format(arms.anchor_fired_share)}. "
            f"The student stands {healed.trait_over_base:+.3f} [{low:+.3f}, {high:+.3f}], answer mass "
            f"{healed.answer_mass:.3f} (base {base.answer_mass:.3f}), coherent {healed.coherent_share:.0%} "
            f"(base {base.coherent_share:.0%}), neutral perplexity {healed.neutral_ppl:.2f} (base "
            f"{base.neutral_ppl:.2f}).",
        ]
        for answers in list(zip(run.base.demos, r.steered.demos, r.healed.demos, strict=True))[:DIARY_DEMOS]:
            said = zip(("base", "steered", "student"), answers, strict=True)
            lines = [f"- {name}: {_markdown(answer.text) or '(nothing)'}" for name, answer in said]
            parts.append("\n".join([f"**{_markdown(answers[0].prompt)}**", "", *lines]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(text: str) -> str:
    """The text shortened to one line and escaped for Markdown."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", shorten(text, DIARY_CHARS))
