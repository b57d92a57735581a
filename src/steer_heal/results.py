"""All runs under a folder as one table: what moved, what it cost, and how to finish what is not finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl

from steer_heal.bootstrap import across_seeds, paired
from steer_heal.config import UserError


def table(out: Path) -> tuple[pl.DataFrame, list[Path]]:
    """(one row a finished run, newest first; the folders of unfinished runs)."""
    if not out.is_dir():
        raise UserError(f"no folder {str(out)!r}: give the one that holds run folders with --out")
    rows, unfinished = [], []
    for config in sorted(out.rglob("config.json"), reverse=True):
        folder = config.parent
        if not (folder / "summary.json").exists():
            unfinished.append(folder)
            continue
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        base, prompted, last = summary["base"], summary["prompted"], summary["rounds"][-1]
        healed = last["healed"]
        low, high = healed["trait_over_base_ci"]
        rows.append(
            {
                "run": str(folder.relative_to(out)),
                "rounds": len(summary["rounds"]),
                "prompted": f"{prompted['trait_over_base']:+.3f}",
                "steered": f"{last['steered']['trait_over_base']:+.3f}",
                "healed": f"{healed['trait_over_base']:+.3f} [{low:+.3f}, {high:+.3f}]",
                "mass/base": f"{healed['answer_mass'] / base['answer_mass']:.2f}",
                "coherent": f"{healed['demo_kept_share']:.0%}",
                "ppl/base": f"{healed['neutral_ppl'] / base['neutral_ppl']:.3f}",
                "minutes": f"{summary['seconds'] / 60:.1f}",
            }
        )
    return pl.DataFrame(rows), unfinished


FILES = {  # arms by name, with the last round's folder
    "prompted": "prompted.json",
    "steered": "{}/steered.json",
    "equal cost": "{}/equal.json",
    "healed": "{}/healed.json",
}


def over_seeds(out: Path) -> pl.DataFrame:
    """One row for every config of which several seeds are finished: mean and 95% interval over seeds and probes."""
    groups: dict[str, list[Path]] = {}
    for summary in sorted(out.rglob("summary.json")):
        config = json.loads((summary.parent / "config.json").read_text("utf-8"))
        trait = json.loads((summary.parent / "trait.json").read_text("utf-8"))
        groups.setdefault(json.dumps([config | {"seed": None}, trait]), []).append(summary.parent)
    rows = []
    for folders in groups.values():
        if len(folders) < 2:
            continue
        last = f"r{json.loads((folders[0] / 'config.json').read_text('utf-8'))['rounds'] - 1:02d}"
        row = {"run": f"{len(folders)} seeds of {folders[0].name.rpartition('_s')[0].partition('_')[2]}"}
        for name, file in ((name, file.format(last)) for name, file in FILES.items()):
            if (folders[0] / file).is_file():
                found = across_seeds(np.array([_change(folder, file) for folder in folders]))
                row[name] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(found["mean"], *found["ci"])
        rows.append(row)
    return pl.DataFrame(rows)


def _change(folder: Path, file: str) -> np.ndarray:
    """Item by item, how far an arm's trait score is above its base's."""
    arm, base = (json.loads((folder / name).read_text("utf-8")) for name in (file, "base.json"))
    return paired(arm, base, base["instrument"])


def show(out: Path) -> None:
    """Print the table; trait columns are nats per token over base, after the last round."""
    frame, unfinished = table(out)
    if len(frame):
        with pl.Config(
            tbl_hide_dataframe_shape=True,
            tbl_hide_column_data_types=True,
            tbl_rows=-1,
            tbl_cols=-1,
            tbl_width_chars=160,
            fmt_str_lengths=80,
        ):
            print("trait in nats per token over base, after the last round")
            print(frame)
            if len(seeds := over_seeds(out)):
                print("over seeds, with 95% intervals over seeds and probes")
                print(seeds)
    else:
        print(f"no finished run under {out}")
    for folder in unfinished:
        print(f"unfinished: {folder}  (go on with the same preset and flags and --resume {folder})")
