"""Where a round moved the model: along its teacher's vector or elsewhere, and how far from the base.

The shift is read as the vector is, at the last prompt token in the vector's band, but without any persona: the mean
over contexts of the student's hidden state minus that of the model before.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.bake import Student
from steer_heal.lm import AnyVector, Row, Vector, last_token_states
from steer_heal.steer import token_kl


def geometry(
    student: Student, contexts: list[str], vector: AnyVector, first: AnyVector, fixed: list[Row], batch_size: int
) -> dict:
    """Of the current round, before it is folded.

    "cos_shift_vector": cosine of the round's shift with its teacher's vector, mean over the band. "cos_total_first":
    of the shift since base with the first round's vector. "kl_to_base_nats", "kl_to_base_rmse_nats": KL(student ||
    base) over the tokens of fixed text, mean and root mean square. Cosines are None for a foreign vector.
    """
    views = {"base": (0.0, 0.0), "before": (1.0, 0.0), "now": (1.0, 1.0)}
    prompts = [student.lm.prompt(text) for text in contexts]
    mean, states = {}, {}
    for name, (history, now) in views.items():
        with student.view(history=history, now=now):
            mean[name] = last_token_states(student.lm, prompts, vector.layers, batch_size).mean(0)
            if name != "before":
                states[name] = student.lm.states(fixed, batch_size)
    kl = torch.cat(token_kl(student.lm.head, states["now"], states["base"])).double()
    return {
        "cos_shift_vector": _cosine(mean["now"] - mean["before"], vector),
        "cos_total_first": _cosine(mean["now"] - mean["base"], first),
        "kl_to_base_nats": kl.mean().item(),
        "kl_to_base_rmse_nats": kl.square().mean().sqrt().item(),
    }


def _cosine(shift: Float[Tensor, "l d"], vector: AnyVector) -> float | None:
    if not isinstance(vector, Vector):
        return None
    return torch.cosine_similarity(shift, vector.direction.to(shift), dim=-1).mean().item()
