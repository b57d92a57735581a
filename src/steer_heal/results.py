"""All runs under a folder as tables: one row a run, or one row an arm with its mean and interval over seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import polars as pl

from steer_heal.bootstrap import across_seeds, interval, paired
from steer_heal.config import UserError
from steer_heal.rundir import RunDir

ARMS = {"prompted": "prompted.json", "steered": "{}/steered.json", "equal cost": "{}/equal.json"}
ARMS |= {"healed": "{}/healed.json"}  # with the last round's folder


@dataclass(frozen=True)
class Found:
    """A run folder; `summary` is None while it is unfinished."""

    folder: Path
    config: dict
    summary: dict | None

    @property
    def trait(self) -> dict:
        return json.loads((self.folder / "trait.json").read_text("utf-8"))

    @property
    def resuming(self) -> str:
        """The command that goes on with an unfinished run: its own, with --resume."""
        return shlex.join(["steer-heal", *RunDir(self.folder).first_argv(), "--resume", str(self.folder)])

    def value(self, flag: str) -> str:
        """The config's value under a flag's name, e.g. heal.lam-round-pow."""
        try:
            return str(reduce(lambda table, key: table[key], flag.replace("-", "_").split("."), self.config))
        except (KeyError, TypeError):
            raise UserError(f"--by {flag!r} is no flag of `run`: see steer-heal run --help") from None

    def changes(self, arm: str) -> np.ndarray | None:
        """Item by item, how far an arm's trait score is above base's after the last round."""
        path = self.folder / ARMS[arm].format(f"r{self.config['rounds'] - 1:02d}")
        if not path.is_file():
            return None
        one, base = (json.loads(p.read_text("utf-8")) for p in (path, self.folder / "base.json"))
        return paired(one, base, base["instrument"])


def scan(out: Path) -> list[Found]:
    """Every run folder under `out`, newest first."""
    if not out.is_dir():
        raise UserError(f"no folder {str(out)!r}: give the one that holds run folders with --out")
    found = []
    for config in sorted(out.rglob("config.json"), key=lambda path: path.parent.name, reverse=True):
        if (config.parent / "trait.json").is_file():
            summary = config.parent / "summary.json"
            parts = [json.loads(path.read_text("utf-8")) if path.exists() else None for path in (config, summary)]
            if parts[1] and "validity" not in parts[1]:
                print(f"left out, of an older version: {config.parent}")
            else:
                found.append(Found(config.parent, *parts))
    return found


def run_table(runs: list[Found], out: Path) -> pl.DataFrame:
    """One row a finished run."""
    return pl.DataFrame([{"run": str(run.folder.relative_to(out)), **_measures([run])} for run in runs if run.summary])


def arm_table(runs: list[Found], flags: list[str]) -> pl.DataFrame:
    """One row for every combination of the flags' values: means over seeds, intervals over seeds and probes.

    Runs that differ in anything but the flags and the seed never share a row.
    """
    groups: dict[str, list[Found]] = {}
    for run in runs:
        if run.summary:
            groups.setdefault(json.dumps([run.config | {"seed": None}, run.trait], sort_keys=True), []).append(run)
    rows = []
    for group in groups.values():
        values = {flag: group[0].value(flag) for flag in flags}
        rows.append({**values, "seeds": len({run.config["seed"] for run in group}), **_measures(group)})
    return pl.DataFrame(rows).sort(flags) if rows and flags else pl.DataFrame(rows)


def _measures(group: list[Found]) -> dict:
    """What a row says of runs that differ in their seed alone."""
    lasts = [(run.summary["base"], run.summary["rounds"][-1]) for run in group]
    row = {"model": group[0].config["model"]["path"].split("/")[-1], "trait": group[0].trait["name"]}
    row["rounds"] = group[0].config["rounds"]
    for arm in ARMS:
        changes = [run.changes(arm) for run in group]
        if changes[0] is not None:
            row[arm] = f"{np.mean(changes):+.3f}"
    row["95% interval"] = _interval(np.array(changes))  # of the last arm, healed
    ratios: dict[str, Callable[[dict, dict], float]] = {
        "mass/base": lambda base, healed: healed["answer_mass"] / base["answer_mass"],
        "coherent": lambda base, healed: healed["demo_kept_share"],
        "ppl/base": lambda base, healed: healed["neutral_ppl"] / base["neutral_ppl"],
    }
    for name, ratio in ratios.items():
        row[name] = f"{np.mean([ratio(base, last['healed']) for base, last in lasts]):.3f}"
    row["verdict"] = ", ".join(dict.fromkeys(last["verdict"]["word"] for _, last in lasts))
    row["minutes"] = f"{np.mean([run.summary['seconds'] for run in group]) / 60:.1f}"
    return row


def _interval(values: np.ndarray) -> str:
    """95%: over probes, and over seeds where there are several."""
    low, high = across_seeds(values)["ci"] if len(values) > 1 else interval(values[0])
    return f"[{low:+.3f}, {high:+.3f}]"


def show(out: Path, by: tuple[str, ...], csv: str | None, as_json: str | None, markdown: str | None) -> None:
    """Print the tables, sweeps under their hypotheses; trait columns are nats per token over base, last round."""
    runs = scan(out)
    sweeps = {path.parent: json.loads(path.read_text("utf-8")) for path in sorted(out.rglob("sweep.json"))}
    if not any(run.summary for run in runs):
        print(f"no finished run under {out}")
    elif by:
        tables = {"": arm_table(runs, list(by))}
    else:
        tables = {}
        for folder, sweep in sweeps.items():
            own = [run for run in runs if folder in run.folder.parents]
            tables[f"sweep {sweep['name']}\nH: {sweep['hypothesis'] or '(none given)'}"] = arm_table(
                own, sweep["flags"]
            )
        alone = [run for run in runs if not any(folder in run.folder.parents for folder in sweeps)]
        tables["runs"] = run_table(alone, out)
    if any(run.summary for run in runs):
        print("trait in nats per token over base after the last round, 95% interval of healed")
        for title, frame in tables.items():
            if len(frame):
                print(f"\n{title}\n{_printed(frame)}" if title else _printed(frame))
        everything = pl.concat([frame for frame in tables.values() if len(frame)], how="diagonal")
        _write(everything, csv, as_json, markdown)
    for run in runs:
        if run.summary is None:
            print(f"unfinished: {run.resuming}")


def _printed(frame: pl.DataFrame) -> str:
    with pl.Config(
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=200,
        fmt_str_lengths=80,
    ):
        return str(frame)


def _write(frame: pl.DataFrame, csv: str | None, as_json: str | None, markdown: str | None) -> None:
    if csv:
        frame.write_csv(csv)
    if as_json:
        Path(as_json).write_text(json.dumps(frame.to_dicts(), indent=1), "utf-8")
    if markdown:
        with pl.Config(tbl_formatting="MARKDOWN", tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
            Path(markdown).write_text(_printed(frame) + "\n", "utf-8")
