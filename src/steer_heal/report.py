"""A run as one page to send to a colleague, and as a diary to skim.

`build` reads a run folder and nothing else (no model, no torch), so the page can be rebuilt anywhere, also while the
run is still going: what is complete is shown. The page loads nothing from the network, and every text a model or a
user wrote is escaped before it gets near HTML.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from steer_heal.bootstrap import fired_shares, trait_over
from steer_heal.config import FIRED_FLOOR
from steer_heal.data import HERE
from steer_heal.figures import (
    coherence_figure,
    dose_figure,
    heal_figure,
    relative,
    shorten,
    trajectory_figure,
)
from steer_heal.rundir import RunDir, read_jsonl

COHERENCE = (  # key, name, bound of value / base, side of it that is damage
    ("demo_kept_share", "coherent share", 0.95, -1),
    ("answer_mass", "answer mass", 0.85, -1),
    ("neutral_ppl", "neutral perplexity", 1.05, +1),
)
ROUND_FILES = ("dose.json", "completions.jsonl", "heal.jsonl", "steered.json", "healed.json")
ARTEFACTS = ("vector", "dose.json", "completions.jsonl", "adapter", "steered.json", "healed.json")
SHOWN_COMPLETIONS, SHOWN_DEMOS = 100, 8  # a round's table; cards before the fold
DIARY_DEMOS, DIARY_CHARS = 4, 200
PLOT_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": "hover", "modeBarButtons": [["toImage"]]}


@dataclass(frozen=True)
class Round:
    """The artefacts of a complete round."""

    index: int
    dose: dict
    completions: list[dict]
    heal: list[dict]
    steered: dict
    healed: dict


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
    RunDir(folder).replace_text("diary.md", diary(run))
    RunDir(folder).replace_text("report.html", page(run))
    return folder / "report.html"


def load(folder: Path) -> Run:
    """Read a run folder. Rounds count when both their arms were measured; only config.json must be there."""

    def read(name: str, missing: Any = None) -> Any:
        path = folder / name
        if not path.exists():
            return missing
        return read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text("utf-8"))

    config, base, prompted, summary = map(read, ("config.json", "base.json", "prompted.json", "summary.json"))
    rounds = []
    for index in range(config["rounds"]):
        parts = [read(f"r{index:02d}/{name}") for name in ROUND_FILES]
        if None in parts:
            break
        rounds.append(Round(index, *parts))
    status = "" if summary else f"unfinished: {len(rounds)} of {config['rounds']} rounds"
    summary = summary or _summary_so_far(base, prompted, rounds)
    title = read("trait.json", {"title": config["trait"]})["title"]
    return Run(config, title, read("env.json", {}), read("events.jsonl", []), base, rounds, summary, status)


def _summary_so_far(base: dict | None, prompted: dict | None, rounds: list[Round]) -> dict:
    """What summary.json will hold of the arms and rounds."""
    return {
        "base": base and {**base, **trait_over(base, base)},
        "prompted": prompted and {**prompted, **trait_over(prompted, base)},
        "rounds": [
            {
                "dose": r.dose["dose"],
                "generated": len(r.completions),
                "kept": sum(not c["dropped"] for c in r.completions),
                "steered": {**r.steered, **trait_over(r.steered, base)},
                "healed": {**r.healed, **trait_over(r.healed, base)},
                **fired_shares(r.heal),
                "tau_nats": r.heal[0]["tau"],
                "operating_kl_nats": statistics.median(record["divergence"] for record in r.heal),
                "val_nll": r.heal[-1].get("val_nll"),
            }
            for r in rounds
        ],
    }


# ---- verdict


def verdict(run: Run) -> tuple[str, str]:
    """(plain sentences about the last round's healed student, "moved" | "unmoved" | "damaged")."""
    if not run.rounds:
        return "No round is complete yet: there is nothing to judge.", "unmoved"
    base, last = run.summary["base"], run.summary["rounds"][-1]
    healed, steered, prompted = last["healed"], last["steered"], run.summary["prompted"]
    over, ci = healed["trait_over_base"], healed["trait_over_base_ci"]
    moved = not ci[0] <= 0 <= ci[1]
    after = f"After round {run.rounds[-1].index} ({len(run.rounds)} of {run.config['rounds']})"
    measured = f"{over:+.3f} nats/token over base (95% interval {ci[0]:+.3f} to {ci[1]:+.3f})"
    if moved:
        way = "" if over > 0 else ", away from the trait"
        by_prompt = _compared(over, prompted, "{:.1f} times the effect of the system prompt", "the system prompt alone")
        by_steering = _compared(over, steered, "{:.0%} of that round's steered movement", "that round's steering")
        first = f"{after} the healed student stands {measured}{way}: {by_prompt}, {by_steering}."
    else:
        first = f"{after} the trait did not move: the healed student stands {measured}, an interval that contains zero."
    damaged = [name for key, name, bound, side in COHERENCE if side * healed[key] > side * bound * base[key]]
    held = f"It is damaged in {' and '.join(damaged)}" if damaged else "Coherence held"
    shares = "coherent share {:.0%} of the demo answers (base {:.0%})"
    mass, ppl = (relative(healed[key], base[key]) for key in ("answer_mass", "neutral_ppl"))
    ppl_change = round(ppl - 1, 3) + 0.0  # no "-0.0%"
    second = f"{held}: {shares}, answer mass {mass:.0%} of base, neutral perplexity {ppl_change:+.1%} against base."
    second = second.format(healed["demo_kept_share"], base["demo_kept_share"])
    return f"{first} {second}", "damaged" if damaged else "moved" if moved else "unmoved"


def _compared(over: float, arm: dict, ratio: str, subject: str) -> str:
    """The movement in units of another arm's, where that arm has one beyond its interval."""
    effect = arm["trait_over_base"]
    if arm["trait_over_base_ci"][0] <= 0 <= arm["trait_over_base_ci"][1]:
        return f"while {subject} did not move it measurably ({effect:+.3f})"
    return f"{ratio.format(over / effect)} ({effect:+.3f})"


# ---- page


def page(run: Run) -> str:
    """The whole report.html."""
    sections = [arms_section(run)]
    if run.rounds:
        sections += [trajectory_section(run), coherence_section(run), vector_section(run)]
        sections += [dose_section(run), heal_section(run)]
        sections += [demo_section(run), filter_section(run)]
    sentences, kind = verdict(run)
    parts = {"title": _text(run.name), "kind": kind, "verdict": _text(sentences), "sections": "\n".join(sections)}
    status = f'<p class="status">{run.status}</p>' if run.status else ""
    template = Template((HERE / "report.html").read_text("utf-8"))
    scripts = {"plotlyjs": get_plotlyjs(), "config": json.dumps(PLOT_CONFIG)}
    return template.substitute(parts, **scripts, status=status, footer=footer(run))


def arms_section(run: Run) -> str:
    arms = [(name, run.summary[name], "") for name in ("base", "prompted") if run.summary[name]]
    for index, r in enumerate(run.summary["rounds"]):
        arms += [(f"steered r{index}", r["steered"], f"{r['dose']:.2f}"), (f"healed r{index}", r["healed"], "")]
    head = ("arm", "trait, nats/token", "over base", "answer mass", "coherent", "demo ppl", "neutral ppl", "dose")
    rows = []
    for name, arm, dose in arms:
        over = _with_interval(arm["trait_over_base"], arm["trait_over_base_ci"]) if name != "base" else ""
        shares = f"{arm['answer_mass']:.3f}", f"{arm['demo_kept_share']:.0%}"
        ppl = f"{arm['demo_ppl']:.2f}", f"{arm['neutral_ppl']:.2f}"
        trait = _with_interval(arm["trait_nats"], arm["trait_ci"])
        rows.append((f'<span class="arm {name.split()[0]}">{name}</span>', trait, over, *shares, *ppl, dose))
    why = """Every arm on the same items, with 95% bootstrap intervals. Trait: log-probability per token of the answer
        with the trait minus that of its opposite. Answer mass: probability of yes and no in yes/no questions. Coherent:
        share of free answers that pass the filter. Perplexities of those answers and of neutral text."""
    return _section("Arms", why, _table(head, rows) if rows else "<p>No arm has been measured yet.</p>")


def trajectory_section(run: Run) -> str:
    why = "How far each round moved the trait. A run that works climbs with the rounds. Bars and bands: 95% intervals."
    return _section("Trajectory", why, _panel("", trajectory_figure(run.summary)))


def coherence_section(run: Run) -> str:
    panels = [_panel(name, coherence_figure(run.summary, key, bound)) for key, name, bound, _ in COHERENCE]
    why = "Relative to base (solid line); beyond the dotted line we call it damage. Healed should stay near 100%."
    return _section("Coherence", why, f'<div class="panels three">{"".join(panels)}</div>')


def vector_section(run: Run) -> str:
    columns = {"layer": "{:d}", "depth": "{:.2f}", "relative_norm": "{:.2%}", "split_half": "{:.3f}", "auc": "{:.3f}"}
    names = ("block", "depth", "norm / residual stream", "cosine of two halves", "AUC on the other half")
    body = ""
    for index, r in enumerate(run.summary["rounds"]):
        if "layers" not in r:
            continue
        rows = [tuple(form.format(layer[key]) for key, form in columns.items()) for layer in r["layers"]]
        kinds = ["" if layer["steered"] else "dropped" for layer in r["layers"]]
        body += _details(f"Round {index}", _table(names, rows, kinds))
    why = "What the vector is like, block by block: how long, how reliable, how well it tells the two personas apart."
    return _section("Vector", why, body) if body else ""


def dose_section(run: Run) -> str:
    panels = []
    for r in run.rounds:
        columns = {"dose": "{:.2f}", "survival": "{:.0%}", "tail_ppl": "{:.1f}", "kl_p95": "{:.3g}"}
        columns = {key: form for key, form in columns.items() if key in r.dose["curve"][0]}
        rows = [
            (*(form.format(p[key]) for key, form in columns.items()), _prose(p["example"])) for p in r.dose["curve"]
        ]
        names = {"tail_ppl": "tail ppl", "kl_p95": "p95 KL, nats"}
        table = _table((*(names.get(key, key) for key in columns), "example"), rows)
        panels.append(_panel(f"Round {r.index}", dose_figure(r.dose), _details("Example text at each dose", table)))
    why = "The dose taken is the largest at which completions pass nearly as often as unsteered ones, or the dose of a "
    why += "given divergence. Hover a point for its text."
    return _section("Dose", why, f'<div class="panels">{"".join(panels)}</div>')


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
    why = f"Training of each round, in nats. D is the {heal['agg']} of {heal['reg']} over tokens; the barrier acts "
    why += "where D exceeds its tau (dotted), and diamonds mark the steps on which it fired."
    if silent:
        why += f" In round {', '.join(silent)} it fired on fewer than 5% of the steps: that was plain fine-tuning."
    panels = "".join(_panel(f"Round {r.index}", heal_figure(r.heal, heal)) for r in run.rounds)
    return _section("Heal", why, f'<div class="panels">{panels}</div>{_table(head, rows)}')


def demo_section(run: Run) -> str:
    last, *earlier = reversed(run.rounds)
    cards = _demo_cards(run.base, last)
    body = "".join(cards[:SHOWN_DEMOS])
    if rest := cards[SHOWN_DEMOS:]:
        body += _details(f"The other {len(rest)} prompts after round {last.index}", "".join(rest))
    for r in earlier:
        body += _details(f"All answers after round {r.index}", "".join(_demo_cards(run.base, r)))
    why = f"Greedy answers of round {last.index}. A label names why the filter would drop the answer."
    return _section("Answers side by side", why, body)


def _demo_cards(base: dict, r: Round) -> list[str]:
    cards = []
    for answers in zip(base["demos"], r.steered["demos"], r.healed["demos"], strict=True):
        named = zip(("base", "steered", "healed"), answers, strict=True)
        said = [f'<span class="arm {n}">{n}</span> {_dropped(a)}{_prose(a["text"])}' for n, a in named]
        columns = "".join(f"<div>{answer}</div>" for answer in said)
        cards.append(f'<article><h3>{_text(answers[0]["prompt"])}</h3><div class="answers">{columns}</div></article>')
    return cards


def filter_section(run: Run) -> str:
    counts = [Counter(c["dropped"] or "kept" for c in r.completions) for r in run.rounds]
    reasons = sorted(set().union(*counts) - {"kept"})
    rows = [
        (r.index, len(r.completions), *(count[reason] for reason in ["kept", *reasons]))
        for r, count in zip(run.rounds, counts, strict=True)
    ]
    body = _table(("round", "completions", "kept", *map(_text, reasons)), rows)
    for r in run.rounds:
        shown = r.completions[:SHOWN_COMPLETIONS]
        kinds = ["dropped" if c["dropped"] else "kept" for c in shown]
        marks = [_dropped(c) or '<span class="kept">kept</span>' for c in shown]
        rows = [
            (_prose(c["prompt"]), _prose(c["text"]), f"{c['dose']:.2f}", f"{c['incoherence']:+.1f}", mark)
            for c, mark in zip(shown, marks, strict=True)
        ]
        table = _table(("prompt", "completion", "dose", "log-odds broken", "filter"), rows, kinds)
        body += _details(f"{len(shown)} of {len(r.completions)} completions of round {r.index}", table)
    why = "What the steered teacher wrote and why the filter dropped it. Only what is kept is trained on."
    return _section("Kept and dropped", why, body)


def footer(run: Run) -> str:
    """How the run was made and what it cost."""
    env, peak = run.env, run.summary.get("peak_memory_bytes")
    parts = [f"<p><code>{_text(shlex.join(['steer-heal', *e['argv']]))}</code></p>" for e in run.events if "argv" in e]
    if env:
        packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
        machine = f"{env['cpus']} CPUs, {env['threads']} threads, GPU {env['gpu'] or 'none'}; {env['platform']}"
        parts.append(f"<p>{_text(machine)}, Python {_text(env['python'])}, {_text(packages)}</p>")
    seconds = {e["artefact"]: e["seconds"] for e in run.events if e["event"] == "stage"}
    if seconds:
        spent = [[seconds.get(f"r{r.index:02d}/{name}", 0.0) for name in ARTEFACTS] for r in run.rounds]
        rows = [(i, *(f"{s:.1f}" for s in row), f"{sum(row):.1f}") for i, row in enumerate(spent)]
        head = ("seconds", "extract", "dose", "distil", "heal", "eval steered", "eval healed", "round")
        parts.append(_table(head, rows))
        parts.append(f"<p>{sum(seconds.values()):.1f} s in all stages, baselines included.</p>")
    if peak:
        parts.append(f"<p>Peak memory {peak / 1e6:.0f} MB.</p>")
    return "\n".join([*parts, _details("config.json", f"<pre>{_text(json.dumps(run.config, indent=1))}</pre>")])


def _section(title: str, why: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="why">{why}</p>{body}</section>'


def _panel(title: str, fig: go.Figure, more: str = "") -> str:
    heading = f"<h3>{title}</h3>" if title else ""
    place = f'<div class="figure" style="height:{fig.layout.height}px"></div>'
    drawn = fig.to_json().replace("<", "\\u003c")  # or a text could end the script
    data = f'<script type="application/json">{drawn}</script>'
    return f'<div class="panel">{heading}{place}{data}{more}</div>'


def _table(head: Iterable[str], rows: Iterable[Sequence], kinds: Sequence[str] = ()) -> str:
    """A table of cells that are numbers or HTML; `kinds` are the classes of its rows."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    marked = zip(kinds, lines, strict=True) if kinds else (("", line) for line in lines)
    body = "".join(f'<tr class="{kind}">{line}</tr>' for kind, line in marked)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _dropped(judged: dict) -> str:
    return f'<span class="dropped">{_text(judged["dropped"])}</span>' if judged["dropped"] else ""


def _prose(text: str) -> str:
    return f'<p class="prose">{_text(text)}</p>' if text.strip() else '<p class="prose nothing">(nothing)</p>'


def _text(text: str) -> str:
    """Any text as HTML: markup escaped, control characters (random models write them) made visible."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text))


def _with_interval(value: float, ci: Sequence[float]) -> str:
    return f'{value:+.3f} <span class="ci">[{ci[0]:+.3f}, {ci[1]:+.3f}]</span>'


# ---- diary


def diary(run: Run) -> str:
    """The run in words, round by round: the numbers, then how the same prompts are answered."""
    parts = [f"# {_markdown(run.name)}" + (f" ({run.status})" if run.status else ""), verdict(run)[0]]
    for r, arms in zip(run.rounds, run.summary["rounds"], strict=True):
        steered, healed, base = arms["steered"], arms["healed"], run.summary["base"]
        low, high = healed["trait_over_base_ci"]
        parts += [
            f"## Round {r.index}",
            f"Steered at dose {arms['dose']:.2f}, the teacher stands {steered['trait_over_base']:+.3f} nats/token over "
            f"base; {arms['kept']} of its {arms['generated']} completions were kept. The barrier fired on "
            f"{arms['barrier_fired_share']:.0%} of {len(r.heal)} steps (median D {arms['operating_kl_nats']:.3g}). "
            f"The healed student stands {healed['trait_over_base']:+.3f} [{low:+.3f}, {high:+.3f}], answer mass "
            f"{healed['answer_mass']:.3f} (base {base['answer_mass']:.3f}), coherent {healed['demo_kept_share']:.0%} "
            f"(base {base['demo_kept_share']:.0%}), neutral perplexity {healed['neutral_ppl']:.2f} (base "
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
