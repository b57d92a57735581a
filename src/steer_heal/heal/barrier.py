"""Cross-entropy and KL divergence over completion tokens, in a fixed amount of memory for logits.

L = mean NLL + lam * relu(D - tau), D = agg over positions of KL_i (nats).

gemma's vocabulary has 262,144 tokens: the logits of a batch of 3 x 1024 in float32 take 3 GB per copy, and a plain loss
keeps several copies. Here the hidden states of the completion positions go through the head one chunk at a time. In
the forward pass each chunk yields nll_i, kl_i and both gradients with respect to h_i. The backward pass only combines
the two gradients, with the weights that the aggregate gives to each position. This works because the gradient at
position i depends on the other positions through scalars only.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_heal.model.lm import Head

KL_EPS = 1e-12  # under the root of rmse: a fresh adapter has a KL of exactly 0, where sqrt has no gradient
# Logits held at once, for all models together: 67 MB in float32 on a CPU, 268 MB on a GPU. With the scratch below that
# is 0.5 GB on a GPU. The size comes from a measurement: with 1 << 28 in both, up to 2.7 GB, a step of gemma-3-1b's
# shapes peaked at 10.7 GB on an H100 (torch 2.11). A plain loss peaked at 22.0 GB.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
CHUNK_ROWS = 64  # fewest positions in a chunk; with fewer, a product reads the head's weights for too little work
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # logits per block between the two products; 1 MB fits a cache

Reg = Literal["nll", "kl_fwd", "kl_rev"]  # of the barrier; nll: no divergence
Objective = Literal["nll", "kl_fwd", "kl_rev"]
Agg = Literal["mean", "rmse", "p95", "max"]


class _Fused(torch.autograd.Function):
    """(objective_i, kl_i) for every position, and their gradients with respect to h_i, in one pass over the head.

    objective_i is the NLL of the tokens in `aim`, or with the teacher's states there KL(student || teacher) for kl_rev
    and KL(teacher || student) for kl_fwd; 0 without `aim`. kl_i is the same with the reference; 0 without one. `kinds`
    are those of the divergence and of the objective.

    One matrix product gives the logits of a chunk of positions under all models. One product takes both gradients back
    through the head. The arithmetic between them is done in blocks that fit a cache. It overwrites the logits with the
    gradients with respect to the logits.
    """

    @staticmethod
    def forward(ctx, states, head, aim, reference, kinds):
        reg, kind = kinds
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        like = {"dtype": wide, "device": states.device}
        sampled = kind == "nll" and aim is not None
        teacher = None if kind == "nll" else aim
        models = [h for h in (states, teacher, reference) if h is not None]
        losses = [name for name, on in (("objective", aim is not None), ("kl", reference is not None)) if on]
        n, vocab = len(states), len(head.weight)
        step = min(n, max(CHUNK_ROWS, CHUNK_ELEMENTS[states.device.type] // (vocab * len(models))))
        block = min(step, max(1, BLOCK_ELEMENTS[states.device.type] // vocab))
        room = torch.empty(len(models) * step, vocab, **like)
        scratch = [torch.empty(block, vocab, **like) for _ in range(3)]
        objective, kl = torch.zeros(n, **like), torch.zeros(n, **like)
        grads = torch.empty(len(losses), *states.shape, **like) if states.requires_grad else None
        for start in range(0, n, step):
            rows = min(step, n - start)
            chunk = slice(start, start + rows)
            flat = room[: len(models) * rows]
            head(torch.cat([h[chunk] for h in models]), flat)
            logits = flat.view(len(models), rows, vocab)
            for top in range(0, rows, block):
                inside = slice(top, min(top + block, rows))
                at = slice(start + inside.start, start + inside.stop)
                z, *others = logits[:, inside]
                p, q, bend = (buffer[: len(z)] for buffer in scratch)
                lse = _softmax(z, p)
                slope = None if head.softcap is None else _slope(z, head.softcap, bend)
                if reference is not None:
                    kl[at] = (_reverse if reg == "kl_rev" else _forward)(z, lse, p, others[-1], q, slope)
                if teacher is not None:
                    objective[at] = (_reverse if kind == "kl_rev" else _forward)(z, lse, p, others[0], q, slope)
                elif sampled:  # last, since its gradient overwrites z
                    objective[at] = _nll(z, lse, p, aim[at, None], slope)
            if grads is not None:
                back = flat.to(head.weight.dtype)[0 if sampled else rows :] @ head.weight
                if head.scale != 1.0:
                    back.mul_(head.scale)
                grads[:, chunk] = back.view(len(losses), rows, -1).to(wide)
        ctx.save_for_backward(grads)
        ctx.losses, ctx.dtype = losses, states.dtype
        return objective, kl

    @staticmethod
    def backward(ctx, weight_objective, weight_kl):
        (grads,) = ctx.saved_tensors
        weights = {"objective": weight_objective, "kl": weight_kl}
        grad = sum(weights[kind][:, None] * g for kind, g in zip(ctx.losses, grads, strict=True))
        return grad.to(ctx.dtype), None, None, None, None


def _nll(z: Tensor, lse: Tensor, p: Tensor, target: Tensor, slope: Tensor | None) -> Tensor:
    """Return the NLL of each row's target; overwrite z with the gradient with respect to z."""
    nll = (lse - z.gather(1, target))[:, 0]
    z.copy_(p).scatter_add_(1, target, torch.full_like(lse, -1.0))
    _bent(z, slope)
    return nll


