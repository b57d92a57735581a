"""The record of a training step, and the barrier's activity over a round's steps. No torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from loguru import logger

from steer_heal.config import FIRED_FLOOR, HealConfig

TEXT_LIMIT = 0.01  # limit of what a written text loses in log-likelihood per token, a gain counting as 0; nats
ANCHOR_TAU_SHARE = 0.05  # anchor.tau auto: share of the teacher's divergence on the anchor's texts


@dataclass(frozen=True, kw_only=True)
class HealStep:
    """One optimiser step: the terms of its loss in nats, whether the barrier fired, the barrier's weights, the time."""

    step: int
    epoch: int
    objective: float
    divergence: float
    """D on the step's training completions"""
    anchor_divergence: float | None = None
    text_loss: float | None = None
    """log-likelihood per token that the anchor's written text has lost, nats; 0 where it has gained"""
    barrier: float
    """sum of the excesses over the limits, nats"""
    loss: float
    fired: bool
    """whether D was above tau"""
    anchor_fired: bool
    """whether the anchor's D was above its tau"""
    tau: float
    anchor_tau: float | None = None
    lam: float
    """weight of the barrier"""
    anchor_lam: float
    text_lam: float | None = None
    tokens: int
    grad_norm: float
    """norm of the whole gradient, before clipping"""
    squared_op_norm: float | None = None
    lr: float
    step_seconds: float
    tokens_per_s: float
    next_lam: float | None = None
    """dual: the barrier's multiplier in the next step"""
    next_anchor_lam: float | None = None
    next_text_lam: float | None = None

    @property
    def excess(self) -> float:
        """D as a multiple of tau; 0 without a tau. The anchor's is of three texts, too few to judge a rate by."""
        return self.divergence / self.tau if self.tau else 0.0


class FiredShares(NamedTuple):
    """Shares of the steps on which D was above tau, and on which the anchor's D was above its own."""

    barrier: float
    anchor: float


def fired_shares(steps: list[HealStep]) -> FiredShares:
    return FiredShares(
        sum(step.fired for step in steps) / len(steps), sum(step.anchor_fired for step in steps) / len(steps)
    )


def barrier_warning(steps: list[HealStep], config: HealConfig) -> None:
    """Log how often the barrier fired; warn, with a tau to try, when it almost never did and so changed nothing."""
    barrier = config.barrier
    if barrier.reg == "nll":
        return
    operating = statistics.median(step.divergence for step in steps)
    own, anchor = fired_shares(steps)
    anchored = f", the anchor's on {anchor:.0%}" if config.anchor.prompts > 0 else ""
    seen = f"training: the barrier's limit was exceeded on {own:.0%} of the steps{anchored}"
    at = f"Median divergence {operating:.3g} nats ({barrier.agg} of {barrier.reg}), limit {steps[0].tau:.3g} (tau)"
    if max(own, anchor) < FIRED_FLOOR and barrier.reference == "base":
        logger.info(f"{seen}: neither acted, the run is still within its budget. {at}")
    elif max(own, anchor) < FIRED_FLOOR:
        logger.warning(
            f"{seen}: neither acted, this round was plain fine-tuning. {at}. Try --heal.barrier.tau {operating / 2:.2g}"
        )
    elif own < FIRED_FLOOR:
        logger.info(f"{seen}: only the anchor acted in this round. {at}")
    else:
        logger.info(f"{seen}. {at}")
