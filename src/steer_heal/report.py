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
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from steer_heal.rundir import RunDir, read_jsonl

# Okabe-Ito hues: told apart by colour-blind readers, visible on white and on black.
COLOURS = {"base": "#808890", "prompted": "#c88a04", "steered": "#d55e00", "healed": "#009e73"}
DIVERGENCE_COLOUR, ANCHOR_COLOUR = "#4a8fd0", "#b06fae"
COHERENCE = (  # key, name, bound of value / base, side of it that is damage
    ("demo_kept_share", "coherent share", 0.95, -1),
    ("answer_mass", "answer mass", 0.85, -1),
    ("neutral_ppl", "neutral perplexity", 1.05, +1),
)
ROUND_FILES = ("dose.json", "completions.jsonl", "heal.jsonl", "steered.json", "healed.json")
ARTEFACTS = ("vector.safetensors", "dose.json", "completions.jsonl", "adapter", "steered.json", "healed.json")
BOOTSTRAP, BOOTSTRAP_SEED = 10_000, 20260606  # as in eval.py, so that an unfinished run shows its final intervals
FIRED_FLOOR = 0.05  # as in summary.py: a barrier that fires less often holds nothing back
SHOWN_COMPLETIONS, SHOWN_DEMOS = 100, 8  # a round's table; cards before the fold
DIARY_DEMOS, DIARY_CHARS, HOVER_CHARS, HOVER_WIDTH = 4, 200, 300, 44
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
        "base": base and _over_base(base, base),
        "prompted": prompted and _over_base(prompted, base),
        "rounds": [
            {
                "dose": r.dose["dose"],
                "generated": len(r.completions),
                "kept": sum(not c["dropped"] for c in r.completions),
                "steered": _over_base(r.steered, base),
                "healed": _over_base(r.healed, base),
                "barrier_fired_share": sum(record["fired"] for record in r.heal) / len(r.heal),
                "operating_kl_nats": statistics.median(record["divergence"] for record in r.heal),
                "val_nll": r.heal[-1].get("val_nll"),
            }
            for r in rounds
        ],
    }


def _over_base(arm: dict, base: dict) -> dict:
    """The arm with its paired difference to base and the bootstrap interval of that (eval.py's, without torch)."""
    change = np.array(arm["items"]["contrast"]) - np.array(base["items"]["contrast"])
    draw = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(change), (BOOTSTRAP, len(change)))
    low, high = np.quantile(change[draw].mean(1), (0.025, 0.975))
    return {**arm, "trait_over_base": float(change.mean()), "trait_over_base_ci": [float(low), float(high)]}


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
    mass, ppl = (_relative(healed[key], base[key]) for key in ("answer_mass", "neutral_ppl"))
    second = f"{held}: {shares}, answer mass {mass:.0%} of base, neutral perplexity {ppl - 1:+.1%} against base."
    second = second.format(healed["demo_kept_share"], base["demo_kept_share"])
    return f"{first} {second}", "damaged" if damaged else "moved" if moved else "unmoved"


def _compared(over: float, arm: dict, ratio: str, subject: str) -> str:
    """The movement in units of another arm's, where that arm has one beyond its interval."""
    effect = arm["trait_over_base"]
    if arm["trait_over_base_ci"][0] <= 0 <= arm["trait_over_base_ci"][1]:
        return f"while {subject} did not move it measurably ({effect:+.3f})"
    return f"{ratio.format(over / effect)} ({effect:+.3f})"


def _relative(value: float, base: float) -> float:
    """value / base; NaN where the base has none, as random models may."""
    return value / base if base else float("nan")


# ---- figures


