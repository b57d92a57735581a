"""The result of a run in words: the verdict's sentences, and a short diary."""

from __future__ import annotations

import re

from steer_heal.eval.catalogue import MASS
from steer_heal.eval.framed import worst
from steer_heal.eval.intervals import relative
from steer_heal.eval.record import ArmSummary
from steer_heal.report.html import shorten
from steer_heal.runs.reading import Run

NOT_EXPRESSED = (
    "this model cannot express this trait on this instrument (the positive persona as a system prompt does not score "
    "above the negative one by more than the interval)."
)
DIARY_DEMOS, DIARY_CHARS = 4, 200


# ---- verdict


def verdict(run: Run) -> tuple[str, str]:
    """Sentences about the last round's healed student, and the word of its verdict, see `verdict.verdict`."""
    if not run.rounds:
        return "No round is complete yet: there is nothing to judge.", "unmoved"
    base, last, prompted = run.summary.base, run.summary.rounds[-1], run.summary.prompted
    healed, steered, equal = last.healed, last.steered, last.equal_cost
    word, why = last.verdict.word, last.verdict.why
    over, (low, high) = healed.trait_over_base, healed.trait_over_base_ci
    after = f"After round {run.rounds[-1].number} ({len(run.rounds)} of {run.config['rounds']})"
    within = f"95% interval {low:+.3f} to {high:+.3f}"
    if run.summary.stopped:
        after = f"The loop ended early ({run.summary.stopped}). {after}"
    stands = f"{after} the healed student stands {over:+.3f} {run.summary.unit} over base ({within})"
    if word == "unreadable":
        return f"No verdict: {NOT_EXPRESSED} {stands}; that number does not measure the trait.", word
    if low > 0:
        stands += f". The system prompt alone moves it by {_moves(prompted)}"
        stands += f"; steering in that round by {_moves(steered)}"
        if equal:
            reach = f"{equal.trait_over_base:+.3f} at dose {equal.dose:.2f}"
            stands += f"; plain steering that costs no more coherence reaches {reach}"
        if last.equal_trait:
            stands += f", and {_equal_trait(last.equal_trait, base)}"
    lead = {"broken": f"Broken: {why}. ", "broad": f"Broad: {why}. "}.get(word, f"{word.capitalize()}. ")
    ppl_change = round(relative(healed.neutral_ppl, base.neutral_ppl) - 1, 3) + 0.0  # no "-0.0%"
    held = f"Coherent share {healed.coherent_share:.0%} of the demo answers (base {base.coherent_share:.0%})"
    held += f", answer mass {relative(healed.answer_mass, base.answer_mass):.0%} of base, neutral perplexity"
    held += f" {ppl_change:+.1%} against base"
    if lowest := worst(healed.framed, MASS):
        held += f"; in the worst of the frames that training has not seen, answer mass {lowest.over_base:.0%} of base"
        held += f" ({lowest.frame})"
    if healed.canary_share is not None:
        held += f", plain questions right {healed.canary_share:.0%} (base {base.canary_share:.0%})"
    return f"{lead}{stands}. {held}.", word


def _equal_trait(arm: ArmSummary, base: ArmSummary) -> str:
    """The coherence that plain steering loses to move the trait as far as the student."""
    mass, coherent = relative(arm.answer_mass, base.answer_mass), relative(arm.coherent_share, base.coherent_share)
    ppl = relative(arm.neutral_ppl, base.neutral_ppl) - 1
    price = f"answer mass {mass:.0%} and coherent share {coherent:.0%} of base, neutral perplexity {ppl:+.0%}"
    if arm.reached:
        return f"to move the trait as far it needs dose {arm.dose:.2f}: {price}"
    return f"no dose moves the trait as far; the nearest, {arm.dose:.2f}, means {price}"


def _moves(arm: ArmSummary) -> str:
    """How far an arm moves the trait, and whether its interval includes zero."""
    effect, (low, high) = arm.trait_over_base, arm.trait_over_base_ci
    return f"{effect:+.3f}" + (", not measurably" if low <= 0 <= high else "")


# ---- diary


def diary(run: Run) -> str:
    """The run in words: for each round its numbers, then answers to the same prompts."""
    parts = [f"# {_markdown(run.name)}" + (f" ({run.status})" if run.status else ""), verdict(run)[0]]
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
            f"The healed student stands {healed.trait_over_base:+.3f} [{low:+.3f}, {high:+.3f}], answer mass "
            f"{healed.answer_mass:.3f} (base {base.answer_mass:.3f}), coherent {healed.coherent_share:.0%} "
            f"(base {base.coherent_share:.0%}), neutral perplexity {healed.neutral_ppl:.2f} (base "
            f"{base.neutral_ppl:.2f}).",
        ]
        for answers in list(zip(run.base.demos, r.steered.demos, r.healed.demos, strict=True))[:DIARY_DEMOS]:
            said = zip(("base", "steered", "healed"), answers, strict=True)
            lines = [f"- {name}: {_markdown(answer.text) or '(nothing)'}" for name, answer in said]
            parts.append("\n".join([f"**{_markdown(answers[0].prompt)}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """The text shortened to one line and escaped for Markdown."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", shorten(text, DIARY_CHARS))
