"""A run as one page to send to a colleague, and as a diary to skim.

`build` reads a run folder and nothing else (no model, no torch), so the page can be rebuilt anywhere, also while the
run is still going: what is complete is shown. The page loads nothing from the network, and every text a model or a
user wrote is escaped before it gets near HTML.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from steer_heal.config import FIRED_FLOOR
from steer_heal.eval.intervals import relative
from steer_heal.eval.record import arms_record
from steer_heal.eval.verdict import COHERENCE
from steer_heal.evidence import (
    LOSSES,
    NOT_EXPRESSED,
    geometry_section,
    others_section,
    plain_section,
    profile_section,
    validity_section,
)
from steer_heal.figures import coherence_figure, dose_figure, heal_figure, shorten, trajectory_figure
from steer_heal.files import write_text
from steer_heal.markup import filled, folded, marked, panel, prose, safe, section, stacked, table_of, with_interval
from steer_heal.resume import opened

ROUND_FILES = ("dose.json", "completions.jsonl", "heal.jsonl", "steered.json", "healed.json", "geometry.json")
ARTEFACTS = ("vector", "dose.json", "completions.jsonl", "adapter")
ARTEFACTS += ("steered.json", "healed.json", "equal.json", "same_trait.json")
SHARES = {
    "answer_mass": "{:.3f}",
    "coherent_share": "{:.0%}",
    "looped_share": "{:.0%}",
    "styled_share": "{:.0%}",
    "canary_share": "{:.0%}",
}
COSTS = LOSSES | {"demo_looped": "looped share"}
SHOWN_COMPLETIONS, SHOWN_DEMOS = 160, 8  # a round's table; cards before the fold
DIARY_DEMOS, DIARY_CHARS = 4, 200


@dataclass(frozen=True)
class Round:
    """The artefacts of a complete round."""

    index: int
    dose: dict
    completions: list[dict]
    heal: list[dict]
    steered: dict
    healed: dict
    geometry: dict
    equal: dict | None
    same_trait: dict | None


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Of an unfinished run, `summary` has the arms measured so far."""

    config: dict
    title: str
    env: dict
    events: list[dict]
    base: dict | None
    rounds: list[Round]
    summary: dict
    status: str

    @property
    def name(self) -> str:
        title, rounds = self.title, self.config["rounds"]
        model, seed = self.config["model"]["path"], self.config["seed"]
        return f"{model}, trait “{title}”, {rounds} round{'s' * (rounds != 1)}, seed {seed}"


def build(folder: Path) -> Path:
    """Write report.html and diary.md into the run folder, from what it holds. Returns the path of the page."""
    run = load(folder)
    write_text(folder / "diary.md", diary(run))
    write_text(folder / "report.html", page(run))
    return folder / "report.html"


def load(folder: Path) -> Run:
    """Read a run folder. Rounds count when both their arms were measured; only config.json must be there."""
    folder = opened(folder)
    read = folder.read
    config, summary, *arms = map(read, ("config.json", "summary.json", "base.json", "prompted.json", "negative.json"))
    rounds = []
    for index in range(config["rounds"]):
        parts = [read(f"r{index:02d}/{name}") for name in ROUND_FILES]
        if None in parts:
            break
        rounds.append(Round(index, *parts, *(read(f"r{index:02d}/{name}.json") for name in ("equal", "same_trait"))))
    done = f"{len(rounds)} of {config['rounds']} rounds"
    status = f"unfinished: {done}" if not summary else f"ended after {done}" if summary.get("stopped") else ""
    plain = [read(f"plain/d{index}.json") for index in range(config["eval"]["plain_doses"])]
    summary = summary or arms_record(*arms, [*filter(None, plain)], [vars(r) for r in rounds])
    title = read("trait.json", {"title": config["trait"]})["title"]
    return Run(config, title, read("env.json", {}), folder.events(), arms[0], rounds, summary, status)


# ---- verdict


