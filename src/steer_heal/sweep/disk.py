"""Runs on disk, identified by config and trait and not by folder name. No torch."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np

from steer_heal.config import GONE, LATER, EvalConfig, UserError, of_today
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
    """A run folder. `summary` is None while the run is unfinished. Files are read and checked once."""

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
    def _template(self) -> dict:
        return self.run.read("env.json", {}).get("template", {})

    @property
    def prompt(self) -> str | None:
        """The hash of a prompt as the run's chat template renders it."""
        return self._template.get("prompt_sha256")

    @property
    def date(self) -> str | None:
        """The day that the run's prompts show, None if they show none."""
        return self._template.get("date")

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
        """The reading of an arm in a round, by default the last one; None if there is none."""
        in_round = name in IN_ROUND
        file = IN_ROUND[name].of(round_ % len(self.summary.rounds)) if in_round else f"{name}.json"
        if file not in self._arms:
            self._arms[file] = self.run.load(ArmReading, file)
        return self._arms[file]

    def changes(self, name: str, round_: int = -1, key: str = "", over: str = "base") -> np.ndarray | None:
        """Item by item, one arm's score minus another's, on the items `key` (default: of the trait's instrument).

        None if one of the two has no such items.
        """
        one, other = self.arm(name, round_), self.arm(over, round_)
        key = key or self.instrument
        return paired(one, other, key) if one and other and key in one.items and key in other.items else None


def scan(out: Path) -> list[Found]:
    """Every run folder under `out`, newest first."""
    if not out.is_dir():
        raise UserError(f"no folder {str(out)!r}: give the one that holds run folders with --out")
    found = []
    gc.disable()  # all that is read is kept: looking for garbage in it again and again takes a third of the time
    try:
        for folder in sorted(_run_folders(out), key=lambda path: path.name, reverse=True):
            try:
                run = opened(folder)
                for name in run.record.files:  # check all: a table would not show that a figure is damaged
                    if name.endswith(".json"):
                        run.find(name)
                found.append(Found(run, of_today(run.read("config.json")), run.load(Summary, SUMMARY)))
            except (Damaged, OtherVersion) as error:
                print(f"left out: {error}")
    finally:
        gc.freeze()
        gc.enable()
    return found


def _run_folders(out: Path) -> Iterator[Path]:
    """Yield the run folders; none lies in another. Hidden ones, left by a kill while they were made, are skipped."""
    for folder, inside, files in os.walk(out):
        if EVENTS in files:
            inside.clear()
            if not Path(folder).name.startswith("."):
                yield Path(folder)


def grouped(runs: list[Found]) -> list[list[Found]]:
    """Group finished runs that differ only in their seed. `runs` is newest first: of each seed the newest counts.

    Runs whose prompts look different, e.g. because they show another date, are not in one group.
    """
    groups: dict[str, list[Found]] = {}
    for run in runs:
        if run.summary:
            alike = [run.config | {"seed": None}, run.trait, run.prompt]
            group = groups.setdefault(json.dumps(alike, sort_keys=True), [])
            if run.config["seed"] not in {other.config["seed"] for other in group}:
                group.append(run)
    return [sorted(group, key=lambda run: run.config["seed"]) for group in groups.values()]


RECORD = "sweep.json"  # in the sweep's folder: its plan and its hypothesis


def value_of(config: dict, flag: str) -> str:
    """The value of a flag, e.g. heal.barrier.lam-round-pow, in a config as config.json holds it."""
    try:
        return str(reduce(lambda table, key: table[key], flag.replace("-", "_").split("."), config))
    except (KeyError, TypeError):
        raise UserError(f"--by {flag!r} is no flag of `run`: see steer-heal run --help") from None


def identity(config: dict, trait: dict | None) -> str:
    """The identity of a run: a hash of its config (without its preset) and its trait.

    Knobs that came later count where they are turned, so that older runs and the records of sweeps keep theirs.
    """
    turned = {
        part: {key: value for key, value in config[part].items() if key not in later or value not in ((), later[key])}
        for part, later in LATER.items()
    }
    turned["eval"][GONE] = EvalConfig(size=config["eval"]["size"]).ends_only
    described = json.dumps([config | {"preset": None} | turned, trait], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()
