"""The plan of a sweep: a grid over flags times seeds, and the state of its runs on disk.

The plan is a list of configs. A run is identified by its config, not by its name. Finished runs on disk are skipped and
unfinished ones resumed. So the same command continues a broken sweep, and a second engine continues where the first
stopped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from steer_heal.config import RunConfig, UserError, settled
from steer_heal.data import load_trait
from steer_heal.demands import check
from steer_heal.flags import read, words_of
from steer_heal.presets import PRESETS
from steer_heal.records import unstructured
from steer_heal.runs.folder import EVENTS, RunDir
from steer_heal.runs.resume import described, recorded
from steer_heal.runs.rounds import rounds_done
from steer_heal.sweep.disk import identity


@dataclass(frozen=True)
class Planned:
    """One run of the plan."""

    arm: tuple[tuple[str, str], ...]
    """flag and value, one pair per dimension of the grid"""
    seed: int
    argv: tuple[str, ...]
    """preset and flags of `steer-heal run`"""
    config: RunConfig

    @property
    def label(self) -> str:
        return " ".join([*(f"{flag}={value}" for flag, value in self.arm), f"seed={self.seed}"])


@dataclass(frozen=True)
class Sweep:
    """A sweep as the user asked for it."""

    name: str
    hypothesis: str
    folder: Path
    preset: str
    runs: tuple[Planned, ...]


def plan(
    name: str, grid: tuple[str, ...], seeds: tuple[int, ...], argv: tuple[str, ...], out: Path, hypothesis: str
) -> Sweep:
    """All arms of the grid times all seeds, each checked as `steer-heal run` would.

    Args:
        grid: dimensions such as `heal.barrier.agg=mean,rmse`.
        argv: preset and flags that all runs share.

    Raises UserError for a name that cannot name a folder, a dimension that cannot be read and an invalid config.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"sweep name {name!r}: use letters, digits, '-', '_' and '.' (it names a folder)")
    if not argv or argv[0] not in PRESETS:
        raise UserError(f"after -- give a preset and flags: one of {', '.join(PRESETS)}, then flags of `run`")
    dimensions = [_dimension(text) for text in grid]
    if len({flag for flag, _ in dimensions}) < len(dimensions):
        raise UserError(f"--grid names a flag twice: {', '.join(flag for flag, _ in dimensions)}")
    runs = []
    for values in itertools.product(*(values for _, values in dimensions)):
        arm = tuple(zip((flag for flag, _ in dimensions), values, strict=True))
        for seed in seeds:
            flags = [word for flag, value in arm for word in words_of(flag, *value.split("+"))]
            words = (*argv, *flags, "--seed", str(seed), "--out", str(out / name))
            config = parsed(words)
            check(config)
            runs.append(Planned(arm, seed, words, config))
    return Sweep(name, hypothesis, out / name, argv[0], tuple(runs))


def _dimension(text: str) -> tuple[str, list[str]]:
    flag, equals, values = text.partition("=")
    if not equals or not flag or not all(values.split(",")):
        raise UserError(f"--grid {text!r}: write FLAG=VALUE,VALUE, e.g. heal.barrier.agg=mean,rmse (a pair as 0.4+0.6)")
    return flag.removeprefix("--").replace("_", "-"), values.split(",")


def parsed(words: tuple[str, ...], default: RunConfig | None = None) -> RunConfig:
    """The config of a preset and flags, as `steer-heal run` reads them; `default` replaces the preset."""
    return settled(read(RunConfig, list(words[1:]), "steer-heal run", default or PRESETS[words[0]]))


def found(folder: Path) -> dict[str, Path]:
    """The run folders of a sweep, and of all sweeps and runs beside it, by identity: a finished one if there are
    several. So an arm that several sweeps share is run once."""
    by_config: dict[str, Path] = {}
    logs = [*folder.parent.glob(f"[!.]*/{EVENTS}"), *folder.parent.glob(f"[!.]*/[!.]*/{EVENTS}")]
    for log in sorted(logs):
        key = _key_of(log.parent)
        if key not in by_config or (log.parent / "summary.json").exists():
            by_config[key] = log.parent
    return by_config


@cache
def _key_of(folder: Path) -> str:
    return identity(recorded(folder), RunDir(folder).read("trait.json"))


def key(planned: Planned) -> str:
    try:
        trait = unstructured(load_trait(planned.config.trait))
    except UserError:  # the run itself reports it
        trait = None
    return identity(described(planned.config), trait)


def states(runs: Iterable[Planned], folder: Path) -> dict[Planned, str]:
    """The state of each run on disk: finished, unfinished or waiting."""
    return {run: how for run, (how, _) in progress(runs, folder).items()}


def progress(runs: Iterable[Planned], folder: Path) -> dict[Planned, tuple[str, int]]:
    """The state of each run and its rounds left. A finished run has none left, also when its loop ended early."""
    there = found(folder)
    return {run: _progress(run.config.rounds, there.get(key(run))) for run in runs}


def _progress(rounds: int, folder: Path | None) -> tuple[str, int]:
    if folder is None:
        return "waiting", rounds
    finished = (folder / "summary.json").exists()
    return ("finished", 0) if finished else ("unfinished", rounds - rounds_done(folder, rounds))


def command(planned: Planned, folder: Path) -> list[str]:
    """Arguments of `steer-heal` that start or resume this run."""
    there = found(folder).get(key(planned))
    return ["run", *planned.argv, *(["--resume", str(there)] if there else [])]


def seed_list(text: str) -> tuple[int, ...]:
    """`41,42,43` as numbers."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text!r}: write whole numbers with commas, e.g. 41,42,43") from None


def same_place(planned: Planned, folder: Path) -> Planned:
    """The run with an absolute --out, for a worker with another working directory."""
    words = list(planned.argv)
    words[words.index("--out") + 1] = str(folder.resolve())
    return replace(planned, argv=tuple(words))
