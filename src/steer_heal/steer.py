"""The teacher vector.

v_l = mean over contexts of h_l(positive persona + context) - h_l(negative persona + context), the residual stream
after block l at the last prompt token (the assistant tag), raw and not normalised. The two prompts differ in the
system persona alone. Contrastive mean-difference vectors: Rimsky et al., "Steering Llama 2 via Contrastive
Activation Addition", arXiv:2312.06681; the persona form and the assistant tag as reading point follow vgel/repeng.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from steer_heal.lm import LM, Vector, last_token_states


def extract(
    lm: LM,
    positive: str,
    negative: str,
    contexts: list[str],
    band: tuple[float, float],
    batch_size: int,
    on_prompts: Callable[[int], None] = lambda prompts: None,
) -> Vector:
    """Vector of the model as it stands (its active adapters included).

    Args:
        positive, negative: the system personas.
        contexts: user messages; each is asked under both personas.
        band: blocks to steer, as shares of depth.
    """
    layers = lm.band(band)
    mean = {
        persona: last_token_states(
            lm, [lm.prompt(text, persona) for text in contexts], layers, batch_size, on_prompts
        ).mean(0)
        for persona in (positive, negative)
    }
    return Vector(layers, mean[positive] - mean[negative])


def cosine(a: Vector, b: Vector) -> float:
    """Mean over layers of the cosine between two vectors of the same band."""
    return float(torch.cosine_similarity(a.direction, b.direction, dim=-1).mean())