def trajectory_figure(summary: dict) -> go.Figure:
    """Trait over base per round; base and prompted as reference lines."""
    fig = go.Figure()
    ends = [-0.4, len(summary["rounds"]) - 0.6]
    for name, dash in (("base", "solid"), ("prompted", "dot")):
        y, (low, high) = summary[name]["trait_over_base"], summary[name]["trait_over_base_ci"]
        label = f"{name} {y:+.3f} [{low:+.3f}, {high:+.3f}]<extra></extra>"
        _line(fig, ends, [y, y], COLOURS[name], name, dash, hovertemplate=label)
        fig.add_hrect(y0=low, y1=high, fillcolor=COLOURS[name], opacity=0.13, line_width=0, layer="below")
    for name, shift in (("steered", -0.03), ("healed", 0.03)):  # side by side, or the error bars hide each other
        arms = [r[name] for r in summary["rounds"]]
        y = np.array([a["trait_over_base"] for a in arms])
        low, high = np.array([a["trait_over_base_ci"] for a in arms]).T
        bars = {"array": (high - y).tolist(), "arrayminus": (y - low).tolist(), "thickness": 1.3, "width": 4}
        label = f"round %{{customdata[0]}} {name} %{{y:+.3f}} [%{{customdata[1]:+.3f}}, %{{customdata[2]:+.3f}}]"
        hover = {"customdata": [[i, *a["trait_over_base_ci"]] for i, a in enumerate(arms)]}
        hover["hovertemplate"] = f"{label}<extra></extra>"
        _arm(fig, [i + shift for i in range(len(arms))], y.tolist(), name, error_y=bars, **hover)
    fig.update_xaxes(title="round", tickvals=list(range(len(summary["rounds"]))), range=ends)
    fig.update_yaxes(title="trait over base, nats/token")
    return _styled(fig, 400)


def coherence_figure(summary: dict, key: str, bound: float) -> go.Figure:
    """One coherence measure relative to base, with the bound beyond which we call it damage."""
    fig = go.Figure()
    rounds = list(range(len(summary["rounds"])))
    ends = [-0.4, len(rounds) - 0.6]
    for arm in ("steered", "healed"):
        shares = [_relative(r[arm][key], summary["base"][key]) for r in summary["rounds"]]
        _arm(fig, rounds, shares, arm, hovertemplate=f"round %{{x}} {arm} %{{y:.1%}} of base<extra></extra>")
    for level, dash in ((1, "solid"), (bound, "dot")):
        _line(fig, ends, [level] * 2, COLOURS["base"], "", dash, 1.5, showlegend=False, hoverinfo="skip")
    fig.update_xaxes(title="round", tickvals=rounds, range=ends)
    fig.update_yaxes(title="% of base", tickformat=".0%", rangemode="tozero")
    return _styled(fig, 300)


def dose_figure(dose: dict) -> go.Figure:
    """Survival of the filter against the dose: raw shares, monotone fit, target, the dose chosen."""
    curve, chosen, target = dose["curve"], dose["dose"], dose["target"]
    doses, survival, fitted = ([p[key] for p in curve] for key in ("dose", "survival", "fitted"))
    fig = go.Figure()
    _line(fig, doses, fitted, COLOURS["steered"], "monotone fit", hoverinfo="skip")
    _line(fig, [doses[0], doses[-1]], [target] * 2, COLOURS["base"], f"target {target:.0%}", "dot", hoverinfo="skip")
    _line(fig, [chosen] * 2, [0, 1], COLOURS["base"], f"chosen {chosen:.2f}", "dash", hoverinfo="skip")
    label = "dose %{x:.2f}: %{y:.0%} survive, tail ppl %{customdata[0]}<br><br>%{customdata[1]}<extra></extra>"
    hover = {"customdata": [(f"{p['tail_ppl']:.1f}", _hover_text(p["example"])) for p in curve], "hovertemplate": label}
    dots = {"color": COLOURS["steered"], "size": 9}
    fig.add_scatter(x=doses, y=survival, mode="markers", marker=dots, name="survival", **hover)
    fig.update_xaxes(title="dose, multiples of the raw vector", type="log")
    fig.update_xaxes(tickvals=doses, ticktext=[f"{d:.2g}" for d in doses])
    fig.update_yaxes(title="survival", tickformat=".0%", range=[-0.03, 1.07])
    return _styled(fig, 340)


