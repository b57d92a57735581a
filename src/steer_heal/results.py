"""All runs under a folder as one table: what moved, what it cost, and how to finish what is not finished."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

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
    else:
        print(f"no finished run under {out}")
    for folder in unfinished:
        print(f"unfinished: {folder}  (go on with the same preset and flags and --resume {folder})")
