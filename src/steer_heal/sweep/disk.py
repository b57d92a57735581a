"""Runs on the disk, known by what they are a run of and not by their names. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np

from steer_heal.config import UserError
from steer_heal.eval.reading import ArmReading, paired
from steer_heal.runs.folder import EVENTS, Damaged, RunDir
from steer_heal.runs.resume import OtherVersion, opened
from steer_heal.runs.rounds import InRound
from steer_heal.runs.summary import SUMMARY, Summary

IN_ROUND = {
    "steered": InRound.STEERED,
    "healed": InRound.HEALED,
    "equal_cost": InRound.EQUAL_COST,
    "equal_trait": InRound.EQUAL_TRAIT,
}


@dataclass(frozen=True)
class Found:
    """A run folder; `summary` is None while it is unfinished. What is read of it is read and checked once."""

    run: RunDir
    config: dict
    summary: Summary | None

    @property
    def folder(self) -> Path:
        return self.run.path

    @cached_property
    def trait(self) -> dict:
        return self.run.read("trait.json")

    @cached_property
    def identity(self) -> str:
        return identity(self.config, self.trait)

    @cached_property
    def _arms(self) -> dict[str, ArmReading | None]:
        return {}

    @property
    def instrument(self) -> str:
        return self.summary.instrument

    @property
    def rounds(self) -> str:
        done, asked = len(self.summary.rounds), self.config["rounds"]
        return str(done) if done == asked else f"{done} of {asked}"

    def value(self, flag: str) -> str:
        return value_of(self.config, flag)

    def arm(self, name: str, round_: int = -1) -> ArmReading | None:
        """An arm as it was measured in a round, the last one when not given; None where there is none."""
        in_round = name in IN_ROUND
        file = IN_ROUND[name].of(round_ % len(self.summary.rounds)) if in_round else f"{name}.json"
        if file not in self._arms:
            self._arms[file] = self.run.load(ArmReading, file)
        return self._arms[file]

    def changes(self, name: str, round_: int = -1, key: str = "", over: str = "base") -> np.ndarray | None:
        """Item by item, how far an arm is above another, on the trait's instrument or on other items."""
        one, other = self.arm(name, round_), self.arm(over, round_)
        key = key or self.instrument
        return paired(one, other, key) if one and other and key in one.items and key in other.items else None


def scan(out: Path) -> list[Found]:
    """Every run folder under `out`, newest first."""
    if not out.is_dir():
        raise UserError(f"no folder {str(out)!r}: give the one that holds run folders with --out")
    found = []
    for folder in sorted(_run_folders(out), key=lambda path: path.name, reverse=True):
        try:
            run = opened(folder)
            for name in run.record.files:  # a table of damaged figures would not say so
                if name.endswith(".json"):
                    run.find(name)
            found.append(Found(run, run.read("config.json"), run.load(Summary, SUMMARY)))
        except (Damaged, OtherVersion) as error:
            print(f"left out: {error}")
    return found


def _run_folders(out: Path) -> Iterator[Path]:
    """Folders with a run in them; none lies in another. A hidden one is of a run that was killed while it was made."""
    for folder, inside, files in os.walk(out):
        if EVENTS in files:
            inside.clear()
            if not Path(folder).name.startswith("."):
                yield Path(folder)


def grouped(runs: list[Found]) -> list[list[Found]]:
    """Finished runs that differ in their seed alone; of a seed that was run twice, the newest."""
    groups: dict[str, list[Found]] = {}
    for run in runs:
        if run.summary:
            group = groups.setdefault(json.dumps([run.config | {"seed": None}, run.trait], sort_keys=True), [])
            if run.config["seed"] not in {other.config["seed"] for other in group}:
                group.append(run)
    return [sorted(group, key=lambda run: run.config["seed"]) for group in groups.values()]


RECORD = "sweep.json"  # in the sweep's folder: what was asked, and why


def value_of(config: dict, flag: str) -> str:
    """A config's value, as config.json holds it, under a flag's name, e.g. heal.barrier.lam-round-pow."""
    try:
        return str(reduce(lambda table, key: table[key], flag.replace("-", "_").split("."), config))
    except (KeyError, TypeError):
        raise UserError(f"--by {flag!r} is no flag of `run`: see steer-heal run --help") from None


def identity(config: dict, trait: dict | None) -> str:
    """A run is its config and what its trait's file says."""
    described = json.dumps([config | {"preset": None}, trait], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()