def _forward(z: Tensor, lse: Tensor, p: Tensor, other: Tensor, q: Tensor, slope: Tensor | None) -> Tensor:
    """Return KL(other || z) of each row, from logits; overwrite `other` with the gradient with respect to z."""
    other_lse = _softmax(other, q)
    gap = other.sub_(z).add_(lse - other_lse)
    kl = _row_dot(q, gap)
    _bent(torch.sub(p, q, out=other), slope)
    return kl


def _reverse(z: Tensor, lse: Tensor, p: Tensor, other: Tensor, q: Tensor, slope: Tensor | None) -> Tensor:
    """Return KL(z || other) of each row, from logits; overwrite `other` with the gradient with respect to z."""
    other_lse = _log_normaliser(other, q)
    gap = torch.sub(z, other, out=other).add_(other_lse - lse)
    kl = _row_dot(p, gap)
    _bent(gap.sub_(kl[:, None]).mul_(p), slope)
    return kl


def _slope(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Derivative of the capped logits with respect to the uncapped ones, computed from the capped ones."""
    return torch.div(z, softcap, out=out).square_().neg_().add_(1.0)


def _bent(gradient: Tensor, slope: Tensor | None) -> None:
    if slope is not None:
        gradient.mul_(slope)


def _softmax(z: Tensor, out: Tensor) -> Tensor:
    """Write the softmax of each row of z into `out`; return the log of its normaliser, [n, 1]."""
    top = z.amax(1, keepdim=True)
    total = torch.sub(z, top, out=out).exp_().sum(1, keepdim=True)
    out.div_(total)
    return top + total.log()


def _log_normaliser(z: Tensor, scratch: Tensor) -> Tensor:
    top = z.amax(1, keepdim=True)
    return top + torch.sub(z, top, out=scratch).exp_().sum(1, keepdim=True).log()


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def position_losses(
    head: Head,
    states: Float[Tensor, "n d"],
    aim: Int[Tensor, " n"] | Float[Tensor, "n d"] | None,
    reference: Float[Tensor, "n d"] | None,
    reg: Reg,
    objective: Objective = "nll",
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Objective and divergence of every position, in nats, differentiable with respect to `states`.

    Args:
        states: hidden states before the head.
        aim: with objective nll the tokens that `states` predict; else the same positions under the teacher, for
            KL(teacher || student) with kl_fwd and KL(student || teacher) with kl_rev. None: the objective is 0.
        reference: the same positions under the reference model, or None for no divergence.
    """
    return _Fused.apply(states, head, aim, reference, (reg, objective))


def aggregate(kl: Float[Tensor, " n"], agg: Agg) -> Float[Tensor, ""]:
    """Aggregate the per-position divergences into one, in nats."""
    match agg:
        case "mean":
            return kl.mean()
        case "rmse":
            return rmse(kl)
        case "p95":
            return torch.quantile(kl, 0.95)
        case "max":
            return kl.max()


def rmse(kl: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Root mean square of the per-position KL, in nats.

    Incoherence is concentrated in a few positions. The mean dilutes them; the rmse does not. Unlike the maximum, the
    rmse sends gradient to every position.
    """
    return (kl.square().mean() + KL_EPS).sqrt()


def hinge(divergence: Float[Tensor, ""], tau: float) -> Float[Tensor, ""]:
    """The barrier: the divergence minus tau, or 0 when the divergence is below tau."""
    return torch.relu(divergence - tau)
