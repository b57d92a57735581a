"""The report's sections on why its numbers may be believed, and on what else moved."""

from __future__ import annotations

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.opponents import LEAST_COST
from steer_heal.figures import frontier_figure, map_figure
from steer_heal.markup import panel, prose, section, stacked, table_of, with_interval

NOT_EXPRESSED = (
    "this model cannot express this trait on this instrument (the positive persona as a system prompt does not score "
    "above the negative one by more than the interval)."
)


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


LOSSES = {
    "mass": "answer mass",
    "demo_coherent": "coherent share",
    "canary": "questions right",
    "canary_log_odds": "right, log-odds",
    "neutral_nll": "log neutral perplexity",
}


def plain_section(summary: dict) -> str:
    """The student against the base plainly steered: at equal cost, and at equal trait."""
    if not summary["plain"]:
        return ""
    rows = []
    for index, r in enumerate(summary["rounds"]):
        for key, name in (("equal", "equal cost"), ("same_trait", "equal trait")):
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