def verdict(run: Run) -> tuple[str, str]:
    """(plain sentences about the last round's healed student, its verdict in a word: see `verdict.verdict`)."""
    if not run.rounds:
        return "No round is complete yet: there is nothing to judge.", "unmoved"
    base, last, prompted = run.summary["base"], run.summary["rounds"][-1], run.summary["prompted"]
    healed, steered, equal = last["healed"], last["steered"], last.get("equal")
    word, why = last["verdict"]["word"], last["verdict"]["why"]
    over, (low, high) = healed["trait_over_base"], healed["trait_over_base_ci"]
    after = f"After round {run.rounds[-1].index} ({len(run.rounds)} of {run.config['rounds']})"
    within = f"95% interval {low:+.3f} to {high:+.3f}"
    if run.summary.get("stopped"):
        after = f"The loop ended early ({run.summary['stopped']}). {after}"
    stands = f"{after} the healed student stands {over:+.3f} {run.summary['unit']} over base ({within})"
    if word == "unreadable":
        return f"No verdict: {NOT_EXPRESSED} {stands}; that is not to be read as the trait.", word
    if low > 0:
        by_prompt, by_steering = _moves(prompted, over, "{:.1f} times"), _moves(steered, over, "{:.0%} of")
        stands += f". The system prompt alone moves it by {by_prompt}; steering in that round by {by_steering}"
        if equal:
            reach = f"{equal['trait_over_base']:+.3f} at dose {equal['dose']:.2f}"
            stands += f"; plain steering that costs no more coherence reaches {reach}"
        if "same_trait" in last:
            stands += f", and {_same_trait(last['same_trait'], base)}"
    lead = {"broken": f"Broken: {why}. ", "broad": f"Broad: {why}. "}.get(word, f"{word.capitalize()}. ")
    ppl_change = round(relative(healed["neutral_ppl"], base["neutral_ppl"]) - 1, 3) + 0.0  # no "-0.0%"
    held = f"Coherent share {healed['coherent_share']:.0%} of the demo answers (base {base['coherent_share']:.0%})"
    held += f", answer mass {relative(healed['answer_mass'], base['answer_mass']):.0%} of base, neutral perplexity"
    held += f" {ppl_change:+.1%} against base"
    if "canary_share" in healed:
        held += f", plain questions right {healed['canary_share']:.0%} (base {base['canary_share']:.0%})"
    return f"{lead}{stands}. {held}.", word


def _same_trait(arm: dict, base: dict) -> str:
    """What plain steering gives up to move the trait as far."""
    mass, coherent = (relative(arm[key], base[key]) for key in ("answer_mass", "coherent_share"))
    ppl = relative(arm["neutral_ppl"], base["neutral_ppl"]) - 1
    price = f"answer mass {mass:.0%} and coherent share {coherent:.0%} of base, neutral perplexity {ppl:+.0%}"
    if arm["reached"]:
        return f"to move the trait as far it needs dose {arm['dose']:.2f}: {price}"
    return f"no dose moves the trait as far; the nearest, {arm['dose']:.2f}, means {price}"


def _moves(arm: dict, over: float, ratio: str) -> str:
    """How far an arm moves the trait; the student in units of that where it is beyond its interval."""
    effect, (low, high) = arm["trait_over_base"], arm["trait_over_base_ci"]
    measurable = not low <= 0 <= high
    return f"{effect:+.3f}" + (f" (healed is {ratio.format(over / effect)} that)" if measurable else ", not measurably")


# ---- page


def page(run: Run) -> str:
    """The whole report.html."""
    sections = [arms_section(run)]
    if run.rounds:
        sections += [trajectory_section(run), plain_section(run.summary), coherence_section(run)]
        sections += [validity_section(run.summary), others_section(run.summary), profile_section(run.summary)]
        sections += [vector_section(run), geometry_section(run.summary)]
        sections += [dose_section(run), heal_section(run)]
        sections += [demo_section(run), filter_section(run)]
    sentences, kind = verdict(run)
    status = f'<p class="status">{run.status}</p>' if run.status else ""
    lead = f'{status}<p class="verdict {kind}">{safe(sentences)}</p>'
    return filled(safe(run.name), "\n".join(sections), lead, footer(run))


def arms_section(run: Run) -> str:
    arms = [(name, run.summary[name], "") for name in ("base", "prompted", "negative") if run.summary[name]]
    for index, r in enumerate(run.summary["rounds"]):
        arms += [(f"steered r{index}", r["steered"], f"{r['dose']:.2f}")]
        for key, name in (("equal", "equal cost"), ("same_trait", "equal trait")):
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
        loop nor fall apart by fixed limits (eval.judge); looped: that go round in circles; about itself: that narrate
        the persona or refuse, which is style, not damage. Questions right: plain questions of four answers.
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


def vector_section(run: Run) -> str:
    columns = {"layer": "{:d}", "depth": "{:.2f}", "relative_norm": "{:.2%}", "split_half": "{:.3f}", "auc": "{:.3f}"}
    names = ("block", "depth", "norm / residual stream", "cosine of two halves", "AUC on the other half")
    body = ""
    for index, r in enumerate(run.summary["rounds"]):
        if "layers" not in r:
            continue
        rows = [tuple(form.format(layer[key]) for key, form in columns.items()) for layer in r["layers"]]
        kinds = ["" if layer["steered"] else "dropped" for layer in r["layers"]]
        body += folded(f"Round {index}", table_of(names, rows, kinds))
    why = "What the vector is like, block by block: how long, how reliable, how well it tells the two personas apart."
    return section("Vector", why, body) if body else ""


