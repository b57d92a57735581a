"""The top of the report: the verdict, answers side by side, trait against cost, the arms that matter."""

from __future__ import annotations

from steer_heal.eval.catalogue import COHERENT, MASS, NEUTRAL, RIGHT, Instrument
from steer_heal.eval.opponents import LEAST_COST
from steer_heal.eval.reading import ArmReading, Demo, printed
from steer_heal.eval.record import ArmSummary
from steer_heal.report.figures import frontier_figure
from steer_heal.report.html import (
    arm_name,
    defined,
    dropped,
    folded,
    marked,
    panel,
    prose,
    safe,
    section,
    table_of,
    with_interval,
)
from steer_heal.report.words import facts, headline
from steer_heal.runs.reading import Run
from steer_heal.runs.rounds import Round

SHOWN_PROMPTS = 6  # the first ones of the list, whatever their answers
ARMS = {
    "base": "the original model",
    "prompted": "the original model with the positive persona as its system prompt",
    "best prompt": "the original model under the best of five system prompts, the persona among them: chosen on a "
    "fifth of the questions, measured on the others",
    "equal cost": f"the original model with the vector added, at the dose whose cost is the student's (at least "
    f"{LEAST_COST:.0%})",
    "equal trait": "the original model with the vector added, at the dose that moves the trait as far as the student",
    "steered": "the teacher of the last round: that round's starting model, steered",
    "student": "the model that was trained, without any steering",
}
MEASURES = {
    "over base": "how far the trait moved, with the 95% interval over questions",
    MASS.label: "probability on yes and no together where a question asks for one of them, right or wrong",
    COHERENT.label: "share of free answers that neither repeat themselves nor fall apart",
    RIGHT.label: "plain questions with four answers each, one of them right",
    NEUTRAL.label: "perplexity of texts that have nothing to do with the trait; lower is better",
}
PLAIN = (MASS, COHERENT, RIGHT, NEUTRAL)


def lead(run: Run) -> str:
    """The verdict: a headline with a coloured bar, and the figures behind it."""
    sentence, kind = headline(run.summary)
    status = f'<p class="status">{run.status}</p>' if run.status else ""
    listed = "".join(f"<li>{safe(fact)}</li>" for fact in facts(run.summary, run.config["rounds"]))
    return f'{status}<div class="verdict {kind}"><p>{safe(sentence)}</p><ul>{listed}</ul></div>'


def answers_section(run: Run) -> str:
    """The same prompts answered by base, prompted, plain steering and the student, side by side."""
    cards = [_card(run, number) for number in range(len(run.base.demos))]
    body = "".join(cards[:SHOWN_PROMPTS])
    if rest := cards[SHOWN_PROMPTS:]:
        body += folded(f"The other {len(rest)} prompts", "".join(rest))
    last = f"r{run.rounds[-1].number}"
    why = f"""The first {min(SHOWN_PROMPTS, len(cards))} prompts of the list, not selected. Only "prompted" has the
        trait in its system prompt. "student" is the one after the last round ({last}). Answers are greedy and cut at
        {run.answer_limit} tokens: … marks a cut. A label says why the filter would drop an answer."""
    return section("Answers", why, body)


def _card(run: Run, number: int) -> str:
    """One prompt: the arms next to one another, and folded the student after every round with its last teacher."""
    last = run.rounds[-1]
    arms = {"base": run.base, "prompted": run.prompted, "equal cost": last.equal_cost, "student": last.healed}
    voices = "".join(
        _voice(name, arm.demos[number], prose(_text(arm.demos[number]))) for name, arm in arms.items() if _has(arm)
    )
    rounds = folded("after every round", f'<div class="voices">{_by_round(run.base, run.rounds, number)}</div>')
    return (
        f'<article><h3>{safe(run.base.demos[number].prompt)}</h3><div class="voices">{voices}</div>{rounds}</article>'
    )


def _has(arm: ArmReading | None) -> bool:
    return arm is not None and arm.demos is not None


def _by_round(base: ArmReading, rounds: list[Round], number: int) -> str:
    """The student's answer after every round, changes marked against the one before, and the last teacher's."""
    before, voices = base.demos[number], []
    for r in rounds:
        now = r.healed.demos[number]
        voices.append(_voice(f"student r{r.number}", now, marked(_text(before), _text(now))))
        before = now
    teacher = rounds[-1].steered.demos[number]
    return "".join([*voices, _voice(f"steered r{rounds[-1].number}", teacher, prose(_text(teacher)))])


def _text(answer: Demo) -> str:
    """The answer, with an ellipsis where the length limit cut it."""
    return f"{answer.text} …" if answer.ended is False and answer.text.strip() else answer.text


def _voice(name: str, answer: Demo, text: str) -> str:
    return f'<div class="voice">{arm_name(name)} {dropped(answer.dropped)}{text}</div>'


def cost_section(run: Run) -> str:
    """Trait against its cost: plain steering at each dose, and the student after every round."""
    why = """Higher is more trait, further left is less damage. Orange: the original model, plainly steered, with the
        dose at each point. Green: the student after each round. A student above the orange line keeps more than plain
        steering does at the same trait. The cost is the larger loss of two, in answer mass and in perplexity on
        unrelated text, relative to base; left of zero both are better than base's."""
    return section("Trait against cost", why, panel("", frontier_figure(run.summary)))


def arms_section(run: Run) -> str:
    """The arms that the verdict is about, in six columns."""
    arms = {name: getattr(run.summary, name) for name in ("base", "prompted")}
    if run.rounds:
        arms |= {printed(name): arm for name, arm in run.summary.rounds[-1].named().items()}
    arms = {name: arms[name] for name in ARMS if arms.get(name)}
    measured = [one for one in PLAIN if any(getattr(arm, one.measure) is not None for arm in arms.values())]
    head = ("arm", f"over base, {run.summary.unit}", *(one.label for one in measured), "dose")
    rows = [(arm_name(name), *_cells(name, arm, measured, run)) for name, arm in arms.items()]
    if not rows:
        return section("In numbers", "", "<p>No arm has been measured yet.</p>")
    shown = {*arms, *head, "over base"}
    if best := run.summary.best_prompt:
        over = with_interval(best.trait_over_base, best.trait_over_base_ci)
        rows.insert(2, (arm_name("best prompt"), over, *[""] * (len(measured) + 1)))
        shown.add("best prompt")
    terms = {term: said for term, said in (ARMS | MEASURES).items() if term in shown}
    return section("In numbers", "Every arm on the same questions.", table_of(head, rows) + defined(terms))


def _cells(name: str, arm: ArmSummary, measured: list[Instrument], run: Run) -> list[str]:
    over = "" if name == "base" else with_interval(arm.trait_over_base, arm.trait_over_base_ci)
    dose = run.summary.rounds[-1].dose if name == "steered" else arm.dose
    return [over, *(one.shown(arm) for one in measured), "" if dose is None else f"{dose:.2f}"]
