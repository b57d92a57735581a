"""A round: what it leaves behind, and the names of its files. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from steer_heal.runs.folder import RunDir


class InRound(StrEnum):
    """What lies in a round's folder."""

    VECTOR = "vector"
    LAYERS = "vector/layers.json"
    DOSE = "dose.json"
    COMPLETIONS = "completions.jsonl"
    STEERED = "steered.json"
    ADAPTER = "adapter"
    STEPS = "heal.jsonl"
    GEOMETRY = "geometry.json"
    HEALED = "healed.json"
    EQUAL_COST = "equal_cost.json"
    EQUAL_TRAIT = "equal_trait.json"
    DEMOS = "demos.jsonl"

    def of(self, number: int) -> str:
        """The name of the file in the run's folder, for round `number`."""
        return f"{folder_of(number)}/{self}"


def folder_of(number: int) -> str:
    """The name of a round's folder, e.g. r00."""
    return f"r{number:02d}"


def rounds_done(run: Path, planned: int) -> int:
    """How many rounds of a run, from the first on, have a student that was measured."""
    done = 0
    while done < planned and (run / InRound.HEALED.of(done)).is_file():
        done += 1
    return done


@dataclass(frozen=True)
class Round:
    """The artefacts of a complete round."""

    index: int
    layers: list[dict]
    dose: dict
    completions: list[dict]
    heal: list[dict]
    steered: dict
    healed: dict
    geometry: dict
    equal_cost: dict | None
    equal_trait: dict | None


def read_round(run: RunDir, number: int) -> Round | None:
    """What a run's folder has of a round; None when the round is not complete."""
    layers, dose, completions, steps, steered, healed, geometry, *opponents = (
        run.read(artefact.of(number))
        for artefact in (
            InRound.LAYERS,
            InRound.DOSE,
            InRound.COMPLETIONS,
            InRound.STEPS,
            InRound.STEERED,
            InRound.HEALED,
            InRound.GEOMETRY,
            InRound.EQUAL_COST,
            InRound.EQUAL_TRAIT,
        )
    )
    if None in (layers, dose, completions, steps, steered, healed, geometry):
        return None
    return Round(number, layers, dose, completions, steps, steered, healed, geometry, *opponents)
