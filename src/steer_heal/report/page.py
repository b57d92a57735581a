"""A run's report: one self-contained page, and a short diary.

`build` reads only the run folder (no model, no torch), so the page can be rebuilt anywhere. While the run is still
going the page shows the complete parts. It loads nothing from the network. Every text that a model or a user wrote is
escaped.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from steer_heal.files import write_text
from steer_heal.report.html import filled, folded, safe, table_of
from steer_heal.report.making import dose_section, filter_section, heal_section, recipe_section, vector_section
from steer_heal.report.opening import answers_section, arms_section, cost_section, lead
from steer_heal.report.outcome import (
    benchmarks_section,
    coherence_section,
    frames_section,
    geometry_section,
    measures_section,
    others_section,
    plain_section,
    profile_section,
    refusals_section,
    robustness_section,
    trajectory_section,
    validity_section,
)
from steer_heal.report.words import diary, headline
from steer_heal.runs.reading import Run, load
from steer_heal.runs.rounds import InRound

TIMED = {
    InRound.VECTOR: "extract",
    InRound.DOSE: "dose",
    InRound.COMPLETIONS: "distil",
    InRound.ADAPTER: "heal",
    InRound.STEERED: "eval steered",
    InRound.HEALED: "eval student",
    InRound.EQUAL_COST: "eval equal cost",
    InRound.EQUAL_TRAIT: "eval equal trait",
}


class Built(NamedTuple):
    """The page that was written, and the verdict at its top."""

    path: Path
    headline: str


def build(folder: Path) -> Built:
    """Write report.html and diary.md into the run folder, from its artefacts."""
    run = load(folder)
    write_text(folder / "diary.md", diary(run))
    write_text(folder / "report.html", page(run))
    return Built(folder / "report.html", headline(run.summary)[0])


def page(run: Run) -> str:
    """The whole report.html."""
    sections, summary = [arms_section(run)], run.summary
    if run.rounds:
        sections = [answers_section(run), *([cost_section(run)] * bool(summary.plain)), *sections, "<h2>Details</h2>"]
        sections += [measures_section(run), plain_section(summary), trajectory_section(run), coherence_section(run)]
        sections += [
            benchmarks_section(run),
            robustness_section(run),
            frames_section(summary),
            refusals_section(summary),
            others_section(summary),
            profile_section(summary),
        ]
        sections += [validity_section(summary), recipe_section(run), dose_section(run), heal_section(run)]
        sections += [filter_section(run), vector_section(run), geometry_section(summary)]
    return filled(safe(run.name), "\n".join(sections), lead(run), footer(run))


def footer(run: Run) -> str:
    """How the run was made and what it cost."""
    env, peak = run.env, run.summary.peak_memory_bytes
    parts = [f"<p><code>{safe(shlex.join(['steer-heal', *argv]))}</code></p>" for argv in run.commands]
    if env:
        packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
        machine = f"{env['cpus']} CPUs, {env['threads']} threads, GPU {env['gpu'] or 'none'}; {env['platform']}"
        parts.append(f"<p>{safe(machine)}, Python {safe(env['python'])}, {safe(packages)}</p>")
    if run.seconds:
        spent = [[run.seconds.get(artefact.of(r.number), 0.0) for artefact in TIMED] for r in run.rounds]
        rows = [(i, *(f"{s:.1f}" for s in row), f"{sum(row):.1f}") for i, row in enumerate(spent)]
        parts.append(table_of(("seconds", *TIMED.values(), "round"), rows))
        parts.append(f"<p>{sum(run.seconds.values()):.1f} s in all stages, baselines included.</p>")
    if peak:
        parts.append(f"<p>Peak memory {peak / 1e6:.0f} MB.</p>")
    return "\n".join([*parts, folded("config.json", f"<pre>{safe(json.dumps(run.config, indent=1))}</pre>")])