def dose_section(run: Run) -> str:
    panels = []
    for r in run.rounds:
        columns = {"dose": "{:.2f}", "survival": "{:.0%}", "tail_ppl": "{:.1f}", "kl_p95": "{:.3g}"}
        columns = {key: form for key, form in columns.items() if key in r.dose["curve"][0]}
        rows = [(*(form.format(p[key]) for key, form in columns.items()), prose(p["example"])) for p in r.dose["curve"]]
        names = {"tail_ppl": "tail ppl", "kl_p95": "p95 KL, nats"}
        table = table_of((*(names.get(key, key) for key in columns), "example"), rows)
        panels.append(panel(f"Round {r.index}", dose_figure(r.dose), folded("Example text at each dose", table)))
    why = "The dose taken is the largest at which completions pass nearly as often as unsteered ones, or the dose of a "
    why += "given divergence. Hover a point for its text."
    return section("Dose", why, f'<div class="panels">{"".join(panels)}</div>')


def heal_section(run: Run) -> str:
    heal = run.config["heal"]
    head = ("round", "steps", "barrier fired", "anchor fired", "tau, nats", "median D, nats", "validation NLL, nats")
    rows, silent = [], []
    for r, sums in zip(run.rounds, run.summary["rounds"], strict=True):
        own, anchor, val_nll = (sums[key] for key in ("barrier_fired_share", "anchor_fired_share", "val_nll"))
        nats = (f"{sums[key]:.3g}" for key in ("tau_nats", "operating_kl_nats"))
        cells = f"{own:.0%}", f"{anchor:.0%}", *nats, "" if val_nll is None else f"{val_nll:.3f}"
        rows.append((r.index, len(r.heal), *cells))
        silent += [str(r.index)] * (max(own, anchor) < FIRED_FLOOR and heal["reg"] != "nll")
    held = "within the loop's budget" if heal["reference"] == "base" else "plain fine-tuning"
    why = f"Training of each round, in nats. D is the {heal['agg']} of {heal['reg']} over tokens; the barrier acts "
    why += "where D exceeds its tau (dotted), and diamonds mark the steps on which it fired."
    if silent:
        why += f" In round {', '.join(silent)} it fired on fewer than 5% of the steps: that was {held}."
    panels = "".join(panel(f"Round {r.index}", heal_figure(r.heal, heal)) for r in run.rounds)
    return section("Heal", why, f'<div class="panels">{panels}</div>{table_of(head, rows)}')


def demo_section(run: Run) -> str:
    cards = _demo_cards(run.base, run.rounds)
    body = f'<div class="cards">{"".join(cards[:SHOWN_DEMOS])}</div>'
    if rest := cards[SHOWN_DEMOS:]:
        body += folded(f"The other {len(rest)} prompts", f'<div class="cards">{"".join(rest)}</div>')
    why = """Greedy answers, round by round. Marked: what differs from the answer before. A label names why the filter
        would drop an answer."""
    return section("Answers side by side", why, body)


def _demo_cards(base: dict, rounds: list[Round]) -> list[str]:
    """One card a prompt: base, the student after every round, and the last round's steered teacher."""
    cards = []
    for number, first in enumerate(base["demos"]):
        before, rows = first, [_voice("base", first, prose(first["text"]))]
        for r in rounds:
            now = r.healed["demos"][number]
            rows.append(_voice(f"healed r{r.index}", now, marked(before["text"], now["text"])))
            before = now
        steered = rounds[-1].steered["demos"][number]
        rows.append(_voice(f"steered r{rounds[-1].index}", steered, prose(steered["text"])))
        cards.append(f"<article><h3>{safe(first['prompt'])}</h3>{''.join(rows)}</article>")
    return cards


def _voice(name: str, answer: dict, text: str) -> str:
    return f'<div class="voice"><span class="arm {name.split()[0]}">{name}</span> {_dropped(answer)}{text}</div>'


