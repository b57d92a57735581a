"""The gradient of one step: objective, barrier and anchor over the whole effective batch.

A step's loss is defined over all completion tokens of its effective batch, the training completions and the anchors.
The aggregate of the barrier is not a sum over micro-batches. With several micro-batches, a first pass without gradient
therefore computes every position's losses. The derivative of the whole batch's loss gives each position a weight. A
second pass backpropagates the losses with these weights. The gradient is the same and takes less memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.config import HealConfig
from steer_heal.heal.barrier import aggregate, hinge, position_losses
from steer_heal.heal.examples import Example, length
from steer_heal.model.batching import shared_prefix
from steer_heal.model.forward import forward
from steer_heal.model.lm import LM

DUAL_RATE = 0.1  # dual: a multiplier rises by this times (D / bound - 1) per step
DUAL_PULL = 2.0  # dual: weight added at once when D is twice its bound; the multiplier alone is too slow for a round


@dataclass
class Multipliers:
    """Weights of the barrier's two divergences: on the training completions and on the anchors."""

    own: float
    anchor: float

    def ascend(self, record: dict, config: HealConfig) -> None:
        """Do one step of dual ascent: raise the weight of a divergence above its bound, lower that of one below."""
        self.own = max(0.0, self.own + DUAL_RATE * (record["divergence"] / config.barrier.tau - 1))
        if "anchor_divergence" in record:
            excess = record["anchor_divergence"] / config.anchor.tau - 1
            self.anchor = max(0.0, self.anchor + DUAL_RATE * excess)


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
    terms = loss_terms(objective, kl, torch.cat([_is_anchor(part) for part in micro]), config, lam)
    penalty = terms.pop("penalty")
    on_objective, on_kl = (
        torch.autograd.grad(term, leaf, allow_unused=True, materialize_grads=True)[0].split([len(v) for v, _ in parts])
        for term, leaf in ((terms["objective"], objective), (penalty, kl))
    )
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
        "tokens": sum(len(e.row.completion) for e in batch),
    }


def micro_batches(batch: list[Example], size: int) -> list[list[Example]]:
    """Split the batch by length, to save padding, with anchors last in each part. The loss does not depend on it."""
    ordered = sorted(batch, key=length)
    return [sorted(ordered[i : i + size], key=lambda e: e.anchor) for i in range(0, len(ordered), size)]


def losses(lm: LM, part: list[Example], config: HealConfig) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the objective and the divergence of every position; anchors come last and have no objective."""
    rows = [e.row for e in part]
    # Activations that are recomputed in the backward pass cannot use a prefix cache.
    shared = 0 if lm.model.is_activation_checkpointing else shared_prefix([row.prompt for row in rows], multiple=1)
    states = forward(lm, rows, shared=shared, multiple=1)
    own = sum(not e.anchor for e in part)
    found = []
    for group, h in ((part[:own], states[:own]), (part[own:], states[own:])):
        if not group:
            continue
        aim, reference = None, None
        if config.barrier.reg != "nll":
            reference = torch.cat([e.reference for e in group])
        if not group[0].anchor:
            tokens = torch.tensor([t for e in group for t in e.row.completion], device=lm.device)
            aim = tokens if config.objective == "nll" else torch.cat([e.teacher for e in group])
        found.append(position_losses(lm.head, torch.cat(h), aim, reference, config.barrier.reg, config.objective))
    objective, kl = zip(*found, strict=True)
    return torch.cat(objective), torch.cat(kl)


def _is_anchor(part: list[Example]) -> Tensor:
    return torch.cat([torch.full((len(e.row.completion),), e.anchor) for e in part])


def loss_terms(
    objective: Float[Tensor, " n"], kl: Float[Tensor, " n"], anchor: Tensor, config: HealConfig, lam: Multipliers
) -> dict[str, Tensor]:
    """Return the step's loss and its terms: objective, D, the anchor's D, the barrier, the weighted penalty.

    The barrier is the hinge of D plus, with an anchor, the hinge of the anchor's D, in nats.
    """
    anchor, limits = anchor.to(kl.device), config.barrier
    mean = objective[~anchor].mean()
    divergence = aggregate(kl[~anchor], limits.agg)
    terms = {"objective": mean, "divergence": divergence}
    bounded = [(divergence, limits.tau, lam.own)] if limits.reg != "nll" else []
    if anchor.any():
        terms["anchor_divergence"] = aggregate(kl[anchor], limits.agg)
        bounded.append((terms["anchor_divergence"], config.anchor.tau, lam.anchor))
    zero = 0.0 * kl.sum()
    barrier = sum((hinge(d, bound) for d, bound, _ in bounded), zero)
    if limits.kind == "fixed":
        penalty = sum((weight * hinge(d, bound) for d, bound, weight in bounded), zero)
    else:
        penalty = sum((_dual_weight(d, bound, weight) * (d - bound) for d, bound, weight in bounded), zero)
    return {**terms, "barrier": barrier, "penalty": penalty, "loss": mean + penalty}


def _dual_weight(divergence: Float[Tensor, ""], bound: float, multiplier: float) -> Float[Tensor, ""]:
    """Slope of the augmented Lagrangian: the multiplier, plus more above the bound, less below it, and at least 0."""
    return torch.relu(multiplier + DUAL_PULL * (divergence.detach() / bound - 1))
