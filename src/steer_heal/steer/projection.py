"""Projecting the vectors of other traits out of a trait's states, block by block: `steer.without`.

Two traits that are alike, such as love and calm, share much of their vectors, and steering one moves the other. What is
orthogonal to the other's vector is the trait's own part. The projection is that of directional ablation (Arditi et al.,
"Refusal in Language Models Is Mediated by a Single Direction", arXiv:2406.11717), here of the vector and not of the
model; that concepts have directions which can be added and taken out is representation engineering (Zou et al.,
arXiv:2310.01405).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.config import Exhausted

LEAST_LEFT = 0.1  # share of the norm; what is left of a vector below it is no more than noise
SAME = 1e-3  # of directions of length 1, as a singular value: below it they say nothing that the others do not


def spans(vectors: Float[Tensor, "k l d"]) -> list[Float[Tensor, "r d"]]:
    """An orthonormal basis, in float64, of what the k vectors span in each block: r is k, or less if they are alike."""
    found = []
    for of_block in torch.nn.functional.normalize(vectors.double(), dim=-1).unbind(1):
        _, sizes, directions = torch.linalg.svd(of_block, full_matrices=False)
        found.append(directions[sizes > SAME])
    return found


def outside(states: Float[Tensor, "n l d"], bases: list[Float[Tensor, "r _"]]) -> Float[Tensor, "n l d"]:
    """The states without their part in each block's basis."""
    wide = states.double()
    parts = [wide[:, i] - (wide[:, i] @ basis.T) @ basis for i, basis in enumerate(bases)]
    return torch.stack(parts, dim=1).to(states)


def require_left(layers: tuple[int, ...], left: list[float], named: str) -> None:
    """Raise Exhausted for a block in which hardly anything is left of the vector's norm."""
    least, layer = min(zip(left, layers, strict=True))
    if not least >= LEAST_LEFT:
        raise Exhausted(
            f"steer.without {named}: of the vector of block {layer} only {least:.1%} of the norm is left, and "
            f"{LEAST_LEFT:.0%} is the least: name fewer traits, or traits that are less alike"
        )
