"""All runs under a folder as tables: one row per run, or one row per arm with mean and interval over seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl

from steer_heal.eval.catalogue import COHERENCE, NEUTRAL, OF_TRAIT, RIGHT, RIGHT_LOG_ODDS
from steer_heal.eval.framed import worst
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.intervals import across_seeds
from steer_heal.eval.reading import paired, printed
from steer_heal.runs.folder import HARNESS
from steer_heal.sweep.disk import RECORD, Found, grouped, scan

ARMS = ("prompted", "equal_cost")
TRAIT_UNITS = ", ".join(f"{one.label}: {one.unit}" for one in OF_TRAIT.values())


def run_table(runs: list[Found], out: Path) -> pl.DataFrame:
    """One row per finished run."""
    return pl.DataFrame([{"run": str(run.folder.relative_to(out)), **_measures([run])} for run in runs if run.summary])


def arm_table(runs: list[Found], flags: list[str]) -> pl.DataFrame:
    """One row for every combination of the flags' values: means over seeds, intervals over seeds and probes.

    Runs that differ in anything but the flags and the seed never share a row.
    """
    rows = []
    for group in grouped(runs):
        values = {flag: group[0].value(flag) for flag in flags}
        rows.append({**values, **_dated(group), "seeds": len(group), **_measures(group)})
    return pl.DataFrame(rows).sort(flags) if rows and flags else pl.DataFrame(rows)


def difference_table(runs: list[Found], flags: list[str], arms: list[dict], every_round: bool = False) -> pl.DataFrame:
    """Every arm's healed student minus the first arm's, paired by seed and item, after the last round that all paired
    runs have done, or after each. Runs of one model are paired only when their prompts look alike."""
    groups: dict[tuple, list[list[Found]]] = {}
    for group in grouped(runs):
        groups.setdefault(tuple(group[0].value(flag) for flag in flags), []).append(group)
    ordered = [groups.get(tuple(arm[flag] for flag in flags), []) for arm in arms]
    rows = []
    for arm, others in zip(arms[1:], ordered[1:], strict=True):
        for group, first in product(others, ordered[0]):
            pairs = [(a, b) for a in group for b in first if a.config["seed"] == b.config["seed"] and _alike(a, b)]
            if not pairs:
                continue
            keys = {"trait": pairs[0][0].instrument, **{one.item_label: one.name for one in COHERENCE}}
            done = min(len(run.summary.rounds) for pair in pairs for run in pair)
            for round_ in range(0 if every_round else done - 1, done):
                healed = [(a.arm("healed", round_), b.arm("healed", round_)) for a, b in pairs]
                changes = {name: np.array([paired(a, b, key) for a, b in healed]) for name, key in keys.items()}
                found = {name: _estimate(values) for name, values in changes.items()}
                rows.append({**arm, **_dated(group), "seeds": len(pairs), "round": round_} | found)
    return pl.DataFrame(rows)


def _alike(one: Found, other: Found) -> bool:
    return one.prompt == other.prompt or one.config["model"] != other.config["model"]


def _dated(group: list[Found]) -> dict[str, str]:
    """The column with the day that the prompts show, where they show one."""
    return {"date": group[0].date} if group[0].date else {}


def round_table(group: list[Found]) -> pl.DataFrame:
    """One row per round, for runs that differ only in their seed: arms over base, the student against other arms."""
    rows = []
    for index in range(min(len(run.summary.rounds) for run in group)):
        row = {"round": index, "dose": f"{np.mean([run.summary.rounds[index].dose for run in group]):.2f}"}
        for arm in ("steered", "equal_cost", "healed"):
            row |= _column(printed(arm), [run.changes(arm, index) for run in group])
        for arm in ("equal_cost", "prompted"):
            row |= _column(f"over {printed(arm)}", [run.changes("healed", index, over=arm) for run in group])
        row |= _ratios(group, index)
        for one in (RIGHT, RIGHT_LOG_ODDS):
            row |= _column(one.label, [run.changes("healed", index, one.name) for run in group])
        rows.append(row)
    return pl.DataFrame(rows)


def _column(name: str, values: list[np.ndarray | None]) -> dict[str, str]:
    return {} if values[0] is None else {name: _estimate(np.array(values))}


def _ratios(group: list[Found], index: int = -1) -> dict[str, str]:
    """The student's coherence measures as shares of the base's, mean over the runs."""
    pairs = [(run.summary.rounds[index].healed, run.summary.base) for run in group]
    return {f"{one.short}/base": f"{np.mean([one.over(*pair) for pair in pairs]):.3f}" for one in COHERENCE}


def _in_worst_frame(group: list[Found]) -> dict[str, str]:
    """Perplexity over base's in each student's worst held-out frame, mean over the runs; empty where none was read."""
    found = [worst(run.summary.rounds[-1].healed.framed, NEUTRAL) for run in group]
    return {"worst frame": f"{np.mean([one.over_base for one in found]):.3f}"} if all(found) else {}


def _benchmarked(group: list[Found]) -> dict[str, str]:
    """The student's benchmark scores over base's, mean over the runs; of benchmarks that all of them have read."""
    row, read = {}, [run.run.load(Benchmarks, HARNESS) for run in group]
    for shown in read[0].shown if all(read) else []:
        students = [(one, arm) for one in read for arm in one.arms if arm.arm == "student"]
        changes = [one.of(arm, shown).over_base for one, arm in students]
        if all(changes):
            row[f"{shown.task} {shown.name}"] = f"{np.mean([change.mean for change in changes]):+.3f}"
    return row


def _measures(group: list[Found]) -> dict:
    """The columns of a row for runs that differ only in their seed."""
    row = {"model": group[0].config["model"]["path"].split("/")[-1], "trait": group[0].trait["name"]}
    row["rounds"] = ", ".join(dict.fromkeys(run.rounds for run in group))
    for arm in ARMS:
        changes = [run.changes(arm) for run in group]
        if changes[0] is not None:
            row[printed(arm)] = f"{np.mean(changes):+.3f}"
        best = [run.summary.best_prompt for run in group]
        if arm == "prompted" and all(best):
            row["best prompt"] = f"{np.mean([one.trait_over_base for one in best]):+.3f}"
    for name, over in ((printed("healed"), "base"), ("over equal cost", "equal_cost")):
        changes = [run.changes("healed", over=over) for run in group]
        if changes[0] is not None:
            found = across_seeds(np.array(changes))
            row[name] = f"{found.mean:+.3f} ±{(found.ci[1] - found.ci[0]) / 2:.3f}"
    row |= _ratios(group) | _in_worst_frame(group) | _benchmarked(group)
    row["verdict"] = ", ".join(dict.fromkeys(run.summary.rounds[-1].verdict.word for run in group))
    row["minutes"] = f"{np.mean([run.summary.seconds for run in group]) / 60:.1f}"
    return row


def _estimate(values: np.ndarray) -> str:
    """Mean and 95% interval: over probes, and over seeds where there are several."""
    found = across_seeds(values)
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(found.mean, *found.ci)


@dataclass(frozen=True)
class Files:
    """The files that tables are also written to."""

    csv: str | None = None
    json: str | None = None
    markdown: str | None = None
    html: str | None = None


def show(out: Path, by: tuple[str, ...], rounds: bool, files: Files) -> None:
    """Print the tables, each sweep under its hypothesis, and write them to files. Unfinished runs are listed last."""
    runs = scan(out)
    if not any(run.summary for run in runs):
        print(f"no finished run under {out}")
        tables = {}
    elif rounds:
        tables = {_title(group, by): round_table(group) for group in grouped(runs)}
        for sweep, own in _sweeps(runs, out):
            tables |= _differences(sweep, own, every_round=True)
        print(f"trait over base ({TRAIT_UNITS}), 95% intervals over seeds and items")
    else:
        tables = {"": arm_table(runs, list(by))} if by else _under_hypotheses(runs, out)
        print(f"trait over base after the last round ({TRAIT_UNITS});")
        print("±: 95% interval over seeds and probes. /base: the student's over base's; worst frame: its perplexity so")
    tables = {title: frame for title, frame in tables.items() if len(frame)}
    for title, frame in tables.items():
        print(f"\n{title}\n{_printed(frame)}" if title else _printed(frame))
    if files.html:
        from steer_heal.sweep import overview

        groups = {_title(group, by): (group, round_table(group)) for group in grouped(runs)}
        Path(files.html).write_text(overview.page(groups), "utf-8")
    if tables:
        _write(tables, files)
    for run in runs:
        if run.summary is None:
            print(f"unfinished: {run.run.resuming}")


def _title(group: list[Found], flags: tuple[str, ...]) -> str:
    seeds = ", ".join(str(run.config["seed"]) for run in group)
    values = "".join(f", {flag} {group[0].value(flag)}" for flag in flags)
    values += "".join(f", {name} {value}" for name, value in _dated(group).items())
    folders = ", ".join(run.folder.name for run in group)
    return f"{group[0].trait['name']}{values}, seeds {seeds} ({folders})"


def _sweeps(runs: list[Found], out: Path) -> list[tuple[dict, list[Found]]]:
    """The record of each sweep, and its runs. The name of a sweep in a subfolder gets the folder added."""
    found = []
    for path in sorted(out.rglob(RECORD)):
        sweep, under = json.loads(path.read_text("utf-8")), path.parent.parent
        if under not in (out, out.parent):
            sweep["name"] += f" in {under.relative_to(out).as_posix()}"
        found.append((sweep, [run for run in runs if run.identity in sweep["runs"]]))
    return found


def _under_hypotheses(runs: list[Found], out: Path) -> dict[str, pl.DataFrame]:
    tables, of_sweeps = {}, set()
    for sweep, own in _sweeps(runs, out):
        of_sweeps |= {run.folder for run in own}
        tables[f"sweep {sweep['name']}\nH: {sweep['hypothesis'] or '(none given)'}"] = arm_table(own, sweep["flags"])
        tables |= _differences(sweep, own)
    tables["runs"] = run_table([run for run in runs if run.folder not in of_sweeps], out)
    return tables


def _differences(sweep: dict, own: list[Found], every_round: bool = False) -> dict[str, pl.DataFrame]:
    first = ", ".join(sweep["arms"][0].values()) if sweep["arms"] and sweep["flags"] else ""
    title = f"sweep {sweep['name']}: each arm minus the first ({first}), on the same items"
    return {title: difference_table(own, sweep["flags"], sweep["arms"], every_round)}


def _printed(frame: pl.DataFrame, width: int = 240, cell: int = 80) -> str:
    with pl.Config(
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=width,
        fmt_str_lengths=cell,
    ):
        return str(frame.with_columns(pl.col(pl.String).fill_null("")))


def _write(tables: dict[str, pl.DataFrame], files: Files) -> None:
    """Write the tables. Markdown has a title above each table; CSV and JSON have it in the column `table`."""
    titled = {title: [pl.lit(title).alias("table")] if title else [] for title in tables}
    together = pl.concat((frame.select(*titled[title], pl.all()) for title, frame in tables.items()), how="diagonal")
    if files.csv:
        together.write_csv(files.csv)
    if files.json:
        Path(files.json).write_text(json.dumps(together.to_dicts(), indent=1), "utf-8")
    if files.markdown:
        with pl.Config(tbl_formatting="MARKDOWN"):
            shown = (f"{title}\n\n{_printed(frame, 10_000, 10_000)}\n" for title, frame in tables.items())
            Path(files.markdown).write_text("\n".join(shown).lstrip(), "utf-8")
