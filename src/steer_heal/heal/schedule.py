"""The learning rate of a round, step by step, and how many epochs it takes. No torch."""

from __future__ import annotations

import math
from typing import Literal

WARMUP = 0.1  # share of the steps (epochs auto: of the first epoch's) with a rising learning rate
FALL = 0.75  # epochs auto: share of the objective that has gone when it is enough
STALLED = 0.02  # epochs auto: smallest share by which an epoch must lower the objective
BINDING = 0.5  # epochs auto: share of an epoch's steps on which a barrier fires when it binds
MOST_EPOCHS = 12  # epochs auto, with the last one, in which the rate falls


def most_epochs(epochs: int | Literal["auto"]) -> int:
    return MOST_EPOCHS if epochs == "auto" else epochs


class Schedule:
    """The share of the peak learning rate at each step, and the number of epochs.

    A given number of epochs: a warm-up, then a cosine to zero over all steps. `auto`: a warm-up, then a constant rate,
    epoch by epoch, until no barrier binds and the objective has fallen by FALL or falls no further. One more epoch, at
    most the last of MOST_EPOCHS, takes the rate down to zero by a cosine. While a barrier binds training goes on,
    because its weight grows then and the adapter finds the same trait at less divergence.
    """

    def __init__(self, epoch_steps: int, epochs: int | Literal["auto"], first: float = math.nan) -> None:
        """`first` is the objective before training, in nats, for `auto`."""
        self.epoch_steps, self.epochs, self.first = epoch_steps, epochs, first
        self.epoch = 0
        self.last = None if epochs == "auto" else epochs - 1  # the last epoch, once it is known
        self.why = ""

    @property
    def done(self) -> bool:
        return self.last is not None and self.epoch > self.last

    def rate(self, step: int) -> float:
        """The share of the peak rate at a step."""
        if self.epochs != "auto":
            return _cosine(step, self.epochs * self.epoch_steps)
        if self.last is not None and step >= self.last * self.epoch_steps:
            return _falling(step - self.last * self.epoch_steps, self.epoch_steps)
        return min(1.0, (step + 1) / max(1, round(WARMUP * self.epoch_steps)))

    def next_epoch(self, records: list[dict]) -> None:
        """Note that an epoch is over. For `auto`, decide from the steps' records whether the next one is the last."""
        self.epoch += 1
        if self.last is not None:
            return
        n = self.epoch_steps
        own, before = records[-n:], records[-2 * n : -n]
        now, fired = _mean_objective(own), sum(r["fired"] or r["anchor_fired"] for r in own) / n
        if self.epoch == MOST_EPOCHS - 1:
            self.why = "that is the most"
        elif fired >= BINDING:
            return
        elif now <= (1 - FALL) * self.first:
            self.why = f"the objective had fallen by {1 - now / self.first:.0%}"
        elif before and now > (1 - STALLED) * _mean_objective(before):
            self.why = "the objective fell no further"
        self.last = self.epoch if self.why else None


def _mean_objective(records: list[dict]) -> float:
    return sum(r["objective"] for r in records) / len(records)


def _cosine(step: int, total: int) -> float:
    rising = max(1, round(WARMUP * total))
    if step < rising:
        return (step + 1) / rising
    return _falling(step - rising, total - rising)


def _falling(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / max(1, total)))
