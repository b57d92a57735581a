"""The report's figures, from a run's artefacts. Colours suit light and dark pages; the page sets the text colour."""

from __future__ import annotations

import math
import textwrap
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steer_heal.distil.record import DoseCurve
from steer_heal.eval.catalogue import Instrument
from steer_heal.eval.reading import printed
from steer_heal.eval.record import ArmSummary
from steer_heal.heal.steps import TEXT_LIMIT, HealStep
from steer_heal.report.html import shorten
from steer_heal.runs.summary import Summary

# Okabe-Ito hues: colour-blind readers can tell them apart, and they are visible on white and on black.
COLOURS = {"base": "#808890", "prompted": "#c88a04", "steered": "#d55e00", "student": "#009e73"}
COLOURS |= {"negative": "#7a5c3e", "equal cost": "#cc79a7"}
SYMBOLS = {"base": "diamond", "prompted": "cross", "negative": "x", "steered": "square", "student": "circle"}
DRAWN = {  # arms that have a point per round: dash, symbol, name in the legend
    "steered": ("dash", "square", "steered"),
    "equal_cost": ("dot", "triangle-up", "steered, equal cost"),
    "healed": ("solid", "circle", "student"),
}
DIVERGENCE_COLOUR, ANCHOR_COLOUR, TEXT_COLOUR = "#4a8fd0", "#b06fae", "#7a9a2e"
HOVER_CHARS, HOVER_WIDTH = 300, 44


def trajectory_figure(summary: Summary) -> go.Figure:
    """Trait over base per round; base and prompted as reference lines."""
    fig = go.Figure()
    ends = [-0.4, len(summary.rounds) - 0.6]
    levels = {"base": (summary.base, "solid"), "prompted": (summary.prompted, "dot")}
    if best := summary.best_prompt:
        levels[f"best of {best.tried} prompts"] = best, "dash"
    for name, (arm, dash) in levels.items():
        y, (low, high) = arm.trait_over_base, arm.trait_over_base_ci
        label, colour = (
            f"{name} {y:+.3f} [{low:+.3f}, {high:+.3f}]<extra></extra>",
            COLOURS.get(name, COLOURS["prompted"]),
        )
        _line(fig, ends, [y, y], colour, name, dash, hovertemplate=label)
        fig.add_hrect(y0=low, y1=high, fillcolor=colour, opacity=0.13, line_width=0, layer="below")
    # shifted sideways, so that the error bars do not hide each other
    for name, shift in (("steered", -0.03), ("equal_cost", 0.0), ("healed", 0.03)):
        arms = [arm for r in summary.rounds if (arm := getattr(r, name))]
        if not arms:
            continue
        y = np.array([a.trait_over_base for a in arms])
        low, high = np.array([a.trait_over_base_ci for a in arms]).T
        bars = {"array": (high - y).tolist(), "arrayminus": (y - low).tolist(), "thickness": 1.3, "width": 4}
        *_, shown = DRAWN[name]
        label = f"round %{{customdata[0]}} {shown} %{{y:+.3f}} [%{{customdata[1]:+.3f}}, %{{customdata[2]:+.3f}}]"
        hover = {"customdata": [[i, *a.trait_over_base_ci] for i, a in enumerate(arms)]}
        hover["hovertemplate"] = f"{label}<extra></extra>"
        _arm(fig, [i + shift for i in range(len(arms))], y.tolist(), name, error_y=bars, **hover)
    fig.update_xaxes(title="round", tickvals=list(range(len(summary.rounds))), range=ends)
    fig.update_yaxes(title=f"trait over base, {summary.unit}")
    return _styled(fig, 400)


