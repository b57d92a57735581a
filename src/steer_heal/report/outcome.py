"""The page's sections on what came out: the arms, the trajectory, the price, plain steering beside it; on why the
numbers may be believed, and on what else moved."""

from __future__ import annotations

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.opponents import LEAST_COST
from steer_heal.eval.verdict import COHERENCE
from steer_heal.report.figures import coherence_figure, frontier_figure, map_figure, trajectory_figure
from steer_heal.report.html import panel, prose, section, stacked, table_of, with_interval
from steer_heal.runs.reading import Run

LOSSES = {
    "mass": "answer mass",
    "demo_coherent": "coherent share",
    "canary": "questions right",
    "canary_log_odds": "right, log-odds",
    "neutral_nll": "log neutral perplexity",
}
SHARES = {
    "answer_mass": "{:.3f}",
    "coherent_share": "{:.0%}",
    "looped_share": "{:.0%}",
    "styled_share": "{:.0%}",
    "canary_share": "{:.0%}",
}
COSTS = LOSSES | {"demo_looped": "looped share"}


def arms_section(run: Run) -> str:
    arms = [(name, run.summary[name], "") for name in ("base", "prompted", "negative") if run.summary[name]]
    for index, r in enumerate(run.summary["rounds"]):
        arms += [(f"steered r{index}", r["steered"], f"{r['dose']:.2f}")]
        for key, name in (("equal_cost", "equal cost"), ("equal_trait", "equal trait")):
            arms += [(f"{name} r{index}", r[key], f"{r[key]['dose']:.2f}")] if key in r else []
        arms += [(f"healed r{index}", r["healed"], "")]
    head = ("arm", f"trait, {run.summary['unit']}", "over base", "answer mass", "coherent", "looped", "about itself")
    head += ("questions right", "demo ppl", "neutral ppl", "dose")
    rows = []
    for name, arm, dose in arms:
        over = with_interval(arm["trait_over_base"], arm["trait_over_base_ci"]) if name != "base" else ""
        shares = [form.format(arm[key]) if key in arm else "" for key, form in SHARES.items()]
        ppl = [f"{arm[key]:.2f}" if key in arm else "" for key in ("demo_ppl", "neutral_ppl")]
        trait = with_interval(arm["trait_nats"], arm["trait_ci"])
        rows.append((f'<span class="arm {name.split()[0]}">{name}</span>', trait, over, *shares, *ppl, dose))
    why = """Every arm on the same items, with 95% bootstrap intervals. Trait: log-probability per token of the answer
        with the trait minus that of its opposite (for a trait read on yes/no questions: log-odds of the answer with
        it). Answer mass: probability of yes and no in yes/no questions. Coherent: share of free answers that neither
        loop nor fall apart, by limits that no filter moves (eval.judge); looped: that go round in circles; about
        itself: that narrate the persona or refuse, which is style. Questions right: plain questions of four answers.
        Perplexities of the free answers under base, and of neutral text. Negative: the opposite persona as system
        prompt. Equal cost, equal trait: see Against plain steering."""
    found = stacked(table_of(head, rows)) if rows else "<p>No arm has been measured yet.</p>"
    return section("Arms", why, found)


def trajectory_section(run: Run) -> str:
    why = (
        "How far each round moved the trait. Healed that climbs has room left; healed that stands while steered is "
        "above it is held back by a bound. Bars and bands: 95% intervals."
    )
    return section("Trajectory", why, panel("", trajectory_figure(run.summary)))


def coherence_section(run: Run) -> str:
    panels = [panel(name, coherence_figure(run.summary, key, bound)) for key, name, bound, _ in COHERENCE]
    rows = []
    for index, r in enumerate(run.summary["rounds"]):
        for name in ("steered", "healed"):
            over = r[name]["over_base"]
            moves = [with_interval(over[key]["mean"], over[key]["ci"]) if key in over else "" for key in COSTS]
            rows.append((f'<span class="arm {name}">{name} r{index}</span>', *moves))
    why = """Relative to base (solid line); beyond the dotted line we call it damage. Healed should stay near 100%. The
        table has the differences from base on the same items, with 95% intervals."""
    figures = f'<div class="panels three">{"".join(panels)}</div>'
    return section("Coherence", why, figures + stacked(table_of(("arm", *COSTS.values()), rows)))


def validity_section(summary: dict) -> str:
    head = ("instrument", "positive over negative persona", "valid", "on each half", "reliability", "agreement", "note")
    rows = []
    for row in summary["validity"]:
        halves = ", ".join(f"{half:+.3f}" for half in row["halves"])
        agreement = f"{row['agreement']:+.2f}" if "agreement" in row else ""
        valid = '<span class="kept">yes</span>' if row["valid"] else '<span class="dropped">no</span>'
        change = with_interval(row["positive_over_negative"], row["ci"])
        rows.append((row["instrument"], change, valid, halves, f"{row['reliability']:.2f}", agreement, _note(row)))
    arms = max(row["arms"] for row in summary["validity"])
    why = f"""Does this model express the trait on the instrument: the persona as a system prompt must score above its
        opposite by more than the 95% interval (the profile: base must name the breached foundation more often than
        chance). What fails is not to be read as the trait. On each half: that difference on every other probe.
        Reliability: correlation of two random halves of the probes over all {arms} arms, stepped up to
        full length. Agreement: correlation of contrast and yes/no over the arms."""
    return section("Can the instruments be believed?", why, table_of(head, rows))


