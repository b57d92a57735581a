"""reproduce.json: what makes a run again, and what came out of it. It has no path of the machine."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer_heal.config import PLACE_FIELDS, UserError, without_folders
from steer_heal.eval.catalogue import MASS, NEUTRAL, Instrument
from steer_heal.eval.intervals import Interval
from steer_heal.eval.record import ArmSummary
from steer_heal.files import read_json, sha256
from steer_heal.records import Unfit, structured
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import Run
from steer_heal.runs.resume import as_recorded, preset_and_config, record_of
from steer_heal.runs.rounds import InRound
from steer_heal.runs.summary import RoundSummary, Summary

REPRODUCE = "reproduce.json"
COMPARED = (MASS, NEUTRAL)  # beside the trait
ROUNDING = 1e-3  # relative; where an interval is narrower than what another machine's rounding moves


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The difference of an arm from base, with its 95% interval over items."""

    arm: str
    measure: str
    over_base: float
    ci: Interval

    def agrees(self, again: Outcome) -> bool:
        """Whether another run's difference lies in this one's interval, up to rounding."""
        found, (low, high) = again.over_base, self.ci
        same = math.isclose(found, self.over_base, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return same or low <= found <= high or (math.isnan(found) and math.isnan(self.over_base))


@dataclass(frozen=True, kw_only=True)
class Reproducible:
    """What makes a run again, and what came out after one of its rounds."""

    command: str
    config: dict[str, Any]
    """contents of config.json; files and folders of the machine by their names; what was `auto` about the model is
    said"""
    trait: dict[str, Any]
    """contents of trait.json"""
    env: dict[str, Any]
    """contents of env.json: versions, processor, checksum of the base's weights"""
    round: int
    """the student is that after this round"""
    verdict: str
    outcomes: list[Outcome]
    sha256: dict[str, str]
    """checksums of the adapters of all rounds so far"""


def reproducible(run: Run, folder: RunDir, rounds: int) -> Reproducible:
    """What reproduces the student of a run after `rounds` rounds."""
    preset, config = preset_and_config(run.config)
    config = replace(
        config,
        model=replace(as_recorded(config.model, run.env), path=without_folders(config.model.path)),
        steer=replace(
            config.steer,
            method=without_folders(config.steer.method),
            without=tuple(map(without_folders, config.steer.without)),
        ),
        trait=without_folders(config.trait),
    )
    done = run.summary.rounds[rounds - 1]
    return Reproducible(
        command=command(folder.first_argv),
        config=record_of(config, preset),
        trait=folder.read("trait.json"),
        env=run.env,
        round=rounds - 1,
        verdict=done.verdict.word,
        outcomes=outcomes(run.summary, done),
        sha256=adapters(folder, rounds),
    )


def outcomes(summary: Summary, done: RoundSummary) -> list[Outcome]:
    """The persona as a prompt and the student after a round: trait, answer mass and neutral perplexity over base."""
    found = []
    for name, arm in (("prompted", summary.prompted), ("student", done.healed)):
        found.append(_outcome(name, f"trait, {summary.unit}", arm.trait_over_base, arm.trait_over_base_ci))
        found += [_change(name, arm, one) for one in COMPARED if one.name in arm.over_base]
    return found


def _change(name: str, arm: ArmSummary, one: Instrument) -> Outcome:
    change = arm.over_base[one.name]
    return _outcome(name, one.item_label, change.mean, change.ci)


def _outcome(arm: str, measure: str, over_base: float, ci: Interval) -> Outcome:
    return Outcome(arm=arm, measure=measure, over_base=over_base, ci=ci)


def adapters(folder: RunDir, rounds: int) -> dict[str, str]:
    """SHA-256 of the weights of every round's adapter."""
    names = [f"{InRound.ADAPTER.of(number)}/adapter_model.safetensors" for number in range(rounds)]
    return {name: sha256(folder.path / name) for name in names}


def read_reproducible(file: Path) -> Reproducible:
    """Read a reproduce.json. Raises UserError for a file that is none."""
    try:
        return structured(Reproducible, read_json(file))
    except (OSError, ValueError, TypeError, AttributeError, Unfit) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(file)!r} is no {REPRODUCE} of this version of steer-heal ({said}): give one that "
            "`steer-heal export` wrote"
        ) from error


def command(argv: list[str]) -> str:
    """The command line that a run was started with, without paths of the machine: the flags of PLACE_FIELDS and the
    folders of a trait file, of a vector and of a model."""
    words, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            skipping = word.partition("=")[0].removeprefix("--").replace("-", "_") in PLACE_FIELDS
        if not skipping:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            words.append(f"{flag}{equals}{without_folders(value)}")
    return shlex.join(["steer-heal", *words])
