"""A step of training, and what the steps of a round say of its barrier. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from loguru import logger

from steer_heal.config import FIRED_FLOOR, HealConfig


@dataclass(frozen=True, kw_only=True)
class HealStep:
    """One optimiser step: the terms of its loss in nats, whether the barrier fired, its weights, what it cost."""

    step: int
    objective: float
    divergence: float
    """D of the step's completions"""
    anchor_divergence: float | None = None
    barrier: float
    """how far the divergences are above their bounds"""
    loss: float
    fired: bool
    """the divergence was above tau"""
    anchor_fired: bool
    tau: float
    lam: float
    """weight of the barrier"""
    anchor_lam: float
    tokens: int
    grad_norm: float
    """of the whole gradient, before clipping"""
    squared_op_norm: float | None = None
    lr: float
    step_seconds: float
    tokens_per_s: float
    next_lam: float | None = None
    """dual: the barrier's weight in the step that follows"""
    next_anchor_lam: float | None = None
    val_objective: float | None = None
    """in the last step: the objective on the completions held out"""


class FiredShares(NamedTuple):
    """Shares of the steps on which the divergence was above tau, and the anchor's above its own."""

    barrier: float
    anchor: float


def fired_shares(steps: list[HealStep]) -> FiredShares:
    return FiredShares(
        sum(step.fired for step in steps) / len(steps), sum(step.anchor_fired for step in steps) / len(steps)
    )


def barrier_warning(steps: list[HealStep], config: HealConfig) -> None:
    """Warn that the barrier was off, with the tau to try: nobody notices a constraint that never binds."""
    barrier = config.barrier
    if barrier.reg == "nll":
        return
    operating = statistics.median(step.divergence for step in steps)
    own, anchor = fired_shares(steps)
    anchored = f", its anchor on {anchor:.0%}" if config.anchor.prompts > 0 else ""
    seen = f"the barrier fired on {own:.0%} of the steps{anchored}"
    at = f"operating {barrier.agg} of {barrier.reg} {operating:.3g} nats, tau {steps[0].tau:.3g}"
    if max(own, anchor) < FIRED_FLOOR and barrier.reference == "base":
        logger.info(f"{seen}: the loop is still within its budget ({at})")
    elif max(own, anchor) < FIRED_FLOOR:
        logger.warning(f"{seen}: this round was plain fine-tuning ({at}). Try --heal.barrier.tau {operating / 2:.2g}")
    elif own < FIRED_FLOOR:
        logger.info(f"{seen}: the anchor alone held this round back ({at})")
    else:
        logger.info(f"{seen} ({at})")
