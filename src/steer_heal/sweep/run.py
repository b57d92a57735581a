"""Do the unfinished runs of a sweep, on this machine or on a cluster, and report what is left.

The list of runs is made in `plan`. On a cluster Ray does the scheduling and the retries.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
from loguru import logger

from steer_heal.config import UserError
from steer_heal.runs.resume import described
from steer_heal.sweep.disk import RECORD, value_of
from steer_heal.sweep.plan import Planned, Sweep, command, found, key, states
from steer_heal.terminal import MODULE


def sweep(asked: Sweep, engine: str, cpus: int, gpus: float, address: str | None, workers: int | None) -> int:
    """Do the unfinished runs; returns how many failed. Prints the plan and a time estimate first."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    _note(asked)
    before = states(asked.runs, asked.folder)
    todo = [run for run, how in before.items() if how != "finished"]
    print(_table(asked, before))
    print(_estimate(asked, todo, engine, workers))
    began = time.perf_counter()
    try:
        if engine == "ray":
            from steer_heal.sweep.cluster import on_ray

            ended = on_ray(asked, todo, cpus, gpus, address, workers)
        else:
            ended = here(asked, todo, cpus)
    except KeyboardInterrupt:
        left = list(states(asked.runs, asked.folder).values())
        raise UserError(
            f"stopped with {len(left) - left.count('finished')} runs left: the same command goes on with them"
        ) from None
    print(_table(asked, before | ended))
    failed = [run for run, how in ended.items() if how == "failed"]
    print(
        f"{len(todo) - len(failed)} runs done in {(time.perf_counter() - began) / 60:.1f} minutes, {len(failed)} failed"
    )
    for run in failed:
        print(f"failed: {shlex.join(['steer-heal', *command(run, asked.folder)])}")
    return len(failed)


def here(asked: Sweep, todo: list[Planned], cpus: int) -> dict[Planned, str]:
    """Do the runs one after another on this machine, each in its own process, so that a crash stops only its run."""
    outcome = {}
    for number, run in enumerate(todo, 1):
        logger.info(f"sweep {asked.name}: run {number} of {len(todo)}, {run.label}")
        words = [sys.executable, "-m", MODULE, *command(run, asked.folder)]
        ended = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": str(cpus)})
        outcome[run] = "finished" if ended.returncode == 0 else "failed"
    return outcome


def _note(asked: Sweep) -> None:
    """Write sweep.json, the hypothesis and the arms, for `results`. Atomically: another engine may read it."""
    flags = list(dict.fromkeys(flag for run in asked.runs for flag, _ in run.arm))
    seeds = list(dict.fromkeys(run.seed for run in asked.runs))
    arms = {run.arm: json.loads(json.dumps(described(run.config))) for run in asked.runs}
    written = {
        "name": asked.name,
        "hypothesis": asked.hypothesis,
        "preset": asked.preset,
        "flags": flags,
        "arms": [{flag: value_of(config, flag) for flag, _ in arm} for arm, config in arms.items()],
        "seeds": seeds,
        "runs": [key(run) for run in asked.runs],
    }
    scratch = asked.folder / f".{RECORD}.part"
    scratch.write_text(json.dumps(written, indent=1), "utf-8")
    os.replace(scratch, asked.folder / RECORD)


def _table(asked: Sweep, now: dict[Planned, str]) -> str:
    there = found(asked.folder)
    rows = [
        {**dict(run.arm), "seed": run.seed, "state": how, "folder": there.get(key(run), Path("")).name}
        for run, how in now.items()
    ]
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_rows=-1, fmt_str_lengths=80):
        return str(pl.DataFrame(rows))


def _estimate(asked: Sweep, todo: list[Planned], engine: str, workers: int | None) -> str:
    """The time that the runs left will take, estimated from finished runs of the same preset beside the sweep."""
    said = f"{len(todo)} of {len(asked.runs)} runs to do"
    seconds = []
    for summary in asked.folder.parent.rglob("summary.json"):
        found = json.loads(summary.read_text("utf-8"))
        if found["preset"] == asked.preset:
            seconds.append(found["seconds"] / len(found["rounds"]))
    if not seconds or not todo:
        return said + ("; a time estimate needs one finished run" if todo else "")
    minutes = statistics.median(seconds) * sum(run.config.rounds for run in todo) / 60
    at_once = workers or 1
    return f"{said}, about {minutes / at_once:.0f} minutes" + (f" with {at_once} at once" if at_once > 1 else "")
