"""One page of runs that differ only in their seed: the report's figures, with means and intervals over seeds."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import polars as pl

from steer_heal.config import flat
from steer_heal.eval.catalogue import COHERENCE
from steer_heal.eval.framed import InFrame
from steer_heal.eval.intervals import across_seeds
from steer_heal.eval.record import ArmSummary
from steer_heal.report.figures import coherence_figure, frontier_figure, paths_figure, trajectory_figure
from steer_heal.report.html import filled, panel, safe, section, stacked, table_of
from steer_heal.runs.summary import Summary
from steer_heal.sweep.disk import Found

WHY = """Means over the seeds. Bars and bands: 95% intervals over seeds and items. Against plain steering: the base
    steered by the first vector at each dose, and the student after every round; higher is more trait, further left is
    less damage."""

PATHS = """One line per group of runs, from the base through its rounds (larger dots are later rounds), beside the
    rivals that need no training. A name has the flags that most groups do not share. Higher is more trait, further left
    is less damage. Bars: 95% intervals. An open dot at a dotted end: the cost of the last round in the frame, usual or
    held out, in which it is largest."""


def averaged(group: list[Found]) -> Summary:
    """A summary for the figures: means over the runs of a group, for the rounds that all of them have done."""
    summaries = [run.summary for run in group]

    def arm(name: str, arms: list[ArmSummary], index: int = -1) -> ArmSummary:
        changes = np.array([run.changes(name, index) for run in group])
        return replace(_mean(arms), trait_over_base_ci=across_seeds(changes).ci)

    rounds = []
    for index, of_round in enumerate(zip(*(summary.rounds for summary in summaries), strict=False)):
        read = {name: [getattr(r, name) for r in of_round] for name in ("steered", "equal_cost", "healed")}
        means = {name: arm(name, arms, index) if all(arms) else None for name, arms in read.items()}
        rounds.append(replace(of_round[0], **means))
    return replace(
        summaries[0],
        prompted=arm("prompted", [summary.prompted for summary in summaries]),
        plain=[_mean(list(arms)) for arms in zip(*(summary.plain for summary in summaries), strict=True)],
        rounds=rounds,
    )


def _mean(arms: list[ArmSummary]) -> ArmSummary:
    """The first arm, with each float replaced by its mean over all arms."""
    of = {field.name: [getattr(arm, field.name) for arm in arms] for field in fields(ArmSummary)}
    figures = {name: values for name, values in of.items() if all(type(value) is float for value in values)}
    framed = [
        _frame_mean(alike) for alike in zip(*(arm.framed for arm in arms), strict=False)
    ]  # none, where one has none
    return replace(arms[0], framed=framed, **{name: float(np.mean(values)) for name, values in figures.items()})


def _frame_mean(alike: tuple[InFrame, ...]) -> InFrame:
    return replace(alike[0], **{key: float(np.mean([getattr(one, key) for one in alike])) for key in ("value", "base")})


def names(groups: list[list[Found]]) -> list[str]:
    """A name for each group: its flags whose values at most half of the groups have."""
    flags = [
        {key: str(value) for key, value in flat(group[0].config) if key not in ("preset", "seed")}
        | {"date": str(group[0].date)}
        for group in groups
    ]
    times = Counter(pair for table in flags for pair in table.items())
    apart = [[f"{k} {v}" for k, v in table.items() if times[k, v] <= len(groups) / 2] for table in flags]
    return [", ".join(own) or "as most others are" for own in apart]


def page(groups: dict[str, tuple[list[Found], pl.DataFrame]]) -> str:
    """The whole page: all groups in one figure, then a section per group with its figures and its table of rounds."""
    summaries = {title: averaged(group) for title, (group, _) in groups.items()}
    sections = []
    if len(groups) > 1:
        named = list(zip(names([group for group, _ in groups.values()]), summaries.values(), strict=True))
        alike: dict[tuple, list[tuple[str, Summary]]] = {}
        for name, summary in named:
            alike.setdefault((summary.model, summary.trait, summary.unit), []).append((name, summary))
        panels = [panel(safe(f"{model}, {trait}"), paths_figure(paths)) for (model, trait, _), paths in alike.items()]
        sections.append(section("Trait against cost, every arm", PATHS, "".join(panels)))
    for title, (_, table) in groups.items():
        summary = summaries[title]
        panels = [panel("Trait", trajectory_figure(summary))]
        if summary.plain:
            panels.append(panel("Against plain steering", frontier_figure(summary)))
        coherence = [panel(one.label, coherence_figure(summary, one)) for one in COHERENCE]
        body = f'<div class="panels">{"".join(panels)}</div><div class="panels three">{"".join(coherence)}</div>'
        shown = stacked(table_of(map(safe, table.columns), map(_cells, table.rows())))
        sections.append(section(safe(title), WHY, body + shown))
    return filled("Runs, averaged over seeds", "\n".join(sections))


def _cells(row: tuple) -> list[str]:
    texts = ("" if cell is None else safe(str(cell)) for cell in row)
    return [re.sub(r"(\[.*\])", r'<span class="ci">\1</span>', text) for text in texts]
