"""Runs that differ in their seed alone as one page: the report's figures on means, with intervals over the seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import polars as pl

from steer_heal.bootstrap import across_seeds
from steer_heal.config import PLACE_FIELDS
from steer_heal.figures import coherence_figure, frontier_figure, paths_figure, trajectory_figure
from steer_heal.markup import filled, panel, safe, section, table_of
from steer_heal.results import Found
from steer_heal.verdict import COHERENCE

WHY = """Means over the seeds. Bars and bands: 95% intervals over seeds and items. Against plain steering: the base
    steered by the first vector, dose by dose, and the student after every round; up is more trait, left is less
    damage."""

PATHS = """One line a group of runs, from the base through its rounds (larger dots are later); named by what sets it
    apart from most others. Up is more trait, left is less of the answers that were asked for."""


def averaged(group: list[Found]) -> dict:
    """A summary as the figures read it, of the rounds that all runs of the group have done."""
    summaries = [run.summary for run in group]

    def mean(records: list[dict]) -> dict:
        keys = [key for key, value in records[0].items() if isinstance(value, int | float)]
        return {key: float(np.mean([r[key] for r in records])) for key in keys if all(key in r for r in records)}

    def arm(name: str, records: list[dict], index: int = -1) -> dict:
        changes = np.array([run.changes(name, index) for run in group])
        return mean(records) | {"trait_over_base_ci": across_seeds(changes)["ci"]}

    rounds = []
    for index, of_round in enumerate(zip(*(s["rounds"] for s in summaries), strict=False)):
        names = {"steered": "steered", "equal": "equal cost", "healed": "healed"}
        there = {key: name for key, name in names.items() if all(key in r for r in of_round)}
        rounds.append({key: arm(name, [r[key] for r in of_round], index) for key, name in there.items()})
    return {
        "unit": summaries[0]["unit"],
        "base": summaries[0]["base"],
        "prompted": arm("prompted", [s["prompted"] for s in summaries]),
        "plain": [mean(list(arms)) for arms in zip(*(s["plain"] for s in summaries), strict=True)],
        "rounds": rounds,
    }


def names(groups: list[list[Found]]) -> list[str]:
    """What sets every group apart: its flags that are not as in more than half of them."""
    flags = [dict(_flags(group[0].config)) for group in groups]
    values = {key: Counter(table[key] for table in flags).most_common(1)[0] for key in flags[0]}
    usual = {key: value for key, (value, times) in values.items() if times > len(groups) / 2}
    return [
        ", ".join(f"{key} {value}" for key, value in table.items() if value != usual.get(key)) or "as most others are"
        for table in flags
    ]


def _flags(table: dict, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{before}{key}.")
        elif key not in ("preset", "seed", *PLACE_FIELDS):
            yield before + key, str(value)


def page(groups: dict[str, tuple[list[Found], pl.DataFrame]]) -> str:
    """The whole page: all groups in one figure, then a section a group with its figures and its table of rounds."""
    summaries = {title: averaged(group) for title, (group, _) in groups.items()}
    sections = []
    if len(groups) > 1:
        paths = dict(zip(names([group for group, _ in groups.values()]), summaries.values(), strict=True))
        sections.append(section("All of them", PATHS, panel("Trait against answer mass", paths_figure(paths))))
    for title, (_, table) in groups.items():
        summary = summaries[title]
        panels = [panel("Trait", trajectory_figure(summary))]
        if summary["plain"]:
            panels.append(panel("Against plain steering", frontier_figure(summary)))
        coherence = [panel(name, coherence_figure(summary, key, bound)) for key, name, bound, _ in COHERENCE]
        body = f'<div class="panels">{"".join(panels)}</div><div class="panels three">{"".join(coherence)}</div>'
        sections.append(section(safe(title), WHY, body + table_of(map(safe, table.columns), map(_cells, table.rows()))))
    return filled("Runs, averaged over seeds", "\n".join(sections))


def _cells(row: tuple) -> list[str]:
    return [safe(str(cell)) for cell in row]