def filter_section(run: Run) -> str:
    counts = [Counter(c["dropped"] or "kept" for c in r.completions) for r in run.rounds]
    reasons = sorted(set().union(*counts) - {"kept"})
    rows = [
        (r.index, len(r.completions), *(count[reason] for reason in ["kept", *reasons]))
        for r, count in zip(run.rounds, counts, strict=True)
    ]
    body = table_of(("round", "completions", "kept", *map(safe, reasons)), rows)
    for r in run.rounds:
        shown = r.completions[:SHOWN_COMPLETIONS]
        kinds = ["dropped" if c["dropped"] else "kept" for c in shown]
        marks = [_dropped(c) or '<span class="kept">kept</span>' for c in shown]
        rows = [
            (prose(c["prompt"]), prose(c["text"]), f"{c['dose']:.2f}", f"{c['incoherence']:+.1f}", mark)
            for c, mark in zip(shown, marks, strict=True)
        ]
        table = table_of(("prompt", "completion", "dose", "log-odds broken", "filter"), rows, kinds)
        body += folded(f"{len(shown)} of {len(r.completions)} completions of round {r.index}", table)
    why = "What the steered teacher wrote and why the filter dropped it. Only what is kept is trained on."
    search = '<p><input class="search" type="search" placeholder="search prompts, texts and reasons" hidden></p>'
    return section("Kept and dropped", why, search + body)


def footer(run: Run) -> str:
    """How the run was made and what it cost."""
    env, peak = run.env, run.summary.get("peak_memory_bytes")
    parts = [f"<p><code>{safe(shlex.join(['steer-heal', *e['argv']]))}</code></p>" for e in run.events if "argv" in e]
    if env:
        packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
        machine = f"{env['cpus']} CPUs, {env['threads']} threads, GPU {env['gpu'] or 'none'}; {env['platform']}"
        parts.append(f"<p>{safe(machine)}, Python {safe(env['python'])}, {safe(packages)}</p>")
    seconds = {e["artefact"]: e["seconds"] for e in run.events if e["event"] == "stage"}
    if seconds:
        spent = [[seconds.get(f"r{r.index:02d}/{name}", 0.0) for name in ARTEFACTS] for r in run.rounds]
        rows = [(i, *(f"{s:.1f}" for s in row), f"{sum(row):.1f}") for i, row in enumerate(spent)]
        head = ("seconds", "extract", "dose", "distil", "heal", "eval steered", "eval healed")
        head += ("eval equal", "eval same trait", "round")
        parts.append(table_of(head, rows))
        parts.append(f"<p>{sum(seconds.values()):.1f} s in all stages, baselines included.</p>")
    if peak:
        parts.append(f"<p>Peak memory {peak / 1e6:.0f} MB.</p>")
    return "\n".join([*parts, folded("config.json", f"<pre>{safe(json.dumps(run.config, indent=1))}</pre>")])


def _dropped(judged: dict) -> str:
    return f'<span class="dropped">{safe(judged["dropped"])}</span>' if judged["dropped"] else ""


# ---- diary


def diary(run: Run) -> str:
    """The run in words, round by round: the numbers, then how the same prompts are answered."""
    parts = [f"# {_markdown(run.name)}" + (f" ({run.status})" if run.status else ""), verdict(run)[0]]
    anchored = "" if run.config["heal"]["anchor"] == "none" else ", its anchor on {:.0%}"
    for r, arms in zip(run.rounds, run.summary["rounds"], strict=True):
        steered, healed, base = arms["steered"], arms["healed"], run.summary["base"]
        low, high = healed["trait_over_base_ci"]
        parts += [
            f"## Round {r.index}",
            f"Steered at dose {arms['dose']:.2f}, the teacher stands {steered['trait_over_base']:+.3f} nats/token over "
            f"base; {arms['kept']} of its {arms['generated']} completions were kept. The barrier fired on "
            f"{arms['barrier_fired_share']:.0%} of {len(r.heal)} steps (median D {arms['operating_kl_nats']:.3g} nats)"
            f"{anchored.format(arms['anchor_fired_share'])}. "
            f"The healed student stands {healed['trait_over_base']:+.3f} [{low:+.3f}, {high:+.3f}], answer mass "
            f"{healed['answer_mass']:.3f} (base {base['answer_mass']:.3f}), coherent {healed['coherent_share']:.0%} "
            f"(base {base['coherent_share']:.0%}), neutral perplexity {healed['neutral_ppl']:.2f} (base "
            f"{base['neutral_ppl']:.2f}).",
        ]
        for answers in list(zip(run.base["demos"], r.steered["demos"], r.healed["demos"], strict=True))[:DIARY_DEMOS]:
            said = zip(("base", "steered", "healed"), answers, strict=True)
            lines = [f"- {name}: {_markdown(answer['text']) or '(nothing)'}" for name, answer in said]
            parts.append("\n".join([f"**{_markdown(answers[0]['prompt'])}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """A line of text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", shorten(text, DIARY_CHARS))
