"""How well each block tells the personas apart. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How well one layer tells the personas apart."""

    layer: int
    depth: float
    """block index as a share of the last"""
    relative_norm: float
    """norm of the mean difference over the mean norm of the residual stream"""
    split_half: float
    """cosine between the mean differences of two random halves of the contexts"""
    auc: float
    """probability that one half's mean difference ranks a positive prompt of the other half above a negative one"""
