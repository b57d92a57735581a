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
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of one buffer of logits: 16 MB in float32, 256 MB on a GPU
CHUNK_ROWS = 16  # at least: fewer would read the head's weights too often
WIDEN = 4096  # rows of the head that are widened to float32 at a time when states are narrower

Reg = Literal["nll", "kl_fwd", "kl_rev"]
Agg = Literal["mean", "rmse", "p95", "max"]


class _Fused(torch.autograd.Function):
    """(objective_i, kl_i) for every position, and their gradients with respect to h_i, in one pass over the head.

    objective_i is the NLL of the target, or with `teacher` states the KL(teacher || student); 0 with neither.
    kl_i is KL(student || reference) for kl_rev and KL(reference || student) for kl_fwd; 0 without a reference.

    The vocabulary-wide buffers are made once and written in place: on a CPU a fresh 16 MB tensor costs more in page
    faults than the arithmetic that fills it.
    """

    @staticmethod
    def forward(ctx, states, head, targets, teacher, reference, reg):
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        n, vocab = len(states), len(head.weight)
        step = min(n, max(CHUNK_ROWS, CHUNK_ELEMENTS[states.device.type] // vocab))
        room = [torch.empty(step, vocab, dtype=wide, device=states.device) for _ in range(4)]
        objective, kl = states.new_zeros(n, dtype=wide), states.new_zeros(n, dtype=wide)
        has_objective = teacher is not None or targets is not None
        grad_objective = torch.empty_like(states, dtype=wide) if states.requires_grad and has_objective else None
        grad_kl = torch.zeros_like(states, dtype=wide) if states.requires_grad and reference is not None else None
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            z, p, other_z, other_p = (buffer[: part.stop - part.start] for buffer in room)
            lse = _softmax(_logits(head, states[part], z), p)
            if teacher is None and targets is not None:
                target = targets[part, None]
                objective[part] = (lse - z.gather(1, target))[:, 0]
                if grad_objective is not None:
                    at_target = p.gather(1, target)
                    p.scatter_(1, target, at_target - 1.0)
                    grad_objective[part] = _through_head(p, z, head, other_z)
                    p.scatter_(1, target, at_target)
            elif teacher is not None:
                teacher_lse = _softmax(_logits(head, teacher[part], other_z), other_p)
                gap = other_z.sub_(z).add_(lse - teacher_lse)
                objective[part] = _row_dot(other_p, gap)
                if grad_objective is not None:
                    grad_objective[part] = _through_head(torch.sub(p, other_p, out=other_p), z, head, other_z)
            if reference is not None:
                reference_lse = _softmax(_logits(head, reference[part], other_z), other_p)
                if reg == "kl_rev":
                    gap = torch.sub(z, other_z, out=other_z).add_(reference_lse - lse)
                    kl[part] = _row_dot(p, gap)
                    dz = torch.mul(gap.sub_(kl[part, None]), p, out=other_p)
                else:
                    gap = other_z.sub_(z).add_(lse - reference_lse)
                    kl[part] = _row_dot(other_p, gap)
                    dz = torch.sub(p, other_p, out=other_p)
                if grad_kl is not None:
                    grad_kl[part] = _through_head(dz, z, head, other_z)
        ctx.save_for_backward(grad_objective, grad_kl)
        ctx.dtype = states.dtype
        return objective, kl

    @staticmethod
    def backward(ctx, weight_objective, weight_kl):
        pairs = zip((weight_objective, weight_kl), ctx.saved_tensors, strict=True)
        grads = [weight[:, None] * grad for weight, grad in pairs if grad is not None]
        return (sum(grads).to(ctx.dtype) if grads else None), None, None, None, None, None


def _logits(head: Head, states: Tensor, out: Tensor) -> Tensor:
    """Capped logits into `out`. Narrower states are multiplied with sums in out's precision that are not rounded
    back: a bf16 logit of 20 would be off by up to 0.06, and a softmax shows that."""
    weight = head.weight
    if states.dtype == weight.dtype == out.dtype:
        torch.mm(states, weight.T, out=out)
    elif states.is_cuda and states.dtype == weight.dtype:
        torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    else:
        for start in range(0, len(weight), WIDEN):
            part = slice(start, start + WIDEN)
            out[:, part] = states.to(out.dtype) @ weight[part].to(out.dtype).T
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def _softmax(z: Tensor, out: Tensor) -> Tensor:
    """Softmax of each row of z into `out`; returns the log of its normaliser, [n, 1]."""
    top = z.amax(1, keepdim=True)
    total = torch.sub(z, top, out=out).exp_().sum(1, keepdim=True)
    out.div_(total)
    return top + total.log()


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def _through_head(dz: Tensor, z: Tensor, head: Head, scratch: Tensor) -> Tensor:
    """Gradient with respect to the states from the one with respect to the capped logits z."""
    if head.softcap is not None:
        slope = torch.div(z, head.softcap, out=scratch).square_().neg_().add_(1.0)
        dz = slope.mul_(dz)
    return dz.to(head.weight.dtype) @ head.weight


def position_losses(
    head: Head,
    states: Float[Tensor, "n d"],
    targets: Int[Tensor, "n"] | None,
    reference: Float[Tensor, "n d"] | None,
    reg: Reg,
    teacher: Float[Tensor, "n d"] | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Objective and divergence of every position, in nats, differentiable with respect to `states`.

    Args:
        states: hidden states before the head that predict `targets`; without targets or teacher the objective is 0.
        reference: the same positions under the reference model, or None for no divergence.
        teacher: the same positions under the steered teacher; the objective is then KL(teacher || student).
    """
    return _Fused.apply(states, head, targets, teacher, reference, reg)


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
