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
    """norm of the mean difference, or of a vector from a file, over the mean norm of the residual stream"""
    split_half: float | None = None
    """cosine between the mean differences of two random halves of the contexts; none for a vector from a file"""
    left: float | None = None
    """share of the norm that is left after `steer.without`; none where nothing was projected out"""
    auc: float
    """probability that one half's mean difference ranks a positive prompt of the other half above a negative one; that
    a vector from a file ranks any positive prompt above a negative one"""
