"""The README's answers and table, and the figures of README and concepts, made from one demo run.

    python docs/tools/demo.py outputs/RUN    read a finished run into docs/runs/demo.json, then go on as without it
    python docs/tools/demo.py                make the README's marked blocks and the figures from docs/runs/demo.json

The gate checks that README and figures say what docs/runs/demo.json holds.
"""

from __future__ import annotations

import json
import math
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

from steer_heal.config import SIZES

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "runs" / "demo.json"
README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
PROMPTS = 3  # the first ones of the run, whatever their answers
MEASURES = (
    "trait_over_base",
    "trait_over_base_ci",
    "coherence_cost",
    "answer_mass",
    "neutral_ppl",
    "relevance_nats",
    "canary_share",
)


def collected(run: Path) -> dict:
    """What the README says about a run, from its summary.json, config.json and the answers of its last round."""
    summary, config = (json.loads((run / name).read_text("utf-8")) for name in ("summary.json", "config.json"))
    last = summary["rounds"][-1]
    lines = (run / f"r{last['round']:02d}" / "demos.jsonl").read_text("utf-8").splitlines()[:PROMPTS]
    opponents = [r.get(arm) for r in summary["rounds"] for arm in ("equal_cost", "equal_trait")]
    steered = [*summary["plain"], *filter(None, opponents)]
    by_dose = {round(arm["dose"], 6): _arm(arm) for arm in steered}
    best, persona = summary["best_prompt"], json.loads((run / "trait.json").read_text("utf-8"))["positive"]
    return {
        "run": run.resolve().name,
        "trait": summary["trait"],
        "dose": summary["rounds"][0]["dose"],
        "tokens": SIZES[config["eval"]["size"]].demo_tokens,
        "answers": [{arm: json.loads(line)[arm] for arm in ("prompt", "base", "healed")} for line in lines],
        "base": _arm(summary["base"]),
        "prompted": _with_worst(summary["prompted"], summary["base"]),
        "best_prompt": {"tried": best["tried"], "is_persona": best["system"] == persona, **_arm(best)},
        "equal_trait": _with_worst(last["equal_trait"], summary["base"]),
        "equal_cost": _with_worst(last["equal_cost"], summary["base"]),
        "students": [_with_worst(r["healed"], summary["base"]) for r in summary["rounds"]],
        "steered": [by_dose[dose] for dose in sorted(by_dose)],
    }


def _arm(arm: dict) -> dict:
    return {key: arm[key] for key in (*MEASURES, "dose") if key in arm}


def _with_worst(arm: dict, base: dict) -> dict:
    """An arm with the largest rise of perplexity: in the usual frame, or in a held-out one where those were read."""
    rises = [one["value"] / one["base"] for one in arm["framed"] or () if one["measure"] == "neutral_nll"]
    return _arm(arm) | {"worst_ppl": max([arm["neutral_ppl"] / base["neutral_ppl"], *rises])}


# ---- README


def answers(data: dict) -> str:
    """The prompts with the base's and the student's answers, in Markdown."""
    blocks = []
    for one in data["answers"]:
        blocks += [f"**{one['prompt']}**\n", f"- base: {_cut(one['base'])}", f"- student: {_cut(one['healed'])}\n"]
    return "\n".join(blocks)


def _cut(answer: str) -> str:
    """The answer on one line, with an ellipsis where the limit cut it inside a sentence."""
    answer = " ".join(answer.split())
    return answer if answer.endswith((".", "!", "?", '"')) else f"{answer}…"


