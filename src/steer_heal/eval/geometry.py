"""The geometry of a round: the direction in which it moved the model, and the divergence from the base.

The shift is read where the vector is read, at the last prompt token in the vector's band, but without a persona. It is
the mean over contexts of the student's hidden state minus the previous student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.bake.student import Student
from steer_heal.eval.reading import Geometry
from steer_heal.model.forward import last_token_states, states
from steer_heal.model.likelihood import token_kl
from steer_heal.model.lm import Row
from steer_heal.model.steering import AnyVector, ForeignVector, Vector


@dataclass(frozen=True)
class Fixed:
    """The prompts and rows on which the base and every student are read."""

    contexts: list[str]
    rows: list[Row]


class Base(NamedTuple):
    """The base's hidden states on `Fixed`; later rounds are compared with them."""

    mean: Float[Tensor, "l d"]
    """mean over contexts of the base's hidden states at the last prompt token"""
    states: list[Float[Tensor, "_ d"]]
    """hidden states before the head, on `Fixed.rows`"""


def read_base(student: Student, fixed: Fixed, layers: tuple[int, ...]) -> Base:
    with student.view(history=0.0, now=0.0):
        return Base(_mean(student, fixed, layers), states(student.lm, fixed.rows))


def geometry(student: Student, fixed: Fixed, vector: AnyVector, first: AnyVector, base: Base) -> Geometry:
    """Measure the current round, before it is folded."""
    with student.view(now=0.0):
        before = _mean(student, fixed, vector.layers)
    with student.view():
        now = _mean(student, fixed, vector.layers)
        hidden = states(student.lm, fixed.rows)
    kl = torch.cat(token_kl(student.lm.head, hidden, base.states)).double()
    return Geometry(
        cos_first_vector=cosine(vector, first),
        cos_shift_vector=_cosine(now - before, vector),
        cos_total_first=_cosine(now - base.mean, first),
        kl_to_base_nats=kl.mean().item(),
        kl_to_base_rmse_nats=kl.square().mean().sqrt().item(),
    )


def _mean(student: Student, fixed: Fixed, layers: tuple[int, ...]) -> Float[Tensor, "l d"]:
    prompts = [student.lm.prompt(text) for text in fixed.contexts]
    return last_token_states(student.lm, prompts, layers).mean(0)


def _cosine(shift: Float[Tensor, "l d"], vector: AnyVector) -> float | None:
    if not isinstance(vector, Vector):
        return None
    return torch.cosine_similarity(shift, vector.direction.to(shift), dim=-1).mean().item()


def cosine(a: AnyVector, b: AnyVector) -> float | None:
    """Mean over layers of the cosine between two vectors of the same band; None for a foreign vector."""
    if isinstance(a, ForeignVector) or isinstance(b, ForeignVector):
        return None
    return float(torch.cosine_similarity(a.direction, b.direction, dim=-1).mean())
