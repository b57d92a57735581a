"""The gradient of one step: objective, barrier and anchor over the whole effective batch.

A step's loss is defined over all completion tokens of its effective batch, the training completions and the anchors.
The aggregate of the barrier is not a sum over micro-batches. With several micro-batches, a first pass without gradient
therefore computes every position's losses. The derivative of the whole batch's loss gives each position a weight. A
second pass backpropagates the losses with these weights. The gradient is the same and takes less memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.config import HealConfig
from steer_heal.heal.barrier import aggregate, hinge, position_losses
from steer_heal.heal.examples import Example, Kind, length
from steer_heal.heal.steps import TEXT_LIMIT
from steer_heal.model.batching import shared_prefix
from steer_heal.model.forward import forward
from steer_heal.model.lm import LM

DUAL_RATE = 0.1  # dual: a multiplier rises by this times (D / bound - 1) per step
DUAL_PULL = 2.0  # dual: weight added at once when D is twice its bound; the multiplier alone is too slow for a round


@dataclass
class Multipliers:
    """Weights of the constraints: divergence of the training completions, and of the anchors; loss of written text."""

    own: float
    anchor: float
    text: float

    def ascend(self, record: dict, config: HealConfig) -> None:
        """Do one step of dual ascent: raise the weight of what is above its limit, lower that of what is below."""
        self.own = max(0.0, self.own + DUAL_RATE * (record["divergence"] / config.barrier.tau - 1))
        if "anchor_divergence" in record:
            excess = record["anchor_divergence"] / config.anchor.tau - 1
            self.anchor = max(0.0, self.anchor + DUAL_RATE * excess)
        if "text_loss" in record:
            self.text = max(0.0, self.text + DUAL_RATE * (record["text_loss"] / TEXT_LIMIT - 1))


def accumulate(lm: LM, batch: list[Example], config: HealConfig, lam: Multipliers) -> dict:
    """Add the gradient of the effective batch's loss to the adapter's; return the terms of the loss in nats."""
    barrier, anchor = config.barrier, config.anchor
    micro = micro_batches(batch, config.training.pass_rows)
    if len(micro) == 1:
        parts = [losses(lm, micro[0], config)]
    else:
        with torch.no_grad():
            parts = [losses(lm, part, config) for part in micro]
    objective, kl = (torch.cat(v).detach().requires_grad_() for v in zip(*parts, strict=True))
    terms = loss_terms(objective, kl, torch.cat([_kinds(part) for part in micro]), config, lam)
    slopes = torch.autograd.grad(terms["loss"], (objective, kl), allow_unused=True, materialize_grads=True)
    on_objective, on_kl = (slope.split([len(v) for v, _ in parts]) for slope in slopes)
    for index, part in enumerate(micro):
        part_objective, part_kl = parts[index] if len(micro) == 1 else losses(lm, part, config)
        (on_objective[index] @ part_objective + on_kl[index] @ part_kl).backward()
    return {name: term.item() for name, term in terms.items()} | {
        "fired": barrier.reg != "nll" and terms["divergence"].item() > barrier.tau,
        "anchor_fired": bool(terms.get("anchor_divergence", 0.0) > anchor.tau),
        "tau": barrier.tau,
        "anchor_tau": anchor.tau if "anchor_divergence" in terms else None,
        "lam": lam.own,
        "anchor_lam": lam.anchor,
        "text_lam": lam.text if "text_loss" in terms else None,
        "tokens": sum(len(e.row.completion) for e in batch),
    }


def micro_batches(batch: list[Example], size: int) -> list[list[Example]]:
    """Split the batch by length, to save padding, by kind within a part. The loss does not depend on it."""
    ordered = sorted(batch, key=length)
    return [sorted(ordered[i : i + size], key=lambda e: e.kind) for i in range(0, len(ordered), size)]


def losses(lm: LM, part: list[Example], config: HealConfig) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the objective and the divergence of every position, by kind.

    The objective of written text is the log-likelihood that it has lost since the base; an answer of the base has none.
    """
    rows = [e.row for e in part]
    # Activations that are recomputed in the backward pass cannot use a prefix cache.
    shared = 0 if lm.model.is_activation_checkpointing else shared_prefix([row.prompt for row in rows], multiple=1)
    states = forward(lm, rows, shared=shared, multiple=1)
    found = []
    for kind, pairs in groupby(zip(part, states, strict=True), key=lambda pair: pair[0].kind):
        group, h = zip(*pairs, strict=True)
        form = config.objective if kind == Kind.TRAINED else "nll"
        aim = None
        if kind == Kind.TEXT or (kind == Kind.TRAINED and form == "nll"):
            aim = torch.tensor([t for e in group for t in e.row.completion], device=lm.device)
        elif kind == Kind.TRAINED:
            aim = torch.cat([e.teacher for e in group])
        reference = None if config.barrier.reg == "nll" else torch.cat([e.reference for e in group])
        first, kl = position_losses(lm.head, torch.cat(h), aim, reference, config.barrier.reg, form)
        found.append((first - torch.cat([e.base_nll for e in group]) if kind == Kind.TEXT else first, kl))
    objective, kl = zip(*found, strict=True)
    return torch.cat(objective), torch.cat(kl)


def _kinds(part: list[Example]) -> Tensor:
    return torch.cat([torch.full((len(e.row.completion),), int(e.kind)) for e in part])


def loss_terms(
    objective: Float[Tensor, " n"], kl: Float[Tensor, " n"], kinds: Tensor, config: HealConfig, lam: Multipliers
) -> dict[str, Tensor]:
    """Return the step's loss and its terms: objective, D, the anchor's D, the loss of written text, the barrier.

    The barrier is the sum of their hinges, in nats. `kinds` has each position's `Kind`.
    """
    own, text, limits = kinds.to(kl.device) == Kind.TRAINED, kinds.to(kl.device) == Kind.TEXT, config.barrier
    mean = objective[own].mean()
    divergence = aggregate(kl[own], limits.agg)
    terms = {"objective": mean, "divergence": divergence}
    bounded = [(divergence, limits.tau, lam.own)] if limits.reg != "nll" else []
    if not own.all():
        terms["anchor_divergence"] = aggregate(kl[~own], limits.agg)
        bounded.append((terms["anchor_divergence"], config.anchor.tau, lam.anchor))
    if text.any():
        terms["text_loss"] = torch.relu(objective[text].mean())  # gains of one text do not make up for others' losses
        bounded.append((terms["text_loss"], TEXT_LIMIT, lam.text))
    zero = 0.0 * kl.sum()
    barrier = sum((hinge(d, bound) for d, bound, _ in bounded), zero)
    if limits.kind == "fixed":
        penalty = sum((weight * hinge(d, bound) for d, bound, weight in bounded), zero)
    else:
        penalty = sum((_dual_weight(d, bound, weight) * (d - bound) for d, bound, weight in bounded), zero)
    return {**terms, "barrier": barrier, "loss": mean + penalty}


def _dual_weight(divergence: Float[Tensor, ""], bound: float, multiplier: float) -> Float[Tensor, ""]:
    """Slope of the augmented Lagrangian: the multiplier, plus more above the bound, less below it, and at least 0."""
    return torch.relu(multiplier + DUAL_PULL * (divergence.detach() / bound - 1))