def heal_figure(records: list[dict], heal: dict) -> go.Figure:
    """Objective above, divergence below with its tau; a diamond where the barrier fired."""
    fig = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    steps = [r["step"] for r in records]
    below = {"row": 2, "col": 1}
    _line(fig, steps, [r["objective"] for r in records], COLOURS["base"], "objective", row=1, col=1)
    series = [("divergence", "tau", "D", DIVERGENCE_COLOUR)] * (heal["reg"] != "nll")
    series += [("anchor_divergence", "anchor_tau", "D anchor", ANCHOR_COLOUR)] * ("anchor_divergence" in records[0])
    for key, bound, name, colour in series:
        _line(fig, steps, [r[key] for r in records], colour, name, **below)
        _line(fig, [0, steps[-1]], [heal[bound]] * 2, colour, f"{bound} {heal[bound]:g}", "dot", 1.5, **below)
    fired = [r for r in records if r["fired"]]
    diamonds = {"color": DIVERGENCE_COLOUR, "size": 8, "symbol": "diamond"}
    x, y = ([r[key] for r in fired] for key in ("step", "divergence"))
    fig.add_scatter(x=x, y=y, mode="markers", marker=diamonds, name="barrier fired", hoverinfo="skip", **below)
    fig.update_xaxes(title="step", **below)
    fig.update_yaxes(title="objective", row=1, col=1)
    fig.update_yaxes(title="D", rangemode="tozero", **below)
    return _styled(fig, 440)


def _line(
    fig: go.Figure, x: list, y: list, colour: str, name: str, dash: str = "solid", width: float = 2, **more: Any
) -> None:
    line = {"color": colour, "dash": dash, "width": width}
    fig.add_scatter(**{"x": x, "y": y, "name": name, "mode": "lines", "line": line, "cliponaxis": False, **more})


def _arm(fig: go.Figure, x: list, y: list, name: str, **more: Any) -> None:
    """An arm per round; dash and symbol differ too, for readers who do not see the hues."""
    dash, symbol = {"steered": ("dash", "square"), "healed": ("solid", "circle")}[name]
    _line(fig, x, y, COLOURS[name], name, dash, 2.5, mode="lines+markers", marker={"size": 8, "symbol": symbol}, **more)


def _styled(fig: go.Figure, height: int) -> go.Figure:
    """No background and neutral ink: the page's style sheet colours the text for light and dark."""
    clear, grid = "rgba(0,0,0,0)", "rgba(128,136,144,0.22)"
    font = {"family": "system-ui, sans-serif", "size": 13, "color": COLOURS["base"]}
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    fig.update_layout(template="none", paper_bgcolor=clear, plot_bgcolor=clear, font=font, legend=legend)
    fig.update_layout(height=height, margin={"l": 62, "r": 12, "t": 40, "b": 48}, dragmode=False, hovermode="closest")
    fig.update_layout(hoverlabel={"align": "left", "font": {"size": 12}, "namelength": -1})
    fig.update_layout(modebar={"bgcolor": clear, "color": COLOURS["base"], "activecolor": COLOURS["base"]})
    fig.update_xaxes(gridcolor=grid, zeroline=False, fixedrange=True)
    return fig.update_yaxes(gridcolor=grid, zeroline=False, fixedrange=True, title_standoff=8, automargin=True)


def _hover_text(text: str) -> str:
    """Shortened, wrapped and escaped: plotly reads a subset of HTML in hover texts."""
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(_shorten(text, HOVER_CHARS), HOVER_WIDTH))


# ---- page


def page(run: Run) -> str:
    """The whole report.html."""
    sections = [arms_section(run)]
    if run.rounds:
        sections += [trajectory_section(run), coherence_section(run), dose_section(run), heal_section(run)]
        sections += [demo_section(run), filter_section(run)]
    sentences, kind = verdict(run)
    parts = {"title": _text(run.name), "kind": kind, "verdict": _text(sentences), "sections": "\n".join(sections)}
    status = f'<p class="status">{run.status}</p>' if run.status else ""
    return PAGE.substitute(parts, style=STYLE, draw=DRAW, plotlyjs=get_plotlyjs(), status=status, footer=footer(run))


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


def dose_section(run: Run) -> str:
    panels = []
    for r in run.rounds:
        scores = [(f"{p['dose']:.2f}", f"{p['survival']:.0%}", f"{p['tail_ppl']:.1f}") for p in r.dose["curve"]]
        rows = [(*cells, _prose(p["example"])) for cells, p in zip(scores, r.dose["curve"], strict=True)]
        table = _table(("dose", "survival", "tail ppl", "example"), rows)
        panels.append(_panel(f"Round {r.index}", dose_figure(r.dose), _details("Example text at each dose", table)))
    why = "The dose taken is the largest at which the target share of completions passes. Hover a point for its text."
    return _section("Dose", why, f'<div class="panels">{"".join(panels)}</div>')