def _note(row: dict) -> str:
    if row["instrument"] == "profile":
        low, high = row["top1_ci"]
        return prose(f"base names the foundation in {row['top1']:.0%} of scenes [{low:.0%}, {high:.0%}]; chance 14%")
    return "" if row["valid"] else prose("The model cannot express the trait here: no verdict is drawn from it.")


def plain_section(summary: dict) -> str:
    """The student against the base plainly steered: at equal cost, and at equal trait."""
    if not summary["plain"]:
        return ""
    rows = []
    for index, r in enumerate(summary["rounds"]):
        for key, name in (("equal_cost", "equal cost"), ("equal_trait", "equal trait")):
            if key in r:
                arm, more = r[key], r[key]["healed_over"]
                trait = more[summary["instrument"]]
                gains = [with_interval(more[k]["mean"], more[k]["ci"]) if k in more else "" for k in LOSSES]
                cells = f"r{index}", name, f"{arm['dose']:.2f}" + _capped(arm, summary), f"{arm['coherence_cost']:.1%}"
                rows.append((*cells, with_interval(trait["mean"], trait["ci"]), *gains))
    head = ("round", "opponent", "dose", "its cost", f"trait, {summary['unit']}", *LOSSES.values())
    why = f"""The base steered by the first vector, from half the smallest dose of a teacher to three times the largest,
        and the student after every round. Up is more trait, left is less damage. The table: the healed student minus
        plain steering on the same items, with 95% intervals, at the dose that costs as much coherence as the rounds so
        far (at least {LEAST_COST:.0%}) and, after the last round, at the dose that moves the trait as far."""
    return section("Against plain steering", why, panel("", frontier_figure(summary)) + stacked(table_of(head, rows)))


def _capped(arm: dict, summary: dict) -> str:
    if not arm.get("reached", True):
        return " (moves it furthest; no dose reaches the student)"
    return " (the largest tried)" if arm["dose"] >= summary["plain"][-1]["dose"] else ""


def others_section(summary: dict) -> str:
    """What the arms that were read on them did to traits that have no business to move."""
    first = next((r["healed"] for r in reversed(summary["rounds"]) if _off(r["healed"])), None)
    if first is None:
        return ""
    arms = [("prompted", summary["prompted"])]
    for index, r in enumerate(summary["rounds"]):
        arms += [(f"steered r{index}", r["steered"]), (f"healed r{index}", r["healed"])]
    rows = []
    for name, arm in filter(lambda named: _off(named[1]), arms):
        target = with_interval(arm["over_base"]["contrast"]["mean"], arm["over_base"]["contrast"]["ci"])
        others = [with_interval(move["mean"], move["ci"]) for move in _off(arm).values()]
        rows.append((f'<span class="arm {name.split()[0]}">{name}</span>', target, *others))
    why = """Contrast probes of traits that were not steered, nats per token over base, beside the contrast probes of
        the trait itself: five that are far from it, and our other built-in traits, which may be near. A round is called
        broad when one of them moved as far as the trait and its interval leaves out zero. Few probes each: wide
        intervals."""
    return section("Other traits", why, stacked(table_of(("arm", "the trait", *_off(first)), rows)))


def _off(arm: dict) -> dict:
    return {k.removeprefix("off:"): move for k, move in arm["over_base"].items() if k.startswith("off:")}


def profile_section(summary: dict) -> str:
    arms = [(name, summary[name]) for name in ("base", "prompted", "negative")]
    for index, r in enumerate(summary["rounds"]):
        arms += [(f"steered r{index}", r["steered"]), (f"healed r{index}", r["healed"])]
    arms = [(name, arm) for name, arm in arms if "profile" in arm]
    if not arms:
        return ""
    rows = []
    for name, arm in arms:
        moves = arm["profile_over_base"]
        cells = [with_interval(moves[f]["nats"], moves[f]["ci"]) if name != "base" else "" for f in moves]
        if name == "base":
            nats = {
                ("authority" if k == "auth_nats" else k.removesuffix("_nats")): v for k, v in arm["profile"].items()
            }
            cells = [f"{nats[f]:.2f}" for f in FOUNDATIONS] + [""]
        shares = f"{arm['profile']['top1']:.0%}", f"{arm['profile']['p_ans_any']:.3f}"
        rows.append((f'<span class="arm {name.split()[0]}">{name}</span>', *cells, *shares))
    head = ("arm", *FOUNDATIONS, "care against authority", "top-1", "mass on labels")
    why = """Which of seven concerns is breached in a short scene; the list is read forwards and backwards. Base: log of
        the mean probability of each concern, nats. The others: change against base. Top-1: agreement with the label
        of the scene (chance 14%)."""
    return section("Moral-foundation profile", why, panel("", map_figure(arms)) + stacked(table_of(head, rows)))


def geometry_section(summary: dict) -> str:
    head = (
        "round",
        "vector to first vector",
        "shift to vector",
        "shift since base to first vector",
        "KL to base, mean",
    )
    rows = []
    for index, r in enumerate(summary["rounds"]):
        keys = ("cos_first_vector", "cos_shift_vector", "cos_total_first")
        cosines = ("" if r.get(key) is None else f"{r[key]:+.2f}" for key in keys)
        nats = (f"{r[key]:.4f}" for key in ("kl_to_base_nats", "kl_to_base_rmse_nats"))
        rows.append((index, *cosines, *nats))
    why = """Cosines in the band: of the round's vector with the first one; of the shift that the round made in the
        student (mean over contexts, no persona) with its teacher's vector; of all shifts since base with the first
        vector. KL(student || base) per token of neutral text, nats, over all rounds so far."""
    return section("Geometry", why, table_of((*head, "rmse"), rows))