def table(data: dict) -> str:
    """Four arms against base: the trait, the relevance of answers, and perplexity where it is worst."""
    best = data["best_prompt"]
    which = (
        f"best of {best['tried']}" if best["is_persona"] else f"best of {best['tried']}: {best['trait_over_base']:+.3f}"
    )
    rows = {
        f"persona as a system prompt ({which})": data["prompted"],
        "vector at run time, equal trait": data["equal_trait"],
        "vector at run time, equal cost": data["equal_cost"],
        "**student**": data["students"][-1],
    }
    head = ("", "trait over base, nats per token", "answers fit prompts, of base's", "perplexity of unrelated text")
    lines = [head, ("---",) * len(head), *((name, *_cells(arm, data["base"])) for name, arm in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _cells(arm: dict, base: dict) -> tuple[str, str, str]:
    low, high = arm["trait_over_base_ci"]
    fit = arm["relevance_nats"] / base["relevance_nats"]
    return f"{arm['trait_over_base']:+.3f} [{low:+.3f}, {high:+.3f}]", f"{fit:.0%}", f"{arm['worst_ppl'] - 1:+.1%}"


def filled(readme: str, data: dict) -> str:
    """The README with its two marked blocks made anew."""
    for name, text in (("answers", answers(data)), ("table", table(data))):
        pattern = rf"(<!-- demo:{name} -->\n).*?(\n<!-- /demo:{name} -->)"
        readme, found = re.subn(pattern, lambda m, text=text: m[1] + text + m[2], readme, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has {found} blocks <!-- demo:{name} --> ... <!-- /demo:{name} -->, not one")
    return readme


# ---- figures

WIDTH = 720
INK, GRID = "#333333", "#dddddd"
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#666666"
MOST_COST = 0.40  # the axis of the cost ends here; what costs more is not drawn


class Span(NamedTuple):
    """An axis: its values from `low` to `high` lie between two positions on the page."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


class Point(NamedTuple):
    """A measured arm: its place, the interval of its height, and a name beside it."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    name: str = ""


class Panel(NamedTuple):
    """A pair of axes, and the SVG elements drawn between them."""

    x: Span
    y: Span

    def axes(self, x_step: float, y_step: float, x_form: str, y_form: str, label: str) -> list[str]:
        parts = []
        for value in self.y.ticks(y_step):
            parts += [_rule(self.x.start, self.y.at(value), self.x.end, self.y.at(value), GRID)]
            parts += [_text(self.x.start - 8, self.y.at(value) + 4, y_form.format(value), "end")]
        for value in self.x.ticks(x_step):
            parts += [_rule(self.x.at(value), self.y.start, self.x.at(value), self.y.end, GRID)]
            parts += [_text(self.x.at(value), self.y.start + 20, x_form.format(value))]
        middle = (self.y.start + self.y.end) / 2
        return [*parts, _text(18, middle, label, turn=f"rotate(-90 18 {middle:.0f})")]

    def line(self, points: list[Point], colour: str, above: bool = True) -> list[str]:
        places = [(self.x.at(point.x), self.y.at(point.y)) for point in points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts = [f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>']
        for (x, y), point in zip(places, points, strict=True):
            if point.interval:
                low, high = map(self.y.at, point.interval)
                parts.append(_rule(x, low, x, high, colour, 'stroke-opacity="0.35" stroke-width="2"'))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
            if point.name:
                parts.append(
                    _text(
                        *((x - 8, y - 7) if above else (x + 6, y + 19)), point.name, "end" if above else "start", colour
                    )
                )
        return parts


def cost_figure(data: dict) -> str:
    """Trait against cost, a line for each way to move the trait."""
    steered = [_point(arm, f"{arm['dose']:.2f}") for arm in data["steered"] if arm["coherence_cost"] <= MOST_COST]
    students = [_point(arm, str(rounds)) for rounds, arm in enumerate(data["students"], 1)]
    shown = [*steered, *students, _point(data["prompted"])]
    least = min(0.0, *(point.x for point in shown)) - 0.04
    most = math.ceil(max(0.5, *(point.interval[1] for point in shown)) * 10) / 10
    panel = Panel(Span(least, MOST_COST, 78, WIDTH - 24), Span(0.0, most, 354, 24))
    parts = panel.axes(0.1, 0.1, "{:.0%}", "{:.1f}", "trait over base, nats per token")
    parts += panel.line(steered, BLUE)
    parts += panel.line(students, ORANGE, above=False)
    parts += panel.line(shown[-1:], GREY)
    legend = {
        "vector added at run time (number: dose)": BLUE,
        "student (number: rounds of training)": ORANGE,
        "persona as a system prompt": GREY,
    }
    for line, (text, colour) in enumerate(legend.items()):
        parts.append(f'<circle cx="{WIDTH - 320}" cy="{286 + 20 * line}" r="5" fill="{colour}"/>')
        parts.append(_text(WIDTH - 308, 290 + 20 * line, text, "start", colour))
    parts.append(_text(387, 404, "cost in coherence (0%: as coherent as base; left is better)"))
    return _page(f"Trait {data['trait']}: how far it moved, against what that cost", 420, parts)


def dose_figure(data: dict) -> str:
    """The vector at growing doses: the trait, and what is left of the answers."""
    base, steered = data["base"]["answer_mass"], data["steered"]
    most = math.ceil(max(arm["dose"] for arm in steered) * 5) / 5
    x = Span(0.0, most, 78, WIDTH - 24)
    trait = [Point(0.0, 0.0), *(_point(arm)._replace(x=arm["dose"]) for arm in steered)]
    kept = [Point(0.0, 1.0), *(Point(arm["dose"], arm["answer_mass"] / base) for arm in steered)]
    high = math.ceil(max(arm["trait_over_base_ci"][1] for arm in steered) * 5) / 5
    above, below = Panel(x, Span(0.0, high, 194, 24)), Panel(x, Span(0.0, 1.2, 404, 254))
    parts = above.axes(0.2, 0.2, "", "{:.1f}", "trait, nats per token") + above.line(trait, BLUE)
    parts += below.axes(0.2, 0.25, "{:.1f}", "{:.0%}", "answers kept") + below.line(kept, ORANGE)
    chosen = x.at(data["dose"])
    parts.append(_rule(chosen, 24, chosen, 404, INK, 'stroke-dasharray="5 4"'))
    parts.append(_text(chosen + 8, 40, f"dose chosen in the first round: {data['dose']:.2f}", "start"))
    parts.append(_text(387, 448, "dose (multiples of the vector)"))
    return _page("A larger dose moves the trait further and then breaks the text", 464, parts)


def _point(arm: dict, name: str = "") -> Point:
    return Point(arm["coherence_cost"], arm["trait_over_base"], tuple(arm["trait_over_base_ci"]), name)


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, style: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = INK, turn: str = "") -> str:
    turned = f' transform="{turn}"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turned}>{escape(text)}</text>'


def _page(title: str, height: int, parts: list[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" font-size="13">'
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>\n"])


FIGURES = {"demo.svg": cost_figure, "dose.svg": dose_figure}


def main(words: list[str]) -> None:
    if words:
        DATA.write_text(json.dumps(collected(Path(words[0])), indent=1) + "\n", "utf-8")
    data = json.loads(DATA.read_text("utf-8"))
    README.write_text(filled(README.read_text("utf-8"), data), "utf-8")
    for name, figure in FIGURES.items():
        (IMAGES / name).write_text(figure(data), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
