"""A round's artefacts and the names of its files. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from steer_heal.distil.record import Completion, DoseCurve
from steer_heal.eval.reading import ArmReading, Geometry
from steer_heal.heal.steps import HealStep
from steer_heal.runs.folder import RunDir
from steer_heal.steer.layers import LayerReport


class InRound(StrEnum):
    """File names in a round's folder."""

    VECTOR = "vector"
    LAYERS = "vector/layers.json"
    DOSE = "dose.json"
    COMPLETIONS = "completions.jsonl"
    OWN = "own.jsonl"
    STEERED = "steered.json"
    ADAPTER = "adapter"
    STEPS = "heal.jsonl"
    GEOMETRY = "geometry.json"
    HEALED = "healed.json"
    EQUAL_COST = "equal_cost.json"
    EQUAL_TRAIT = "equal_trait.json"
    DEMOS = "demos.jsonl"

    def of(self, number: int) -> str:
        """The file's path relative to the run folder, for round `number`."""
        return f"{folder_of(number)}/{self}"


def folder_of(number: int) -> str:
    """The name of a round's folder, e.g. r00."""
    return f"r{number:02d}"


def rounds_done(run: Path, planned: int) -> int:
    """How many rounds, counted from the first, have a measured student."""
    done = 0
    while done < planned and (run / InRound.HEALED.of(done)).is_file():
        done += 1
    return done


@dataclass(frozen=True, kw_only=True)
class Round:
    """The artefacts of a complete round."""

    number: int
    layers: list[LayerReport]
    dose: DoseCurve
    completions: list[Completion]
    """the teacher's, then the student's own"""
    steps: list[HealStep]
    steered: ArmReading
    geometry: Geometry
    healed: ArmReading
    equal_cost: ArmReading | None
    equal_trait: ArmReading | None

    @property
    def name(self) -> str:
        return folder_of(self.number)

    @property
    def opponents(self) -> list[ArmReading]:
        """The readings of plain steering for this round's student, where it was measured."""
        return [arm for arm in (self.equal_cost, self.equal_trait) if arm is not None]


ALWAYS = {
    "layers": (InRound.LAYERS, list[LayerReport]),
    "dose": (InRound.DOSE, DoseCurve),
    "steps": (InRound.STEPS, list[HealStep]),
    "steered": (InRound.STEERED, ArmReading),
    "geometry": (InRound.GEOMETRY, Geometry),
    "healed": (InRound.HEALED, ArmReading),
}
OPPONENTS = {"equal_cost": (InRound.EQUAL_COST, ArmReading), "equal_trait": (InRound.EQUAL_TRAIT, ArmReading)}


def read_round(run: RunDir, number: int) -> Round | None:
    """A round's artefacts from a run folder; None when the round is not complete."""
    parts = {name: run.load(kind, artefact.of(number)) for name, (artefact, kind) in (ALWAYS | OPPONENTS).items()}
    texts = (run.load(list[Completion], artefact.of(number)) or [] for artefact in (InRound.COMPLETIONS, InRound.OWN))
    completions = [text for part in texts for text in part]
    if not completions or any(parts[name] is None for name in ALWAYS):
        return None
    return Round(number=number, completions=completions, **parts)