def heal_section(run: Run) -> str:
    heal = run.config["heal"]
    head = ("round", "steps", "barrier fired", "median D, nats", "validation NLL, nats")
    rows, silent = [], []
    for r, sums in zip(run.rounds, run.summary["rounds"], strict=True):
        share, val_nll = sums["barrier_fired_share"], sums["val_nll"]
        cells = f"{share:.0%}", f"{sums['operating_kl_nats']:.3g}", "" if val_nll is None else f"{val_nll:.3f}"
        rows.append((r.index, len(r.heal), *cells))
        silent += [str(r.index)] * (share < FIRED_FLOOR and heal["reg"] != "nll")
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
        texts = [(_prose(c["prompt"]), _prose(c["text"]), f"{c['tail_ppl']:.1f}") for c in shown]
        rows = [(*cells, mark) for cells, mark in zip(texts, marks, strict=True)]
        table = _table(("prompt", "completion", "tail ppl", "filter"), rows, kinds)
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


def _shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


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
    return re.sub(r"([\\`*_<\[])", r"\\\1", _shorten(text, DIARY_CHARS))


# ---- template

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5d6672; --paper: #fbfbfa; --card: #fff; --line: #dfe2e6;
  --base: #808890; --prompted: #c88a04; --steered: #d55e00; --healed: #009e73; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #9ba4ae; --paper: #14171a; --card: #1b1f24; --line: #31373e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main, footer { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: clamp(1.35rem, 4vw, 2rem); line-height: 1.25; margin: 48px 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 0 0 8px; overflow-wrap: anywhere; }
section { margin: 56px 0; }
footer { border-top: 1px solid var(--line); padding-top: 28px; padding-bottom: 64px; color: var(--soft); }
.why { color: var(--soft); margin: 0 0 18px; max-width: 76ch; font-size: .95rem; }
.status { width: fit-content; margin: 0 0 16px; padding: 2px 12px; border: 1px solid var(--prompted); }
.status, .dropped, .kept { border-radius: 99px; }
.verdict { margin: 0; padding: 4px 0 4px 18px; border-left: 4px solid var(--base); font-size: 1.1rem; max-width: 76ch; }
.verdict.moved { border-color: var(--healed); } .verdict.damaged { border-color: var(--steered); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; } td { white-space: nowrap; }
td:has(.prose) { white-space: normal; min-width: 190px; }
.ci { color: var(--soft); font-size: .85em; }
.arm { font-weight: 600; } .arm::before { content: ""; display: inline-block; width: .65em; height: .65em;
  margin-right: .5em; border-radius: 50%; background: var(--base); }
.arm.prompted::before { background: var(--prompted); } .arm.steered::before { background: var(--steered); }
.arm.healed::before { background: var(--healed); }
.dropped, .kept { margin-left: 8px; padding: 0 8px; font-size: .8rem; border: 1px solid; }
td > .dropped, td > .kept { margin-left: 0; }
.dropped { color: var(--steered); } .kept { color: var(--healed); }
tr:is(.dropped, .kept) { font-size: inherit; color: inherit; border: 0; } tr.dropped .prose { color: var(--soft); }
tr.dropped td:first-child { box-shadow: inset 3px 0 var(--steered); padding-left: 12px; }
tr.kept td:first-child { box-shadow: inset 3px 0 var(--healed); padding-left: 12px; }
.panels { display: grid; gap: 32px 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.panels.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.panel, .answers > div { min-width: 0; }
.panel h3::first-letter { text-transform: uppercase; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
article + article { margin-top: 14px; }
.answers { display: grid; gap: 14px 26px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.prose { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; }
td .prose { margin: 0; }
.nothing { color: var(--soft); font-style: italic; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); padding: 4px 0; }
details[open] > summary { margin-bottom: 10px; }
code, pre { font: .88em/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.main-svg .infolayer text, .main-svg [class$="tick"] text { fill: var(--soft) !important; }
"""

# One script draws every figure once the page is laid out: drawn one by one, a panel would not know its width.
DRAW = f"""
for (const data of document.querySelectorAll("script[type='application/json']")) {{
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, {json.dumps(PLOT_CONFIG)});
}}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$status
<p class="verdict $kind">$verdict</p>
<noscript><p class="why">The figures need JavaScript; their numbers are in the tables.</p></noscript>
$sections
</main>
<footer>
$footer
</footer>
<script>$plotlyjs</script>
<script>$draw</script>
</body>
</html>
""")
