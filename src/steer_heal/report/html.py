"""Parts of the report's page as HTML: sections, tables, figures, escaped text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from steer_heal.data import HERE

PLOT_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": "hover", "modeBarButtons": [["toImage"]]}


def filled(title: str, sections: str, lead: str = "", footer: str = "") -> str:
    """A whole self-contained page; all arguments are HTML."""
    template = Template((HERE / "report.html").read_text("utf-8"))
    scripts = {"plotlyjs": get_plotlyjs(), "config": json.dumps(PLOT_CONFIG)}
    return template.substitute(title=title, sections=sections, lead=lead, footer=footer, **scripts)


def section(title: str, why: str, body: str, fold: bool = False) -> str:
    """A section with a heading and a sentence or two about what it shows. A folded one shows its heading alone."""
    inner = f'<p class="why">{why}</p>{body}'
    if fold:
        return f'<section class="fold"><details><summary><h2>{title}</h2></summary>{inner}</details></section>'
    return f"<section><h2>{title}</h2>{inner}</section>"


def panel(title: str, fig: go.Figure, more: str = "") -> str:
    heading = f"<h3>{title}</h3>" if title else ""
    place = f'<div class="figure" style="height:{fig.layout.height}px"></div>'
    drawn = fig.to_json().replace("<", "\\u003c")  # otherwise a text could end the script
    data = f'<script type="application/json">{drawn}</script>'
    return f'<div class="panel">{heading}{place}{data}{more}</div>'


def table_of(head: Iterable[str], rows: Iterable[Sequence], kinds: Sequence[str] = ()) -> str:
    """A table of cells that are numbers or HTML; `kinds` are the CSS classes of its rows."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    marked = zip(kinds, lines, strict=True) if kinds else (("", line) for line in lines)
    body = "".join(f'<tr class="{kind}">{line}</tr>' for kind, line in marked)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def stacked(table: str) -> str:
    """A table of many estimates, each interval under its mean, so that all columns fit a laptop's screen."""
    return f'<div class="stacked">{table}</div>'


def folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def defined(terms: dict[str, str]) -> str:
    """Terms with what they mean."""
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{meaning}</dd>' for term, meaning in terms.items())}</dl>"


def arm_name(name: str) -> str:
    """An arm's name with its colour."""
    return f'<span class="arm {name.split()[0]}">{name}</span>'


def dropped(reason: str) -> str:
    """A label with the reason why the filter drops a text; nothing for one that it keeps."""
    return f'<span class="dropped">{safe(reason)}</span>' if reason else ""


def prose(text: str) -> str:
    return f'<p class="prose">{safe(text)}</p>' if text.strip() else '<p class="prose nothing">(nothing)</p>'


def marked(before: str, after: str) -> str:
    """The text `after`. Words that a word-by-word diff against `before` adds are marked."""
    old, new = (re.split(r"(\s+)", text) for text in (before, after))
    steps = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    parts = [(step == "equal", safe("".join(new[start:end]))) for step, _, _, start, end in steps]
    inner = "".join(part if same or not part.strip() else f"<mark>{part}</mark>" for same, part in parts)
    return f'<p class="prose">{inner}</p>' if after.strip() else prose(after)


def safe(text: str) -> str:
    """Any text as HTML: markup escaped, control characters (random models write them) replaced by U+FFFD."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text))


def with_interval(value: float, ci: Sequence[float], form: str = "{:+.3f}") -> str:
    low, high = map(form.format, ci)
    return f'{form.format(value)} <span class="ci">[{low}, {high}]</span>'


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