def frontier_figure(summary: Summary) -> go.Figure:
    """Trait against its cost in coherence: plain steering at each dose, and the student after each round."""
    fig = go.Figure()
    students = [r.healed for r in summary.rounds]
    doses, rounds = [f"{arm.dose:.2g}" for arm in summary.plain], [f"r{i}" for i, _ in enumerate(students)]
    # Later rounds lie close together: only the first round and the last have room for a label.
    ends = [name if name in (rounds[0], rounds[-1]) else "" for name in rounds]
    paths = [
        ("steered", "base, plainly steered", summary.plain, doses, doses, "bottom right"),
        ("student", "student", students, rounds, ends, "top left"),
    ]
    costs = [arm.coherence_cost for arm in (summary.prompted, *summary.plain, *students)]
    for name, title, arms, at, shown, beside in paths:
        x, y = ([0.0, *(getattr(arm, key) for arm in arms)] for key in ("coherence_cost", "trait_over_base"))
        label = f"{title} %{{customdata}}: %{{y:+.3f}} at a cost of %{{x:.1%}}<extra></extra>"
        texts = {"text": ["", *shown], "customdata": ["", *at], "textposition": beside, "hovertemplate": label}
        dots = {"size": 8, "symbol": SYMBOLS[name]}
        _line(fig, x, y, COLOURS[name], title, mode="lines+markers+text", marker=dots, **texts)
    prompted = summary.prompted
    dot = {"color": COLOURS["prompted"], "size": 11, "symbol": SYMBOLS["prompted"]}
    x, y = [prompted.coherence_cost], [prompted.trait_over_base]
    fig.add_scatter(x=x, y=y, mode="markers", marker=dot, name="prompted")
    fig.update_xaxes(title="coherence lost: answer mass or neutral perplexity, the larger loss", tickformat=".0%")
    fig.update_xaxes(range=[min(-0.1, *costs) - 0.02, min(1.0, max(costs) + 0.05)])
    fig.update_yaxes(title=f"trait over base, {summary.unit}")
    return _styled(fig, 420)


