"""Cross-entropy and divergence over completion tokens, without ever holding a [tokens, vocab] tensor.

L = mean NLL + lam * relu(D - tau), D = agg over positions of KL_i (nats).

gemma has 262,144 tokens: the logits of a batch of 3 x 1024 in float32 take 3 GB a copy, and a plain loss keeps
several. Here the hidden states of the completion positions go through the head a chunk at a time. In the forward pass
each chunk yields nll_i, kl_i and both gradients with respect to h_i; the backward pass only combines the two with the
weights that the aggregate gives to each position. That works because position i's gradient depends on the other
positions through scalars alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_heal.lm import Head

KL_EPS = 1e-12  # under the root of rmse: sqrt has no gradient at the KL of exactly 0 where a fresh adapter starts
CHUNK_ELEMENTS = 1 << 22  # logits held at once, a head: 16 MB in float32

Reg = Literal["nll", "kl_fwd", "kl_rev"]
Agg = Literal["mean", "rmse", "p95", "max"]


class _Fused(torch.autograd.Function):
    """(objective_i, kl_i) for every position, and their gradients with respect to h_i, in one pass over the head.

    objective_i is the NLL of the target, or with `teacher` states the KL(teacher || student).
    kl_i is KL(student || reference) for kl_rev and KL(reference || student) for kl_fwd; 0 without a reference.
    """

    @staticmethod
    def forward(ctx, states, weight, softcap, targets, teacher, reference, reg):
        n = len(states)
        head = Head(weight, softcap)
        objective = states.new_empty(n, dtype=_wide(states))
        kl = states.new_zeros(n, dtype=_wide(states))
        need = states.requires_grad
        grad_objective = torch.empty_like(states, dtype=_wide(states)) if need else None
        grad_kl = torch.zeros_like(states, dtype=_wide(states)) if need and reference is not None else None
        step = max(16, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, n, step):
            part = slice(start, start + step)
            logits = _logits(head, states[part])
            logp = logits.log_softmax(-1)
            p = logp.exp()
            if teacher is None:
                objective[part] = -logp.gather(1, targets[part, None])[:, 0]
            else:
                teacher_logp = _logits(head, teacher[part]).log_softmax(-1)
                teacher_p = teacher_logp.exp()
                objective[part] = (teacher_p * (teacher_logp - logp)).sum(-1)
            if need:
                if teacher is None:
                    dz = p.clone()
                    dz[torch.arange(len(dz)), targets[part]] -= 1.0
                else:
                    dz = p - teacher_p
                grad_objective[part] = _through_head(dz, logits, head)
            if reference is not None:
                reference_logp = _logits(head, reference[part]).log_softmax(-1)
                if reg == "kl_rev":
                    gap = logp - reference_logp
                    kl[part] = (p * gap).sum(-1)
                    dz = p * (gap - kl[part, None])
                else:
                    reference_p = reference_logp.exp()
                    kl[part] = (reference_p * (reference_logp - logp)).sum(-1)
                    dz = p - reference_p
                if need:
                    grad_kl[part] = _through_head(dz, logits, head)
        ctx.save_for_backward(grad_objective, grad_kl)
        ctx.dtype = states.dtype
        return objective, kl

    @staticmethod
    def backward(ctx, weight_objective, weight_kl):
        grad_objective, grad_kl = ctx.saved_tensors
        grad = weight_objective[:, None] * grad_objective
        if grad_kl is not None:
            grad = grad + weight_kl[:, None] * grad_kl
        return grad.to(ctx.dtype), None, None, None, None, None, None


def _wide(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _logits(head: Head, states: Tensor) -> Tensor:
    logits = (states @ head.weight.T.to(states.dtype)).to(_wide(states))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _through_head(dz: Tensor, logits: Tensor, head: Head) -> Tensor:
    if head.softcap is not None:
        dz = dz * (1.0 - (logits / head.softcap).square())
    return dz.to(head.weight.dtype) @ head.weight


def position_losses(
    head: Head,
    states: Float[Tensor, "n d"],
    targets: Int[Tensor, "n"],
    reference: Float[Tensor, "n d"] | None,
    reg: Reg,
    teacher: Float[Tensor, "n d"] | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Objective and divergence of every position, in nats, differentiable with respect to `states`.

    Args:
        states: hidden states before the head that predict `targets`.
        reference: the same positions under the reference model, or None for no divergence.
        teacher: the same positions under the steered teacher; the objective is then KL(teacher || student).
    """
    return _Fused.apply(states, head.weight, head.softcap, targets, teacher, reference, reg)


def aggregate(kl: Float[Tensor, "n"], agg: Agg) -> Float[Tensor, ""]:
    """One divergence from the per-position ones, in nats."""
    match agg:
        case "mean":
            return kl.mean()
        case "rmse":
            return rmse(kl)
        case "p95":
            return torch.quantile(kl, 0.95)
        case "max":
            return kl.max()


def rmse(kl: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Root mean square of the per-position KL, in nats.

    Incoherence sits in a few positions. The mean dilutes them; the rmse does not, and unlike the maximum it sends
    gradient to every position.
    """
    return (kl.square().mean() + KL_EPS).sqrt()


def hinge(divergence: Float[Tensor, ""], tau: float) -> Float[Tensor, ""]:
    """The barrier: how far the divergence is above tau, 0 below."""
    return torch.relu(divergence - tau)
