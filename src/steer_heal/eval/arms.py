"""An arm: one view of the model that is measured, with or without a system prompt or a steering vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_heal.data import Trait
from steer_heal.model.steering import AnyVector, Steering


@dataclass(frozen=True)
class Arm:
    """The model that is measured: gate of the adapter history, system prompt, steering vector and dose."""

    name: str
    history: float = 1.0
    now: float = 1.0
    system: str | None = None
    vector: AnyVector | None = None
    dose: float = 0.0

    def steering(self, rows: int) -> Steering | None:
        return None if self.vector is None else Steering(self.vector, torch.full((rows,), self.dose))


def unsteered(trait: Trait) -> tuple[Arm, Arm, Arm]:
    """Base, and base with the positive and with the negative persona as its system prompt."""
    systems = {"base": None, "prompted": trait.positive, "negative": trait.negative}
    base, prompted, negative = (Arm(name, history=0.0, now=0.0, system=text) for name, text in systems.items())
    return base, prompted, negative


def plainly(name: str, first: AnyVector, dose: float) -> Arm:
    """Base, steered by the first round's vector."""
    return Arm(name, history=0.0, now=0.0, vector=first, dose=dose)