def paths_figure(paths: list[tuple[str, Summary]]) -> go.Figure:
    """Trait against cost: a line for every group of runs, from base through its rounds, and one for each simple rival.

    `paths` holds (name, summary) pairs. The rivals that need no training are those of the first.
    """
    fig = go.Figure()
    rivals, dashes = paths[0][1], ("solid", "dash", "dot")
    steered = {tuple((arm.dose, arm.trait_over_base) for arm in own.plain): (name, own.plain) for name, own in paths}
    arms = [rivals.prompted, *(arm for _, plain in steered.values() for arm in plain)]
    arms += [r.healed for _, summary in paths for r in summary.rounds]
    costs = [cost for arm in arms for cost in (arm.coherence_cost, arm.worst_cost) if math.isfinite(cost)]
    ends = [min(-0.1, *costs) - 0.02, min(1.0, max(costs) + 0.05)]
    for name, plain in steered.values():
        if plain:
            label = f"base, plainly steered{f': {name}' if len(steered) > 1 else ''}"
            _path(fig, label, plain, [f"dose {arm.dose:.2g}" for arm in plain], COLOURS["steered"], "solid")
    _path(fig, "prompted", [rivals.prompted], ["persona"], COLOURS["prompted"], "dot")
    if best := rivals.best_prompt:  # its cost is not read
        y, (low, high) = best.trait_over_base, best.trait_over_base_ci
        label = f"best of {best.tried} prompts, at any cost"
        hover = f"{label} {y:+.3f} [{low:+.3f}, {high:+.3f}]<extra></extra>"
        _line(fig, ends, [y, y], COLOURS["prompted"], label, "dash", width=1.5, hovertemplate=hover)
    hues = [*(COLOURS[name] for name in ("student", "equal cost", "negative")), DIVERGENCE_COLOUR, ANCHOR_COLOUR]
    for index, (name, summary) in enumerate(paths):
        students = [r.healed for r in summary.rounds]
        rounds = [f"round {i}" for i, _ in enumerate(students)]
        _path(fig, name, students, rounds, hues[index % len(hues)], dashes[index // len(hues) % len(dashes)])
    fig.update_xaxes(title="coherence lost: answer mass or neutral perplexity, the larger loss", tickformat=".0%")
    fig.update_xaxes(range=ends)
    fig.update_yaxes(title=f"trait over base, {rivals.unit}")
    _styled(fig, 440 + 20 * len(paths))
    below = {"orientation": "v", "y": 0, "yref": "container", "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin={"t": 16, "b": 144 + 20 * len(paths)})


def _path(fig: go.Figure, name: str, arms: list[ArmSummary], at: list[str], colour: str, dash: str) -> None:
    """A line from base through some arms, with intervals. An open end stands at the last arm's cost in its worst frame.

    `at` says which arm each point is.
    """
    costs, moves = [arm.coherence_cost for arm in arms], [arm.trait_over_base for arm in arms]
    low, high = (np.array([0.0, *side]) for side in zip(*(arm.trait_over_base_ci for arm in arms), strict=True))
    x, y = [0.0, *costs], np.array([0.0, *moves])
    bars = {"array": (high - y).tolist(), "arrayminus": (y - low).tolist(), "thickness": 1, "width": 3}
    hover = {"customdata": ["base", *at]}
    hover["hovertemplate"] = (
        f"{_hover_text(name)}<br>%{{customdata}}: %{{y:+.3f}} at a cost of %{{x:.1%}}<extra></extra>"
    )
    dots = {"size": [3, *(6 + i for i, _ in enumerate(arms))]}
    _line(fig, x, y.tolist(), colour, name, dash, width=1.5, mode="lines+markers", marker=dots, error_y=bars, **hover)
    last = arms[-1]
    if costs[-1] < last.worst_cost < math.inf:
        ends = {"mode": "lines+markers", "marker": {"size": [0, 9], "symbol": "circle-open"}, "showlegend": False}
        ends["hovertemplate"] = f"{_hover_text(name)}<br>in its worst frame: a cost of %{{x:.1%}}<extra></extra>"
        _line(fig, [costs[-1], last.worst_cost], [moves[-1]] * 2, colour, name, "dot", width=1, **ends)


def map_figure(arms: list[tuple[str, ArmSummary]]) -> go.Figure:
    """Care against authority: one point per arm, log of the mean probability over the scenes, nats."""
    fig = go.Figure()
    path = [arm.profile for name, arm in arms if name.split()[0] in ("base", "student")]
    x, y = ([getattr(profile, key) for profile in path] for key in ("auth_nats", "care_nats"))
    _line(fig, x, y, COLOURS["student"], "", "dot", width=1.5, showlegend=False, hoverinfo="skip")
    for name, arm in arms:
        x, y = arm.profile.auth_nats, arm.profile.care_nats
        dots = {
            "size": 11,
            "color": COLOURS.get(name.split()[0], DIVERGENCE_COLOUR),
            "symbol": SYMBOLS[name.split()[0]],
        }
        label = f"{name}: care {y:.2f}, authority {x:.2f}<extra></extra>"
        more = {"text": [name], "textposition": "top center", "showlegend": False, "hovertemplate": label}
        fig.add_scatter(x=[x], y=[y], mode="markers+text", marker=dots, name=name, **more)
    fig.update_xaxes(title="authority, nats")
    fig.update_yaxes(title="care, nats")
    return _styled(fig, 380)


def coherence_figure(summary: Summary, one: Instrument) -> go.Figure:
    """One coherence measure relative to base, with the bound beyond which it counts as damage."""
    fig = go.Figure()
    rounds = list(range(len(summary.rounds)))
    ends = [-0.4, len(rounds) - 0.6]
    for arm in ("steered", "healed"):
        shares = [one.over(getattr(r, arm), summary.base) for r in summary.rounds]
        _arm(fig, rounds, shares, arm, hovertemplate=f"round %{{x}} {printed(arm)} %{{y:.1%}} of base<extra></extra>")
    for level, dash in ((1, "solid"), (one.bound, "dot")):
        _line(fig, ends, [level] * 2, COLOURS["base"], "", dash, width=1.5, showlegend=False, hoverinfo="skip")
    fig.update_xaxes(title="round", tickvals=rounds, range=ends)
    fig.update_yaxes(title="% of base", tickformat=".0%", rangemode="tozero")
    return _styled(fig, 300)


def dose_figure(dose: DoseCurve) -> go.Figure:
    """Share that passes the filter against the dose: raw shares, monotone fit, unsteered level, the dose chosen."""
    unsteered, curve, chosen = dose.curve[0], dose.curve[1:], dose.dose
    doses, survival, fitted = ([getattr(p, key) for p in curve] for key in ("dose", "survival", "fitted"))
    across = [doses[0], doses[-1]]
    fig = go.Figure()
    _line(fig, doses, fitted, COLOURS["steered"], "monotone fit", hoverinfo="skip")
    _line(fig, across, [unsteered.fitted] * 2, COLOURS["student"], "unsteered", "dot", hoverinfo="skip")
    if dose.rule == "survival":
        label = f"target {dose.target:.0%}"
        _line(fig, across, [dose.target] * 2, COLOURS["base"], label, "dot", hoverinfo="skip")
    _line(fig, [chosen] * 2, [0, 1], COLOURS["base"], f"chosen {chosen:.2f}", "dash", hoverinfo="skip")
    label = "dose %{x:.2f}: %{y:.0%} survive, tail ppl %{customdata[0]}<br><br>%{customdata[1]}<extra></extra>"
    hover = {"customdata": [(f"{p.tail_ppl:.1f}", _hover_text(p.example)) for p in curve], "hovertemplate": label}
    dots = {"color": COLOURS["steered"], "size": 9}
    fig.add_scatter(x=doses, y=survival, mode="markers", marker=dots, name="survival", **hover)
    fig.update_xaxes(title="dose, multiples of the raw vector", type="log")
    fig.update_xaxes(tickvals=doses, ticktext=[f"{d:.2g}" for d in doses])
    fig.update_yaxes(title="survival", tickformat=".0%", range=[-0.03, 1.07])
    return _styled(fig, 340)


def threshold_figure(curve: list[dict]) -> go.Figure:
    """Precision and recall of the filter's log-odds for every threshold; the default threshold is 0."""
    fig = go.Figure()
    thresholds = [p["threshold"] for p in curve]
    for name, arm in (("recall", "student"), ("precision", "steered")):
        label = f"{name} %{{y:.2f}} at threshold %{{x:.2f}}<extra></extra>"
        _line(fig, thresholds, [p[name] for p in curve], COLOURS[arm], name, hovertemplate=label)
    _line(fig, [0, 0], [0, 1], COLOURS["base"], "default", "dash", hoverinfo="skip")
    fig.update_xaxes(title="log-odds above which text is dropped", range=[-6, 8])
    fig.update_yaxes(title="broken text, held-out half", range=[0, 1.03])
    return _styled(fig, 360)


def heal_figure(steps: list[HealStep], heal: dict) -> go.Figure:
    """Objective in the upper plot; what is limited, with its limit, in the lower. A diamond: the barrier fired."""
    fig = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    at = [s.step for s in steps]
    below = {"row": 2, "col": 1}
    _line(fig, at, [s.objective for s in steps], COLOURS["base"], "objective", row=1, col=1)
    bounds = {"tau": steps[0].tau, "anchor tau": steps[0].anchor_tau, "text limit": TEXT_LIMIT}
    series = [("divergence", "tau", "D", DIVERGENCE_COLOUR)] * (heal["barrier"]["reg"] != "nll")
    if steps[0].anchor_divergence is not None:
        series.append(("anchor_divergence", "anchor tau", "D anchor", ANCHOR_COLOUR))
    if steps[0].text_loss is not None:
        series.append(("text_loss", "text limit", "loss of written text", TEXT_COLOUR))
    for key, bound, name, colour in series:
        _line(fig, at, [getattr(s, key) for s in steps], colour, name, **below)
        _line(fig, [0, at[-1]], [bounds[bound]] * 2, colour, f"{bound} {bounds[bound]:.3g}", "dot", width=1.5, **below)
    fired = [s for s in steps if s.fired]
    diamonds = {"color": DIVERGENCE_COLOUR, "size": 8, "symbol": "diamond"}
    x, y = [s.step for s in fired], [s.divergence for s in fired]
    fig.add_scatter(x=x, y=y, mode="markers", marker=diamonds, name="barrier fired", hoverinfo="skip", **below)
    fig.update_xaxes(title="step", **below)
    fig.update_yaxes(title="objective", row=1, col=1)
    fig.update_yaxes(title="nats", rangemode="tozero", **below)
    return _styled(fig, 440)


def _line(fig: go.Figure, x: list, y: list, colour: str, name: str, dash: str = "solid", **more: Any) -> None:
    line = {"color": colour, "dash": dash, "width": more.pop("width", 2)}
    fig.add_scatter(**{"x": x, "y": y, "name": name, "mode": "lines", "line": line, "cliponaxis": False, **more})


def _arm(fig: go.Figure, x: list, y: list, name: str, **more: Any) -> None:
    """One arm, a point per round. Dash and symbol differ too, for colour-blind readers."""
    dash, symbol, shown = DRAWN[name]
    _line(
        fig,
        x,
        y,
        COLOURS[printed(name)],
        shown,
        dash,
        width=2.5,
        mode="lines+markers",
        marker={"size": 8, "symbol": symbol},
        **more,
    )


def _styled(fig: go.Figure, height: int) -> go.Figure:
    """Clear background, neutral text colour: the page's style sheet colours the text for light and dark."""
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
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(shorten(text, HOVER_CHARS), HOVER_WIDTH))
