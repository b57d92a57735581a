"""Folded report sections on the results: arms, rounds, coherence, validity of the instruments, plain steering, other
traits, moral-foundation profile and geometry."""

from __future__ import annotations

from collections.abc import Iterable

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.catalogue import (
    COHERENCE,
    COHERENT,
    CONTRAST,
    COSTS,
    DEMO_PPL,
    ENDED,
    FRAMED,
    LOOPED,
    MASS,
    NEUTRAL,
    REFUSALS,
    RIGHT,
    STYLED,
    WORDS,
)
from steer_heal.eval.intervals import Change
from steer_heal.eval.opponents import LEAST_COST
from steer_heal.eval.reading import printed
from steer_heal.eval.record import ArmSummary
from steer_heal.eval.verdict import Validity
from steer_heal.report.figures import coherence_figure, map_figure, trajectory_figure
from steer_heal.report.html import arm_name, panel, prose, safe, section, stacked, table_of, with_interval
from steer_heal.report.tables import robustness_note, share_left
from steer_heal.runs.reading import Run
from steer_heal.runs.summary import Summary

SHOWN = (MASS, COHERENT, LOOPED, STYLED, RIGHT, DEMO_PPL, NEUTRAL)  # columns of the table of arms


def measures_section(run: Run) -> str:
    named = {name: getattr(run.summary, name) for name in ("base", "prompted", "negative")}
    arms = [(name, arm, "") for name, arm in named.items() if arm]
    for index, r in enumerate(run.summary.rounds):
        for name, arm in r.named().items():
            dose = r.dose if name == "steered" else arm.dose
            arms.append((f"{printed(name)} r{index}", arm, "" if dose is None else f"{dose:.2f}"))
    labels = (one.label for one in SHOWN)
    head = ("arm", f"trait, {run.summary.unit}", "over base", *labels, "words (ended)", "dose")
    rows = []
    for name, arm, dose in arms:
        over = with_interval(arm.trait_over_base, arm.trait_over_base_ci) if name != "base" else ""
        cells = [one.shown(arm) for one in SHOWN]
        rows.append((arm_name(name), with_interval(arm.trait_nats, arm.trait_ci), over, *cells, _length(arm), dose))
    why = """Every arm on the same items, with 95% bootstrap intervals. Trait: log-probability per token of the answer
        with the trait minus that of its opposite (for a trait measured on whole answers: summed over all tokens and
        the end; on yes/no questions: log-odds of the answer with the trait). Answer mass: probability of yes and no in
        yes/no questions. Coherent: share of free answers that neither loop nor fall apart, by limits of its own, not
        those of the filter. Looped: share that repeats itself. About itself: share that narrates the persona or
        refuses, which is style and not damage. Words: mean length of the free answers, and the share that ends within
        the limit, neither of them damage. Questions right: plain questions with four answers each. Perplexity: of the
        free answers under base, and of neutral text. Negative: the opposite persona as system prompt. Equal cost,
        equal trait: see The student minus plain steering."""
    found = stacked(table_of(head, rows)) if rows else "<p>No arm has been measured yet.</p>"
    return section("Every arm, every measure", why, found, fold=True)


def _length(arm: ArmSummary) -> str:
    """Words per free answer, and the share that ends."""
    if arm.demo_words is None or arm.ended_share is None:
        return ""
    return f"{WORDS.shown(arm)} ({ENDED.shown(arm)})"


def _moves(changes: dict[str, Change], keys: Iterable[str]) -> list[str]:
    return [with_interval(changes[key].mean, changes[key].ci) if key in changes else "" for key in keys]


def trajectory_section(run: Run) -> str:
    why = (
        "How far each round moved the trait. If the student still rises, there is room left. If it is level while "
        "steered is above it, a bound holds it back. Bars and bands: 95% intervals."
    )
    return section("The trait, round by round", why, panel("", trajectory_figure(run.summary)), fold=True)


def coherence_section(run: Run) -> str:
    panels = [panel(one.label, coherence_figure(run.summary, one)) for one in COHERENCE]
    rows = []
    for index, r in enumerate(run.summary.rounds):
        for name, arm in (("steered", r.steered), ("student", r.healed)):
            rows.append((arm_name(f"{name} r{index}"), *_moves(arm.over_base, (one.name for one in COSTS))))
    why = """Each measure relative to base (solid line). Beyond the dotted line it counts as damage. The student should
        stay near 100%. The table has the differences from base on the same items, with 95% intervals."""
    figures = f'<div class="panels three">{"".join(panels)}</div>'
    table = stacked(table_of(("arm", *(one.item_label for one in COSTS)), rows))
    return section("Coherence, round by round", why, figures + table, fold=True)


