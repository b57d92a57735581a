"""Low-rank updates B A: a penalty on their largest singular value, and their best approximation of a smaller rank.

Only the factors B [out, r] and A [r, in] are used. The product B A is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Factors(NamedTuple):
    """One layer's update, scale * B A."""

    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]
    scale: float


class OperatorNorm:
    """Mean over layers of the squared largest singular value of the update, differentiable.

    Each call does one step of power iteration (Miyato et al., "Spectral Normalization", arXiv:1802.05957). One step
    suffices because the weights move little between two optimiser steps.
    """

    def __init__(self, layers: list[Factors], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.layers = layers
        self.right = [torch.randn(f.a.shape[1], generator=draw).to(f.a) for f in layers]

    def __call__(self) -> Float[Tensor, ""]:
        squares = []
        for i, (a, b, scale) in enumerate(self.layers):
            with torch.no_grad():
                left = _unit(b @ (a @ self.right[i]))
                back = a.T @ (b.T @ left)
                if back.any():  # a fresh adapter has B = 0 and no singular vector yet
                    self.right[i] = _unit(back)
            squares.append((scale * (left @ (b @ (a @ _unit(self.right[i]))))).square())
        return torch.stack(squares).mean()


def _unit(v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)


class Compressed(NamedTuple):
    """Factors of rank k that approximate B A, and the error."""

    a: Float[Tensor, "k in"]
    b: Float[Tensor, "out k"]
    lost: float
    """squared Frobenius norm of the difference"""
    total: float
    """squared Frobenius norm of B A"""


def compress(a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], rank: int) -> Compressed:
    """Return the closest matrix of rank at most `rank` to B A (Eckart and Young, 1936), as factors.

    Row i of the new A and column i of the new B have equal norm. A layer narrower than `rank` has fewer singular
    values; the rows and columns beyond them are zero. The singular values of B A are those of the r x r product of the
    triangular factors of B and A^T.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.T.double())
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    kept = s[:rank].sqrt()
    new_a, new_b = a.new_zeros(rank, a.shape[1], dtype=kept.dtype), b.new_zeros(len(b), rank, dtype=kept.dtype)
    new_a[: len(kept)] = kept[:, None] * (vt[: len(kept)] @ q_a.T)
    new_b[:, : len(kept)] = (q_b @ u[:, : len(kept)]) * kept
    lost, total = s[rank:].square().sum().item(), s.square().sum().item()
    return Compressed(new_a.to(a.dtype), new_b.to(b.dtype), lost, total)