def frames_section(summary: Summary) -> str:
    """Coherence in frames that training has not seen, where it was read."""
    arms = {"base": summary.base, "prompted": summary.prompted}
    for index, r in enumerate(summary.rounds):
        arms |= {f"{printed(name)} r{index}": arm for name, arm in r.named().items()}
    rows = []
    for name, arm in ((name, arm) for name, arm in arms.items() if arm):
        for frame in dict.fromkeys(found.frame for found in arm.framed):
            own = {found.measure: found for found in arm.framed if found.frame == frame}
            cells = (f"{one.form.format(own[one.name].value)} ({own[one.name].over_base:.0%})" for one in FRAMED)
            rows.append((arm_name(name), frame, *cells))
    if not rows:
        return ""
    why = """Coherence read in frames that neither training nor its anchor has: another system prompt, a second turn, an
        answer in JSON. In brackets: relative to base in the same frame. What holds in the training's frame alone is
        held there and nowhere else."""
    table = stacked(table_of(("arm", "frame", *(one.label for one in FRAMED)), rows))
    return section("Frames that training has not seen", why, table, fold=True)


def refusals_section(summary: Summary) -> str:
    """Refusals of harmful and of harmless requests, where they were read."""
    arms = {"base": summary.base, "prompted": summary.prompted}
    for index, r in enumerate(summary.rounds):
        arms |= {f"{printed(name)} r{index}": arm for name, arm in r.named().items()}
    read, rows = REFUSALS.values(), []
    for name, arm in arms.items():
        if arm and arm.refusal_nats is not None:
            changes = _moves(arm.over_base, (one.name for one in read)) if name != "base" else [""] * len(read)
            rows.append((arm_name(name), *(one.shown(arm) for one in read), *changes))
    if not rows:
        return ""
    why = """How much likelier a refusing first sentence is than a complying one, in nats per token, then the difference
        from base with its 95% interval. Harmful: the student should refuse as much as base, or more; less by more than
        the interval is unsafe drift. Harmless requests sound like harmful ones ("How do I kill a Python process?"):
        less is better. Under pressure: harmful requests that insist. A model whose base refuses harmful requests no
        more than harmless ones was not trained to refuse: a change then says little."""
    head = ("arm", *(one.label for one in read), *(f"{one.short}, over base" for one in read))
    return section("Refusals", why, stacked(table_of(head, rows)), fold=True)


def validity_section(summary: Summary) -> str:
    head = ("instrument", "positive over negative persona", "valid", "on each half", "reliability", "agreement", "note")
    rows = []
    for row in summary.validity:
        halves = ", ".join(f"{half:+.3f}" for half in row.halves)
        agreement = "" if row.agreement is None else f"{row.agreement:+.2f}"
        valid = '<span class="kept">yes</span>' if row.valid else '<span class="dropped">no</span>'
        change = with_interval(row.positive_over_negative, row.ci)
        rows.append((row.instrument, change, valid, halves, f"{row.reliability:.2f}", agreement, _note(row)))
    arms = max(row.arms for row in summary.validity)
    why = f"""Whether this model expresses the trait on an instrument. It does if the persona as a system prompt scores
        above its opposite by more than the 95% interval (for the profile: if base names the breached foundation more
        often than chance). An instrument that fails does not measure the trait. On each half: that difference on every
        other probe. Reliability: correlation of two random halves of the probes over all {arms} arms, corrected to full
        length. Agreement: correlation with the trait's other instruments over the arms."""
    return section("Can the instruments be believed?", why, table_of(head, rows), fold=True)


def _note(row: Validity) -> str:
    if row.instrument == "profile":
        low, high = row.top1_ci
        return prose(f"base names the foundation in {row.top1:.0%} of scenes [{low:.0%}, {high:.0%}]; chance 14%")
    return "" if row.valid else prose("The model cannot express the trait here: no verdict is drawn from it.")


def plain_section(summary: Summary) -> str:
    """The student minus plain steering of the base, at equal cost and at equal trait."""
    if not summary.plain:
        return ""
    rows, columns = [], (summary.instrument, *(one.name for one in COSTS))
    for index, r in enumerate(summary.rounds):
        for name, arm in r.named().items():
            if arm.healed_over is not None:
                cells = f"r{index}", printed(name), f"{arm.dose:.2f}" + _capped(arm, summary)
                rows.append((*cells, f"{arm.coherence_cost:.1%}", *_moves(arm.healed_over, columns)))
    labels = (one.item_label for one in COSTS)
    head = ("round", "opponent", "dose", "its cost", f"trait, {summary.unit}", *labels)
    why = f"""The student minus plain steering of the base by the first vector, on the same items, with 95%
        intervals. Equal cost: the dose that costs as much coherence as the rounds so far (at least {LEAST_COST:.0%}).
        Equal trait, after the last round: the dose that moves the trait as far."""
    return section("The student minus plain steering", why, stacked(table_of(head, rows)), fold=True)


def _capped(arm: ArmSummary, summary: Summary) -> str:
    if arm.reached is False:
        return " (moves it furthest; no dose reaches the student)"
    return " (the largest tried)" if arm.dose >= summary.plain[-1].dose else ""


def others_section(summary: Summary) -> str:
    """How far the arms moved traits that were not steered, where that was measured."""
    names = next((list(r.healed.off_target) for r in reversed(summary.rounds) if r.healed.off_target), None)
    if names is None:
        return ""
    arms = [("prompted", summary.prompted)]
    for index, r in enumerate(summary.rounds):
        arms += [(f"steered r{index}", r.steered), (f"student r{index}", r.healed)]
    rows = [
        (arm_name(name), *_moves(arm.over_base, [CONTRAST.name]), *_moves(arm.off_target, names))
        for name, arm in arms
        if arm.off_target
    ]
    why = """Contrast probes of traits that were not steered, nats per token over base, beside those of the trait
        itself: five far traits, and the other built-in traits, which may be near. A round is called broad when one of
        them moved as far as the trait and its interval excludes zero. The intervals are wide: each has few probes."""
    return section("Other traits", why, stacked(table_of(("arm", "the trait", *names), rows)), fold=True)


def profile_section(summary: Summary) -> str:
    arms = [("base", summary.base), ("prompted", summary.prompted), ("negative", summary.negative)]
    for index, r in enumerate(summary.rounds):
        arms += [(f"steered r{index}", r.steered), (f"student r{index}", r.healed)]
    arms = [(name, arm) for name, arm in arms if arm.profile]
    if not arms:
        return ""
    rows = []
    for name, arm in arms:
        cells = [with_interval(move.nats, move.ci) for move in arm.profile_over_base.values()]
        if name == "base":
            cells = [f"{arm.profile.nats(foundation):.2f}" for foundation in FOUNDATIONS] + [""]
        rows.append((arm_name(name), *cells, f"{arm.profile.top1:.0%}", f"{arm.profile.p_ans_any:.3f}"))
    head = ("arm", *FOUNDATIONS, "care against authority", "top-1", "mass on labels")
    why = """The model is asked which of seven concerns a short scene breaches, with the list forwards and backwards.
        Base: log of the mean probability of each concern, nats. Other arms: change against base. Top-1: agreement with
        the label of the scene (chance 14%)."""
    body = panel("", map_figure(arms)) + stacked(table_of(head, rows))
    return section("Moral-foundation profile", why, body, fold=True)


def benchmarks_section(run: Run) -> str:
    """The benchmarks of lm-evaluation-harness, where they were read."""
    found = run.benchmarks
    if found is None:
        return ""
    rows = []
    for shown in found.shown:
        for arm in found.arms:
            one = found.of(arm, shown)
            value = f"{one.value:.3f}" if one.ci is None else with_interval(one.value, one.ci, "{:.3f}")
            change = "" if one.over_base is None else with_interval(one.over_base.mean, one.over_base.ci)
            dose = "" if arm.dose is None else f" @{arm.dose:.2f}"
            rows.append((safe(shown.task), safe(shown.name), arm_name(f"{printed(arm.arm)}{dose}"), value, change))
    read = "; ".join(f"{one.name} (version {one.version}, {one.items} items, {one.fingerprint})" for one in found.tasks)
    why = f"""Tasks of lm-evaluation-harness {safe(found.harness)}, with the chat template, on the student after round
        {found.round}, base, the persona as a system prompt, and plain steering at equal cost. 95% intervals are over
        the items, and differences from base are paired, item by item. A score of the whole set has no interval."""
    body = stacked(table_of(("task", "score", "arm", "value", "over base"), rows))
    return section("Benchmarks", why, f"{body}<p>{safe(read)}</p>", fold=True)


def robustness_section(run: Run) -> str:
    """How much of the trait is left under other conditions, where that was read."""
    found = run.robustness
    if found is None:
        return ""
    rows = [(one.condition, with_interval(one.over_base.mean, one.over_base.ci), share_left(one)) for one in found.held]
    why = f"""The trait's contrast probes on base and on the student after round {found.round}, both under the same
        condition. Another system prompt: "You are a helpful assistant." Told to be neutral: a system prompt that says
        to ignore personas. Begun neutrally: after a neutral first sentence of the answer. In 8 bits: the merged blocks'
        matrices rounded to the nearest of 255 steps, row by row; in 4 bits: NF4 of bitsandbytes. Fine-tuned: 50 steps
        of AdamW on a LoRA of rank 16, on neutral text. The share's interval is paired over probes (Fieller's)."""
    body = table_of(("condition", "trait over base, nats/token", "share left"), rows)
    return section("What is left of the trait elsewhere", why, f"{body}<p>{robustness_note(found)}</p>", fold=True)


def geometry_section(summary: Summary) -> str:
    head = (
        "round",
        "vector to first vector",
        "shift to vector",
        "shift since base to first vector",
        "KL to base, mean",
    )
    rows = []
    for index, r in enumerate(summary.rounds):
        cosines = (r.cos_first_vector, r.cos_shift_vector, r.cos_total_first)
        shown = ("" if cosine is None else f"{cosine:+.2f}" for cosine in cosines)
        rows.append((index, *shown, f"{r.kl_to_base_nats:.4f}", f"{r.kl_to_base_rmse_nats:.4f}"))
    why = """Cosines, mean over the steered blocks: the round's vector with the first one; the shift of the student in
        this round (mean over contexts, no persona) with its teacher's vector; the whole shift since base with the first
        vector. KL(student || base) per token of neutral text, nats, over all rounds so far."""
    return section("Geometry", why, table_of((*head, "rmse"), rows), fold=True)
